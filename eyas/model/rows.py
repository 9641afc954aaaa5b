"""The rows of a pass, flat and grouped by sequence: one text, ragged trees of many sequences, a part of a prompt.

Knows tokens, positions and masks; knows nothing of caches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """The rows of a pass that belong to one sequence, in the order of the pass."""

    slot: int
    count: int
    # bool [count, k + count]: who sees the last k committed rows and these; committed rows before those are seen by all. None: causal.
    mask: Tensor | None = None


class Rows(NamedTuple):
    """N rows of a pass, grouped by sequence in the order of `segments`. They are laid out on the CPU; the pass takes them to its device."""

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    segments: list[Segment]

    def on(self, device: torch.device) -> Rows:
        return Rows(self.tokens.to(device), self.positions.to(device), self.segments)


def chain_rows(slot: int, tokens: Sequence[int], start: int) -> Rows:
    """Rows of one sequence that follow each other, the first at position `start`: prefill, or one more token."""
    return Rows(torch.tensor(tokens), torch.arange(start, start + len(tokens)), [Segment(slot, len(tokens))])
