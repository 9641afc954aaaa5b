"""Vanilla speculative sampling's drafter (arXiv 2211.17192, 2302.01318): a smaller model, or the target's own first layers, guesses.

It reads committed text as the target does, from tokens alone, and grows trees like any other drafter. Under the walk with shared noise its
guesses need no accept/reject rule. Knows a model with the target's vocabulary; knows nothing of features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eyas.config import EyasError
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import Level, grow
from eyas.decode.tree import Tree
from eyas.model.cache import Cache
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment

SHARE = 3  # where no smaller model is named, the target's first third of layers drafts
CATCH_UP = 256  # rows of committed text read at once


class ModelDrafter:
    """Grows trees with a language model. A node's output is the model's logits [V] there."""

    cache: Cache  # the draft model's; made by `reserve`
    wants: tuple[int, ...] = ()

    def __init__(self, model: TargetModel, vocab_size: int) -> None:
        check_vocabulary(model, vocab_size)
        self.model = model
        self.waiting: dict[int, list[int]] = {}

    def reserve(self, sequences: int, capacity: int) -> None:
        if hasattr(self, "cache"):
            self.cache.release()  # what it held may serve the next one
        self.cache = self.model.new_cache(sequences, capacity)
        self.waiting = {sequence: [] for sequence in range(sequences)}

    def forget(self, sequence: int) -> None:
        self.waiting[sequence] = []
        self.cache.clear(sequence)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.waiting[sequence] += tokens
        while len(tokens) >= CATCH_UP < len(self.waiting[sequence]):  # a long prompt is read as it comes, part by part
            self.read_waiting([sequence])

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        trees = grow(requests, self.catch_up, self.read_level, lambda level, logits_RV: logits_RV)
        for request in requests:
            self.cache.cut(request.sequence, request.position + 1)  # the root's row stays, the other rows of the tree are dropped
        return trees

    def catch_up(self, sequences: Sequence[int]) -> Tensor:
        """Read the committed tokens that wait; returns the logits [S, V] after each sequence's last token."""
        while late := [sequence for sequence in sequences if len(self.waiting[sequence]) > CATCH_UP]:
            self.read_waiting(late)
        return self.read_waiting(sequences)

    def read_waiting(self, sequences: Sequence[int]) -> Tensor:
        parts = [self.waiting[sequence][:CATCH_UP] for sequence in sequences]
        positions = [self.cache.lengths[sequence] + i for sequence, part in zip(sequences, parts, strict=True) for i in range(len(part))]
        segments = [Segment(sequence, len(part)) for sequence, part in zip(sequences, parts, strict=True)]
        last = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
        for sequence, part in zip(sequences, parts, strict=True):
            self.waiting[sequence] = self.waiting[sequence][len(part) :]
        return self.read([token for part in parts for token in part], positions, segments, last)

    def read_level(self, levels: list[Level]) -> Tensor:
        tokens = [token for level in levels for token in level.tokens]
        positions = [level.request.position + depth for level in levels for depth in level.depths]
        return self.read(tokens, positions, [Segment(level.request.sequence, len(level.tokens), level.sight) for level in levels])

    def read(self, tokens: list[int], positions: list[int], segments: list[Segment], logits_of: Tensor | None = None) -> Tensor:
        out = self.model(Rows(torch.tensor(tokens), torch.tensor(positions), segments), self.cache, (), logits_of)
        for segment in segments:
            self.cache.keep(segment.slot, range(segment.count))
        return out.logits


def check_vocabulary(model: TargetModel, vocab_size: int) -> None:
    """Raise `EyasError` for a model of another vocabulary than the target's, which has `vocab_size` tokens."""
    if model.config.vocab_size != vocab_size:
        raise EyasError(f"the draft model has {model.config.vocab_size} tokens, the target {vocab_size}; they must share a vocabulary")


def alone(target: TargetModel) -> ModelDrafter:
    """The method's drafter where no smaller model is named: the target's own first layers, the cheapest draft model there is."""
    return ModelDrafter(target.shallow(max(1, target.config.num_hidden_layers // SHARE)), target.config.vocab_size)
