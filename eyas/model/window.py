"""Sliding windows: a row sees the last few positions alone, itself included (Mistral 7B 0.1).

Where all rows of a slot lie within one window, that is the usual attention. Beyond it the pass's segments get masks that say so. Knows
positions and masks; knows nothing of layers or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eyas.kernels.attention import PassAttention
from eyas.model.cache import KVCache
from eyas.model.mask import behind_prefix, causal_mask
from eyas.model.rows import Segment


class WindowedCache(KVCache):
    """A cache that knows the position of each of its rows: those of a tree's rows are their depths, which their places do not say."""

    def __init__(
        self, window: int, layers: int, slots: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers, slots, capacity, kv_heads, head_dim, dtype, device)
        self.window = window
        self.positions = torch.zeros(slots, capacity, dtype=torch.int64, device="cpu")

    def attention_at(self, segments: Sequence[Segment], positions_N: Tensor, group: int) -> PassAttention:
        """The attention of one pass, whose rows lie at these positions (on the CPU)."""
        parts = positions_N.split([segment.count for segment in segments])
        return self.attention([self.near(segment, part) for segment, part in zip(segments, parts, strict=True)], group)

    def near(self, segment: Segment, positions_n: Tensor) -> Segment:
        """The segment with a mask over all rows of its slot, where some of these lie outside a row's window."""
        start = self.lengths[segment.slot]
        end = start + segment.count
        assert end <= self.capacity, f"slot {segment.slot} holds {self.capacity} rows, {end} wanted"
        self.positions[segment.slot, start:end] = positions_n
        if end <= self.window:  # no row's position is larger than its place
            return segment
        among = causal_mask(segment.count) if segment.mask is None else segment.mask
        near_nt = self.positions[segment.slot, :end] > positions_n[:, None] - self.window
        return segment._replace(sight=behind_prefix(among, end - among.shape[1]) & near_nt)

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        start = self.lengths[slot]
        self.positions[slot, start : start + len(rows)] = self.positions[slot, torch.tensor(rows, dtype=torch.int64) + start]
        super().keep(slot, rows)

    def copy_prefix(self, other: KVCache, source: int, slot: int, length: int) -> None:
        held = other.positions[source] if isinstance(other, WindowedCache) else torch.arange(length)  # a small cache keeps no positions
        self.positions[slot, :length] = held[:length]
        super().copy_prefix(other, source, slot, length)
