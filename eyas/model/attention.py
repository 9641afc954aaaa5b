"""Attention of one pass over a cache in PyTorch's own operations: each row sees the committed rows of its slot and those its mask names.

It is the plain form of the native kernel's attention (kernels/attention.py), and runs where that kernel does not. Knows a cache, segments
and masks; knows nothing of layers, tokens or trees.

Axes: N rows, q/k heads, d head width, t keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.kernels.attention import Attend, attention_with_lse, grouped_attention
from eyas.model.mask import behind_prefix, causal_mask
from eyas.model.rows import Segment

if TYPE_CHECKING:
    from eyas.model.cache import KVCache


def launches_count(device: torch.device) -> bool:
    """Whether a launch takes longer than what it mostly computes, so that sequences are padded to be computed together."""
    return device.type != "cpu"


class PlainAttention:
    """PyTorch's attention, segment by segment; many segments of one row each are one padded product, and so are whole prompts where
    launches count."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment], group: int, lses: list[Tensor] | None = None) -> None:
        self.cache, self.lses, dtype = cache, lses, cache.keys.dtype
        starts = [0, *itertools.accumulate(segment.count for segment in segments)]
        singles = [i for i, segment in enumerate(segments) if segment.count == 1 and segment.mask is None]
        if not (len(singles) > max(3, cache.slots // 2) and lses is None):  # a padded product would not pay
            singles = []
        prompts = whole_prompts(cache, segments) if lses is None and launches_count(cache.keys.device) else []
        batched = {*singles, *prompts}
        self.loose = [(segment, slice(starts[i], starts[i + 1])) for i, segment in enumerate(segments) if i not in batched]
        self.biases = [self._bias(segment, group, dtype) for segment, _ in self.loose]
        self.padded: list[Singles | Prompts] = []
        if singles:
            self.padded.append(Singles(cache, [segments[i].slot for i in singles], [starts[i] for i in singles]))
        if prompts:
            self.padded.append(Prompts(cache, [segments[i] for i in prompts], [starts[i] for i in prompts]))

    def _bias(self, segment: Segment, group: int, dtype: torch.dtype) -> Tensor | None:
        """A segment's additive mask [group * count, length + count], or None where every row sees everything."""
        if segment.count == 1 and (segment.mask is None or bool(segment.mask.all())):
            return None
        among = causal_mask(segment.count) if segment.mask is None else segment.mask
        governed = among.shape[1] - segment.count
        seen = behind_prefix(among, self.cache.lengths[segment.slot] - governed).to(self.cache.keys.device)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf")).repeat(group, 1)

    def layer(self, layer: int) -> Attend:
        """The `attend` function of one layer."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.lses is not None:
                return self.with_lse(layer, q, k, v)
            if len(self.loose) == 1 and not self.padded:  # one sequence: nothing to gather
                keys, values = self.cache.write(layer, self.loose[0][0].slot, k, v)
                return grouped_attention(q, keys, values, self.biases[0])
            out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            for (segment, rows), bias in zip(self.loose, self.biases, strict=True):
                keys, values = self.cache.write(layer, segment.slot, k[rows], v[rows])
                out[rows] = grouped_attention(q[rows], keys, values, bias)
            for padded in self.padded:
                out[padded.rows] = padded.attend(layer, q[padded.rows], k[padded.rows], v[padded.rows])
            return out

        return attend

    def with_lse(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention that appends its log-sum-exps to `lses`."""
        parts, lses = [], self.lses
        assert lses is not None
        for (segment, rows), bias in zip(self.loose, self.biases, strict=True):
            seen = None if bias is None else bias[: segment.count] == 0
            parts.append(attention_with_lse(q[rows], *self.cache.write(layer, segment.slot, k[rows], v[rows]), seen))
        lses.append(torch.cat([lse for _, lse in parts]))
        return torch.cat([out for out, _ in parts])


class Singles:
    """Many sequences of one row each: one padded product over all slots instead of one for each sequence.

    Slots without a row are computed too and their results ignored, which is cheaper than gathering the other slots' keys.
    """

    def __init__(self, cache: KVCache, slots: list[int], rows: list[int]) -> None:
        device = cache.keys.device
        self.cache = cache
        self.rows, self.slots = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        self.ends = torch.tensor([cache.lengths[slot] for slot in slots], device=device)
        self.longest = int(self.ends.max()) + 1
        every_end = torch.zeros(cache.slots, dtype=torch.int64, device=device).index_copy_(0, self.slots, self.ends)
        hidden = torch.arange(self.longest, device=device)[None] > every_end[:, None]
        self.bias = torch.zeros(hidden.shape, dtype=cache.keys.dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.ends], values[self.slots, :, self.ends] = k, v
        every_q = q.new_zeros(self.cache.slots, *q.shape[1:]).index_copy_(0, self.slots, q)
        q_bkgd = every_q.view(self.cache.slots, k.shape[1], -1, q.shape[-1])
        bias = self.bias.expand(-1, q_bkgd.shape[1], q_bkgd.shape[2], -1)
        out = F.scaled_dot_product_attention(q_bkgd, keys[:, :, : self.longest], values[:, :, : self.longest], attn_mask=bias)
        return out.reshape(self.cache.slots, -1)[self.slots]


PADDED = 2  # times as many rows as there are is the most that prompts are padded to


def whole_prompts(cache: KVCache, segments: Sequence[Segment]) -> list[int]:
    """Which segments are read from their sequence's first row on, if these are several and about as long."""
    found = [i for i, each in enumerate(segments) if each.mask is None and each.count > 1 and cache.lengths[each.slot] == 0]
    counts = [segments[i].count for i in found]
    return found if len(found) > 1 and len(counts) * max(counts) <= PADDED * sum(counts) else []


class Prompts:
    """Sequences that are read from their first row on: one padded causal product."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment], starts: Sequence[int]) -> None:
        device, self.cache, self.count = cache.keys.device, cache, len(segments)
        self.longest = max(segment.count for segment in segments)
        assert self.longest <= cache.capacity, f"a slot holds {cache.capacity} rows, {self.longest} wanted"
        places = [torch.arange(segment.count, device="cpu") for segment in segments]
        columns = [
            torch.cat([start + place for start, place in zip(starts, places, strict=True)]),
            torch.cat([number * self.longest + place for number, place in enumerate(places)]),
            torch.cat([torch.full_like(place, segment.slot) for segment, place in zip(segments, places, strict=True)]),
            torch.cat(places),
        ]
        self.rows, self.cells, self.slots, self.places = torch.stack(columns).to(device, non_blocking=True)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.places], values[self.slots, :, self.places] = k, v
        q, k, v = (self.spread(each) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.cells)

    def spread(self, x_nhd: Tensor) -> Tensor:
        """Rows laid into [sequences, heads, longest, d]; what pads a sequence lies behind it, where no row sees it."""
        whole = x_nhd.new_zeros(self.count * self.longest, *x_nhd.shape[1:]).index_copy_(0, self.cells, x_nhd)
        return whole.unflatten(0, (self.count, self.longest)).transpose(1, 2)
