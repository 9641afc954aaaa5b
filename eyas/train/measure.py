"""What a draft is accepted on held-out text: simulated from the states that training uses, or in real rounds with trees.

Knows networks, examples, the unroll and the round; knows nothing of optimisers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from eyas.config import GREEDY, TrainSettings, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.model.adapter import AdaptedTarget
from eyas.model.draft import DraftNetwork
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab
from eyas.train.batches import make_batch
from eyas.train.features import Example, StateSource
from eyas.train.unroll import unroll


def held_out_tau(
    network: DraftNetwork, vocab: DraftVocab, examples: Sequence[Example], source: StateSource, settings: TrainSettings
) -> tuple[float, list[float]]:
    """Simulated tau (1 + mean number of leading steps right) over all slots, and P(step k right | steps before right)."""
    steps = settings.unroll_steps
    alive, right = [0] * steps, [0] * steps
    slots_seen = 0
    for first in range(0, len(examples), 8):
        batch, states = make_batch(examples[first : first + 8], source, network)
        good = torch.ones_like(batch.tokens, dtype=torch.bool)
        for i, step in enumerate(unroll(network, batch, steps)):
            slots_seen += len(step.slots) if i == 0 else 0
            guesses = vocab.to_target(network.logits(step.a).argmax(-1))
            hit = guesses == states.favourites[step.teacher_rows]
            before = good[step.slots]
            alive[i] += int(before.sum())
            right[i] += int((hit & before).sum())
            good[step.slots] = hit & before
    return 1 + sum(right) / max(slots_seen, 1), [hits / max(count, 1) for hits, count in zip(right, alive)]


class TreeTau:
    """Tau of real rounds: greedy text after some prompts, drafted by trees of one shape."""

    def __init__(
        self, target: Target | AdaptedTarget, vocab: DraftVocab, prompts: Sequence[list[int]], shape: TreeShape, new_tokens: int
    ) -> None:
        """`target`: prepared for inference."""
        self.target, self.vocab, self.prompts, self.shape, self.new_tokens = target, vocab, prompts, shape, new_tokens

    @torch.inference_mode()
    def __call__(self, network: DraftNetwork) -> float:
        own = DraftNetwork(network.config, self.target.embedding.detach())  # a copy: preparing packs the weights away
        own.load_state_dict(network.state_dict())
        own = own.to(self.target.device, self.target.dtype).prepare()
        decoder = Decoder(self.target, Eagle3Drafter(own, self.vocab))
        *_, texts = decoder.run(self.prompts, self.shape, GREEDY, [0] * len(self.prompts), self.new_tokens)
        rounds = sum((text.accepted_lengths for text in texts), Counter())
        return sum(tokens * count for tokens, count in rounds.items()) / max(rounds.total(), 1)
