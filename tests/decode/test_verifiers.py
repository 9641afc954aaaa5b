"""Where a verifier's chance comes from: the target's draw at a node, and the draft's own draws."""

from __future__ import annotations

import torch

from eyas.config import Sampling
from eyas.decode.philox import GUESS
from eyas.decode.sampling import Noise, gumbel
from eyas.decode.sequence import Sequence
from eyas.decode.tree import Tree
from eyas.decode.verifiers import VERIFY

VOCAB = 31


def sequence(tokens: int = 6) -> Sequence:
    return Sequence(list(range(tokens)), 40, Noise(11, VOCAB), Sampling(temperature=1.0))


def test_the_walk_draws_each_token_with_the_noise_of_the_position_it_fills():
    text, logits = sequence(), torch.zeros(3, VOCAB)  # nothing is likelier, so the noise alone decides
    filled = [int(text.noise.at(position).argmax()) for position in (6, 7, 8)]  # the root, the last token, lies at position 5
    chain = Tree.chain(text.root, filled[:2], [-1.0, -2.0])
    assert VERIFY["walk"].verify(chain, logits, text) == ([0, 1, 2], filled[2])
    assert len(set(filled)) == 3


def test_the_drafts_own_noise_is_another_one_in_each_round_and_at_each_node():
    text, later = sequence(6), sequence(9)
    assert torch.equal(text.draft_noise(2, 4), gumbel(11, 5, 4, GUESS, 2))
    drawn = [tuple(each.draft_noise(node, 4).tolist()) for each in (text, later) for node in (0, 1)]
    assert len(set(drawn)) == 4
