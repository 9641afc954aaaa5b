"""A draft walked along a written text does what it did in the rounds that wrote it."""

from __future__ import annotations

import pytest

from eyas.config import GREEDY, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.measure.replay import features_of, replay
from tests.tiny import tiny_draft, tiny_target

PROMPTS = [[3, 5, 8, 13], [1, 2], list(range(20))]


@pytest.mark.parametrize("shape", [TreeShape.chain(3), TreeShape(12, 3, 4), TreeShape.chain(1)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "fc_norm": True}, {"norm_before_residual": True, "norm_before_fc": True}])
def test_replay_is_the_rounds_that_wrote_the_text(shape, settings):
    target = tiny_target()
    network, vocab = tiny_draft(target, **settings)
    drafter = Eagle3Drafter(network, vocab)
    for prompt in PROMPTS:
        decoder, records = Decoder(target, drafter), []
        decoder.watch = records.append
        *_, (text,) = decoder.run([prompt], shape, GREEDY, [0], 25)
        found = replay(drafter, features_of(target, text.tokens, drafter.wants, part=7), text.tokens, len(prompt), shape)
        assert found.steps == [len(record.committed) for record in records]
        room = [text.limit - len(prompt) - sum(found.steps[:number]) - 2 for number in range(len(found.steps))]
        whole = [record.tree.tokens for record, left in zip(records, room) if left >= shape.levels]
        assert [tree.tokens for tree, left in zip(found.trees, room) if left >= shape.levels] == whole and whole
