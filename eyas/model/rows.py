"""The rows of a pass, flat and grouped by sequence: one text, ragged trees of many sequences, a part of a prompt.

Knows tokens, positions and which rows see which; knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.model.mask import Sight


class Segment(NamedTuple):
    """The rows of a pass that belong to one sequence, in the order of the pass."""

    slot: int
    count: int
    # which rows see which of the last k committed rows and of these rows, [count, k + count]; all see earlier ones. None: causal.
    sight: Tensor | Sight | None = None

    @property
    def mask(self) -> Tensor | None:
        """`sight`, as bool [count, k + count]."""
        return self.sight.mask if isinstance(self.sight, Sight) else self.sight


class Rows(NamedTuple):
    """The N rows of a pass, grouped by sequence in the order of `segments`. They lie on the CPU; the pass moves them to its device."""

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    segments: list[Segment]

    def on(self, device: torch.device) -> Rows:
        return Rows(self.tokens.to(device), self.positions.to(device), self.segments)


def chain_rows(slot: int, tokens: Sequence[int], start: int) -> Rows:
    """The rows of a chain of tokens of one sequence, the first at position `start`: a prompt, or one more token."""
    return Rows(torch.tensor(tokens), torch.arange(start, start + len(tokens)), [Segment(slot, len(tokens))])
