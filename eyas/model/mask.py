"""Which rows may attend to which. There is one rule: a row sees itself and its ancestors.

A text is the tree in which every row's parent is the row before it, so causal attention, tree verification and the training unroll are
the same rule. Knows parents only. (Sharding keys over devices, "tree attention" in arXiv 2408.04093, shares the name and nothing else.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class Sight:
    """Which of some columns each row sees, as the columns' numbers; the mask is made where it is asked for."""

    def __init__(self, seen: Sequence[Sequence[int]], columns: int) -> None:
        """`seen`: for each row what it sees, ascending, of `columns` columns."""
        self.seen, self.columns = seen, columns

    @cached_property
    def mask(self) -> Tensor:
        """bool [rows, columns]"""
        mask = np.zeros((len(self.seen), self.columns), dtype=bool)
        for row, seen in enumerate(self.seen):
            mask[row, seen] = True
        return torch.from_numpy(mask)


def ancestor_sight(parents: Sequence[int]) -> Sight:
    """What each of N rows sees of them: itself and its ancestors; `parents[i] < i`, -1 for a root."""
    seen: list[list[int]] = []
    for row, parent in enumerate(parents):
        seen.append([*seen[parent], row] if parent >= 0 else [row])
    return Sight(seen, len(parents))


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """The same as bool [N, N]: row i may see column j iff j is i or an ancestor of i."""
    return ancestor_sight(parents).mask


def causal_mask(count: int) -> Tensor:
    """The ancestor mask of a chain: [count, count] lower triangle."""
    return torch.ones(count, count, dtype=torch.bool).tril()


def behind_prefix(mask_nk: Tensor, length: int) -> Tensor:
    """The mask of the same n rows with `length` earlier rows in front, which all of them see: [n, length + k]."""
    return torch.cat([torch.ones(mask_nk.shape[0], length, dtype=torch.bool), mask_nk], dim=1)
