"""Examples laid end to end, and dealt to workers.

Knows examples and where their states come from; knows nothing of losses or of the order in which examples are seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eyas.model.protocols import DraftModule
from eyas.train.comb import moved
from eyas.train.features import Example, States, StateSource
from eyas.train.unroll import Batch


def make_batch(examples: Sequence[Example], source: StateSource, network: DraftModule) -> tuple[Batch, States]:
    """Lay examples end to end, on the network's device; every answer gets a number of its own. Returns the target's states too."""
    device = network.device
    features, hidden, target_argmax = (tensor.to(device) for tensor in source.states(examples))
    tokens = moved(torch.tensor([token for example in examples for token in example.tokens], device="cpu"), device)
    lengths = [len(example.tokens) for example in examples]
    batch = Batch(tokens, features.to(network.dtype), numbered_answers(examples), lengths, hidden.to(network.dtype))
    return batch, States(features, hidden, target_argmax)


def numbered_answers(examples: Sequence[Example]) -> Tensor:
    """The answer numbers [M] of examples laid end to end, on the CPU: no two answers have the same number; -1 outside."""
    answers, used = [], 0
    for example in examples:
        answers += [number + used if number >= 0 else -1 for number in example.answers]
        used += 1 + max(example.answers)
    return torch.tensor(answers, device="cpu")


def split_evenly(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Deal examples into `parts` lists with about as many tokens each, the longest documents first."""
    found: list[list[Example]] = [[] for _ in range(parts)]
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        min(found, key=lambda part: sum(len(held.tokens) for held in part)).append(example)
    return found
