"""What a draft would be accepted on held-out text, from the states that training uses: no target pass, no decoding.

Knows a network, examples and the unroll; knows nothing of optimisers. Tau with real trees and rounds is `eyas bench`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eyas.config import TrainSettings
from eyas.model.draft import DraftNetwork
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
