"""Attention of rows over given keys and values: PyTorch's product with the heads of a group folded, and the native kernel's.

The kernel computes row by row, in an order that does not depend on the pass's other rows. Knows keys, values and which rows see which;
knows nothing of layers, tokens or trees.

Axes: N rows, q/k heads, d head width, t keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.kernels import native

if TYPE_CHECKING:
    from eyas.model.cache import KVCache
    from eyas.model.rows import Segment

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [N,q,d], k [N,k,d], v [N,k,d] -> [N, q*d]


class PassAttention(Protocol):
    """The attention of one pass: which rows see which is settled before its first layer runs."""

    def layer(self, layer: int) -> Attend:
        """The function that layer number `layer` calls with the queries, keys and values of the pass's rows."""
        ...


class NativeAttention:
    """A pass's attention by the native kernel. It tells the kernel for each row its slot, its index there, how many of the slot's first
    rows it sees, and which others."""

    rows: native.RowPlan
    meeting: native.Meeting | None = None  # where states meet, if keys are sharded

    def __init__(self, cache: KVCache, segments: Sequence[Segment], lses: list[Tensor] | None = None) -> None:
        self.cache, self.lses = cache, lses
        self.plans: dict[tuple[int, int, int], native.Plan] = {}
        slots, places, prefixes, counts, others = [], [], [], [0], []
        for segment in segments:
            length = cache.lengths[segment.slot]
            assert length + segment.count <= cache.capacity, (
                f"slot {segment.slot} holds {cache.capacity} rows, {length + segment.count} wanted"
            )
            slots += [segment.slot] * segment.count
            places += range(length, length + segment.count)
            if segment.mask is None:
                prefixes += range(length + 1, length + segment.count + 1)
                counts += [0] * segment.count
            else:
                seen = segment.mask.numpy()
                free = length - (seen.shape[1] - segment.count)
                prefixes += [free] * segment.count
                counts += seen.sum(1).tolist()
                others += (seen.nonzero()[1] + free).tolist()
        home, place, prefix, start, other = int64s(slots, places, prefixes, list(itertools.accumulate(counts)), others)
        self.rows = native.RowPlan(home, place, home, prefix, start, other)

    def plan(self, heads: int, kv_heads: int, stride: int) -> native.Plan:
        """The kernel's plan of this pass; the same for every layer of a model."""
        key = (heads, kv_heads, stride)
        if key not in self.plans:
            self.plans[key] = self.rows.shape(*key, self.cache.keys[0])
        return self.plans[key]

    def stages(self, layers: int, qkv: Tensor) -> Iterator[tuple[int, int]]:
        """The phases of this many layers that the kernel does one after another, as (first, last); -1: the end. What must happen between
        two stages happens when the next one is asked for. `qkv` [N, ..]: where the kernel leaves a layer's queries, keys and values."""
        yield 0, -1

    def layer(self, layer: int) -> Attend:
        keys, values = self.cache.keys[layer], self.cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            lse = None
            if self.lses is not None:
                lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cpu")
                self.lses.append(lse)
            return native.attention(q, k, v, keys, values, self.rows, lse)

        return attend


def int64s(*columns: Sequence[int]) -> tuple[Tensor, ...]:
    """Columns of numbers as int64, cut from one tensor: making many small ones takes longer."""
    whole = torch.tensor([*itertools.chain(*columns)], dtype=torch.int64, device="cpu")
    return whole.split([len(column) for column in columns])


def grouped_attention(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of n rows over t keys, [n, q * d]. The query heads of a group are folded into the row axis (measured 7x faster in decode),
    so `bias` [groups * n, t] has a row for each of them."""
    n, heads, d = q_nqd.shape
    kv_heads = k_ktd.shape[0]
    folded = q_nqd.view(n, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, d)
    out = F.scaled_dot_product_attention(folded, k_ktd[None], v_ktd[None], attn_mask=bias)
    return out.view(kv_heads, heads // kv_heads, n, d).permute(2, 0, 1, 3).reshape(n, heads * d)


def attention_with_lse(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, seen_nt: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention [n, q * d] as in `grouped_attention`, and the log-sum-exps [n, q] of its scores. With these, results over parts of the keys
    can be merged: out = sum of e^lse_i out_i. `seen_nt`: which keys a row sees; None: all."""
    groups = q_nqd.shape[1] // k_ktd.shape[0]
    keys, values = k_ktd.repeat_interleave(groups, 0), v_ktd.repeat_interleave(groups, 0)
    scores = torch.einsum("nqd,qtd->nqt", q_nqd, keys) * q_nqd.shape[-1] ** -0.5
    if seen_nt is not None:
        scores = scores.masked_fill(~seen_nt[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)  # a row that sees none of these keys: out 0, lse -inf, so it merges as nothing
    return torch.einsum("nqt,qtd->nqd", (scores - shift[..., None]).exp(), values).flatten(1), lse
