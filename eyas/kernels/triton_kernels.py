"""Triton kernels for passes of few rows on a GPU: what lies between a layer's products, and attention over keys cut into parts.

A launch of a small kernel takes as long as reading a megabyte, and a layer written in PyTorch's operations has fifteen of them. Each kernel
has a plain twin, which fused.py names. Sums are in float32 whatever the tensors hold. Importing this needs Triton. Knows pointers and
strides; knows nothing of models.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def added_norm_kernel(x, added, weight, total, normed, width, eps, WIDTH: tl.constexpr):
    """Row by row: total = x + added, rounded; normed = total / rms(total) * weight."""
    row = tl.program_id(0)
    place = tl.arange(0, WIDTH)
    there = place < width
    at = row * width + place
    whole = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + tl.load(added + at, mask=there, other=0.0).to(tl.float32)
    rounded = whole.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=there)
    whole = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(whole * whole, 0) / width + eps)
    by = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + at, (whole * scale * by).to(normed.dtype.element_ty), mask=there)


@triton.jit
def uniforms_kernel(seeds, positions, out, count, PURPOSE: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Some numbers of a row: Philox-4x64 words in ten rounds, keyed by seed and position, their upper 52 bits and a half as float64."""
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counter = (block + 1).to(tl.uint64)
    stream, purpose = tl.full([BLOCK], STREAM, tl.uint64), tl.full([BLOCK], PURPOSE, tl.uint64)
    seed, position = tl.load(seeds + row).to(tl.uint64), tl.load(positions + row).to(tl.uint64)
    first, second, third, fourth = tl.philox_impl(counter, tl.zeros([BLOCK], tl.uint64), stream, purpose, seed, position, 10)
    to, place = out + row.to(tl.int64) * count, 4 * block
    tl.store(to + place, ((first >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16, mask=place < count)
    tl.store(to + place + 1, ((second >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16, mask=place + 1 < count)
    tl.store(to + place + 2, ((third >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16, mask=place + 2 < count)
    tl.store(to + place + 3, ((fourth >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16, mask=place + 3 < count)


@triton.jit
def gated_kernel(gate_up, out, inner, BLOCK: tl.constexpr):
    """out = silu(gate) * up, where a row holds gate and up side by side."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < inner
    gate = tl.load(gate_up + row * 2 * inner + place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * inner + place, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def turn_and_keep_kernel(
    heads,
    cos,
    sin,
    places,
    q_out,
    keys,
    values,
    rows,
    keys_of_head,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
):
    """One head of one row. A query head is turned and laid where its group's rows lie [k, group * rows, d]; a key head is turned and kept
    at the row's place [k, T, d]; a value head is kept."""
    row, head = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, TURNED // 2)
    at = heads + (row * (QUERY_HEADS + 2 * KEY_HEADS) + head) * WIDTH
    place = tl.load(places + row)
    GROUP: tl.constexpr = QUERY_HEADS // KEY_HEADS
    if head < QUERY_HEADS:
        to = q_out + ((head // GROUP) * GROUP * rows + (head % GROUP) * rows + row) * WIDTH
    elif head < QUERY_HEADS + KEY_HEADS:
        to = keys + (head - QUERY_HEADS) * keys_of_head + place * WIDTH
    else:
        to = values + (head - QUERY_HEADS - KEY_HEADS) * keys_of_head + place * WIDTH
    low = tl.load(at + half).to(tl.float32)
    high = tl.load(at + TURNED // 2 + half).to(tl.float32)
    if head < QUERY_HEADS + KEY_HEADS:
        cos_low, cos_high = tl.load(cos + row * TURNED + half), tl.load(cos + row * TURNED + TURNED // 2 + half)
        sin_low, sin_high = tl.load(sin + row * TURNED + half), tl.load(sin + row * TURNED + TURNED // 2 + half)
        turned_low = low * cos_low.to(tl.float32) - high * sin_low.to(tl.float32)
        turned_high = high * cos_high.to(tl.float32) + low * sin_high.to(tl.float32)
    else:
        turned_low, turned_high = low, high
    tl.store(to + half, turned_low.to(q_out.dtype.element_ty))
    tl.store(to + TURNED // 2 + half, turned_high.to(q_out.dtype.element_ty))
    if TURNED < WIDTH:
        rest = TURNED + tl.arange(0, WIDTH - TURNED)
        tl.store(to + rest, tl.load(at + rest))


@triton.jit
def attention_part_kernel(
    q,
    keys,
    values,
    seen,
    out,
    lse,
    rows,
    queries,
    window,
    keys_of_head,
    scale,
    part_keys,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some queries of a key head over one part of the keys: their attention within the part [parts, k, queries, d], and log-sum-exps."""
    head, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query = block * QUERIES + tl.arange(0, QUERIES)
    asked = query < queries
    d = tl.arange(0, WIDTH)
    q_tile = tl.load(q + (head * queries + query)[:, None] * WIDTH + d[None, :], mask=asked[:, None], other=0.0)
    most = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(0, part_keys, KEYS):
        place = part * part_keys + first + tl.arange(0, KEYS)
        there = place < window
        at = head * keys_of_head + place
        k_tile = tl.load(keys + at[None, :] * WIDTH + d[:, None], mask=there[None, :], other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        sees = tl.load(seen + (query % rows)[:, None] * window + place[None, :], mask=asked[:, None] & there[None, :], other=0)
        scores = tl.where(sees != 0, scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        shares = tl.where(sees != 0, tl.exp(scores - higher[:, None]), 0.0)
        fading = tl.exp(most - higher)
        v_tile = tl.load(values + at[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        mixed = mixed * fading[:, None] + tl.dot(shares.to(v_tile.dtype), v_tile, input_precision="ieee")
        total = total * fading + tl.sum(shares, 1)
        most = higher
    line = (part * tl.num_programs(0) + head) * queries + query
    tl.store(out + line[:, None] * WIDTH + d[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=asked[:, None])
    tl.store(lse + line, tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-30)), -1e30), mask=asked)


@triton.jit
def join_parts_kernel(out, lse, joined, rows, queries, parts, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """One query's parts as one, laid where its row and head lie [rows, q * d]."""
    head, query = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, WIDTH)
    most = -1e30
    for part in range(parts):
        most = tl.maximum(most, tl.load(lse + (part * KEY_HEADS + head) * queries + query))
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for part in range(parts):
        line = (part * KEY_HEADS + head) * queries + query
        weight = tl.exp(tl.load(lse + line) - most)
        total += weight
        mixed += weight * tl.load(out + line * WIDTH + d)
    GROUP: tl.constexpr = QUERY_HEADS // KEY_HEADS
    row, of_group = query % rows, query // rows
    to = joined + (row * QUERY_HEADS + head * GROUP + of_group) * WIDTH
    tl.store(to + d, (mixed / total).to(joined.dtype.element_ty))
