"""Passes of few rows on a GPU by kernels of our own, where Triton is there: each function here is one or two launches.

The plain twins stand beside them: `x + added` and RMSNorm, `silu(gate) * up`, `rotate` and the cache's own writing, `grouped_attention`,
`philox.words_on`.
Results differ by rounding alone: a fused one rounds once where PyTorch's operations round after each. Knows tensors; knows nothing of
models.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

ROWS = 64  # rows of a pass that counts as small: beyond it products take the time
OFF = "EYAS_PLAIN_KERNELS"  # set in the environment: PyTorch's operations alone
PART = 128  # keys of a part: shorter ones would be more work to join than to read
PROGRAMS = 264  # parts are cut until so many programs run at once: two for each processor of a large card
MOST_PARTS = 64


@cache
def available() -> bool:
    """Whether Triton can be imported, and nobody wants PyTorch's operations alone."""
    if os.environ.get(OFF):
        return False
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def kernel(name: str) -> Any:
    """A Triton kernel; importing them needs Triton."""
    from eyas.kernels import triton_kernels

    return getattr(triton_kernels, name)


def suits(x: Tensor) -> bool:
    """Whether rows [N, ..] of a pass are computed by these kernels: few, on a card, and nobody asks for gradients."""
    return x.is_cuda and x.shape[0] <= ROWS and x.dtype != torch.float64 and not torch.is_grad_enabled() and available()


def suits_heads(width: int, turned: int) -> bool:
    """Whether heads of this width, of which so many entries are turned, fit the kernels' tiles."""
    return width in (16, 32, 64, 128, 256) and turned > 1 and turned & (turned - 1) == 0 and (width - turned) & (width - turned - 1) == 0


def block_of(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def uniforms(seeds_N: Tensor, positions_N: Tensor, count: int, purpose: int, stream: int) -> Tensor:
    """The numbers of `philox.uniforms_on`, to the last bit."""
    out = torch.empty(len(seeds_N), count, dtype=torch.float64, device=seeds_N.device)
    block = min(256, block_of(-(-count // 4)))
    grid = (len(seeds_N), -(-count // (4 * block)))
    kernel("uniforms_kernel")[grid](seeds_N.contiguous(), positions_N.contiguous(), out, count, PURPOSE=purpose, STREAM=stream, BLOCK=block)
    return out


def added_norm(x_NH: Tensor, added_NH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its RMSNorm."""
    total, normed = torch.empty_like(x_NH), torch.empty_like(x_NH)
    rows, width = x_NH.shape
    x_NH, added_NH = x_NH.contiguous(), added_NH.contiguous()
    kernel("added_norm_kernel")[(rows,)](x_NH, added_NH, weight_H, total, normed, width, eps, WIDTH=block_of(width))
    return total, normed


def gated(gate_up_NI: Tensor) -> Tensor:
    """silu(gate) * up [N, I] of gate and up side by side [N, 2 I]."""
    rows, inner = gate_up_NI.shape[0], gate_up_NI.shape[1] // 2
    out, block = gate_up_NI.new_empty(rows, inner), 1024
    kernel("gated_kernel")[(rows, -(-inner // block))](gate_up_NI.contiguous(), out, inner, BLOCK=block)
    return out


def turned_and_kept(heads_NHd: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, places_N: Tensor) -> Tensor:
    """Turn queries and keys of these heads (queries, keys, values, before rotation), and keep keys and values [k, T, d] at the rows'
    places. Returns the queries of each key head's group, its heads one below another [k, group * N, d]."""
    rows, all_heads, width = heads_NHd.shape
    kv_heads = keys.shape[0]
    query_heads = all_heads - 2 * kv_heads
    cos, sin = (each.reshape(rows, -1).contiguous() for each in rotation)
    q = heads_NHd.new_empty(kv_heads, query_heads // kv_heads * rows, width)
    kernel("turn_and_keep_kernel")[(rows, all_heads)](
        heads_NHd.contiguous(),
        cos,
        sin,
        places_N,
        q,
        keys,
        values,
        rows,
        keys.stride(0),
        QUERY_HEADS=query_heads,
        KEY_HEADS=kv_heads,
        WIDTH=width,
        TURNED=cos.shape[1],
    )
    return q


def parts_of(window: int, programs: int) -> int:
    """Into how many parts the keys of a window are cut, where so many programs read each."""
    return max(1, min(window // PART, PROGRAMS // max(programs, 1), MOST_PARTS))


def attention(q_kmd: Tensor, keys: Tensor, values: Tensor, seen_RW: Tensor) -> Tensor:
    """Attention [R, q * d] of R rows over the first W keys of [k, T, d]. `q_kmd`: as `turned_and_kept` lays them; `seen_RW` bool: which
    keys a row sees, at least one each."""
    kv_heads, queries, width = q_kmd.shape
    rows, window = seen_RW.shape
    parts = parts_of(window, kv_heads)  # by the window alone, so that a row's sums do not hang on how many rows there are
    part_keys = -(-window // parts // 64) * 64
    parts = -(-window // part_keys)
    tile = min(64, max(16, block_of(queries)))
    out = torch.empty(parts, kv_heads, queries, width, dtype=torch.float32, device=q_kmd.device)
    lse = torch.empty(parts, kv_heads, queries, dtype=torch.float32, device=q_kmd.device)
    kernel("attention_part_kernel")[(kv_heads, -(-queries // tile), parts)](
        q_kmd,
        keys,
        values,
        seen_RW.view(torch.uint8),
        out,
        lse,
        rows,
        queries,
        window,
        keys.stride(0) // width,
        width**-0.5,
        part_keys,
        WIDTH=width,
        QUERIES=tile,
        KEYS=64 if width <= 128 else 32,
    )
    group = queries // rows
    joined = q_kmd.new_empty(rows, kv_heads * group * width)
    kernel("join_parts_kernel")[(kv_heads, queries)](
        out, lse, joined, rows, queries, parts, QUERY_HEADS=kv_heads * group, KEY_HEADS=kv_heads, WIDTH=width
    )
    return joined
