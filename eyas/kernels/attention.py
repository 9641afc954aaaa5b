"""Attention of rows over given keys and values: PyTorch's product with the heads of a group folded, and the native kernel's.

The kernel computes row by row, in an order that does not depend on the pass's other rows. Knows keys, values and which rows see which;
knows nothing of layers, tokens or trees.

Axes: N rows, q/k heads, d head width, t keys.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
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

    flat: array[int] | None = None  # what `rows` is made of, where keys are not sharded
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
            if segment.sight is None:
                prefixes += range(length + 1, length + segment.count + 1)
                counts += [0] * segment.count
                continue
            if isinstance(segment.sight, Tensor):
                mask = segment.sight.numpy()
                columns, seen = mask.shape[1], [row.nonzero()[0].tolist() for row in mask]
            else:
                columns, seen = segment.sight.columns, segment.sight.seen
            free = length - (columns - segment.count)
            prefixes += [free] * segment.count
            counts += [len(row) for row in seen]
            others += [free + column for row in seen for column in row]
        self.flat = array("q", [*slots, *places, *prefixes, *itertools.accumulate(counts), *others])
        self.sizes = [len(slots)] * 3 + [len(counts), len(others)]

    @cached_property
    def rows(self) -> native.RowPlan:
        """Which row sees which, as tensors; one layer at a time is given these."""
        assert self.flat is not None
        home, place, prefix, start, other = torch.frombuffer(self.flat, dtype=torch.int64).split(self.sizes)
        return native.RowPlan(home, place, home, prefix, start, other)

    def plan(self, heads: int, kv_heads: int, stride: int) -> native.Plan:
        """The kernel's plan of this pass; the same for every layer of a model."""
        key = (heads, kv_heads, stride)
        if key not in self.plans:
            keys = self.cache.keys
            self.plans[key] = self.rows.shape(*key, keys) if self.flat is None else native.row_plan(self.flat, self.sizes, *key, keys)
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


def folded(q_nqd: Tensor, kv_heads: int, sequences: int = 1) -> Tensor:
    """The query heads of a group in the row axis [sequences, kv_heads, groups * n, d], n rows a sequence: measured 7x faster in decode."""
    rows, heads, d = q_nqd.shape
    apart = q_nqd.view(sequences, rows // sequences, kv_heads, heads // kv_heads, d)
    return apart.permute(0, 2, 3, 1, 4).reshape(sequences, kv_heads, -1, d)


def grouped_attention(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of n rows over t keys, [n, q * d]. The query heads of a group are folded into the row axis, so `bias` [groups * n, t] has
    a row for each of them."""
    return attention_of_each(q_nqd, k_ktd[None], v_ktd[None], bias)


def attention_of_each(q_nqd: Tensor, k_bktd: Tensor, v_bktd: Tensor, bias: Tensor | None) -> Tensor:
    """The same of b sequences with keys of their own, each with as many of the n rows; `bias` [b, 1, groups * n / b, t]."""
    n, heads, d = q_nqd.shape
    b, kv_heads, _, _ = k_bktd.shape
    out = F.scaled_dot_product_attention(folded(q_nqd, kv_heads, b), k_bktd, v_bktd, attn_mask=bias)
    return out.view(b, kv_heads, heads // kv_heads, n // b, d).permute(0, 3, 1, 2, 4).reshape(n, heads * d)


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


def parted_attention(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, bias_t: Tensor | None = None, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Attention of all rows over each of `parts` equal parts of the keys [parts, n, q, d], and log-sum-exps [parts, n, q], in float32
    (float64 in float64), by a kernel of PyTorch's that hands out both. `attention_with_lse` is its plain twin.

    `bias_t`, 0 or -inf, is added to the scores of every row; each part must leave a key to see. Many parts let few queries over long keys
    fill a card, where one kernel over all keys would use a few of its processors.
    """
    n, heads, d = q_nqd.shape
    kv_heads, t, _ = k_ktd.shape
    k, v = (each.unflatten(1, (parts, t // parts)).transpose(0, 1) for each in (k_ktd, v_ktd))
    wide = torch.float64 if q_nqd.dtype == torch.float64 else torch.float32
    if q_nqd.device.type != "cpu" and (wide == torch.float64 or d % 8):  # no kernel on CUDA takes these
        seen = None if bias_t is None else (bias_t == 0).view(parts, 1, t // parts).expand(-1, n, -1)
        each = [
            attention_with_lse(q_nqd.to(wide), k[part].to(wide), v[part].to(wide), None if seen is None else seen[part])
            for part in range(parts)
        ]
        return torch.stack([out.view(n, heads, d) for out, _ in each]), torch.stack([lse for _, lse in each])
    q, groups = folded(q_nqd, kv_heads).expand(parts, -1, -1, -1), heads // kv_heads
    bias = None if bias_t is None else bias_t.view(parts, 1, 1, t // parts).expand(-1, kv_heads, groups * n, -1)
    out, lse = library_attention(q, k, v, bias)
    out = out.reshape(parts, kv_heads, groups, n, d).permute(0, 3, 1, 2, 4).reshape(parts, n, heads, d)
    return out.to(wide), lse.reshape(parts, kv_heads, groups, n).permute(0, 3, 1, 2).reshape(parts, n, heads)


def library_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention [b, h, m, d] of q [b, h, m, d] over k and v [b, h, t, d], and log-sum-exps [b, h, m]. `bias`: [b, h, m, t] or None.

    On CUDA the flash kernel where it can be had: it splits long keys by itself, knows 16 bits alone and takes no bias. Else the
    memory-efficient one.
    """
    aten, scale = torch.ops.aten, q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if bias is None and flashes(q):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]  # it pads them to a multiple of 32


def flashes(q: Tensor) -> bool:
    """Whether a card has the flash kernel for such queries."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)
