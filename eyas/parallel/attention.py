"""A pass's attention over sharded keys: each process's states of its shards, one message a layer, and their meeting.

Knows a sharded cache's views, states and the processes; knows nothing of what rows mean. With one process nothing is sent.

Axes: R rows of the pass, H query heads, d head width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import Attend, NativeAttention, PassAttention, attention_with_lse
from eyas.model.rows import Segment
from eyas.parallel.cache import ShardedCache, keys_seen, row_plan
from eyas.parallel.schedules import Exchange, NativeJoin, Subtree, in_shares
from eyas.parallel.states import State, empty

ROWS = 16  # of a pass, which look at a shard's keys one after the other, so that these come from memory once; the kernel takes no more
TASKS = 32  # of a layer's attention at least, where that can be: fewer leave threads without work at its end
FEW = 4  # rows up to which keys are read in the order in which they lie, since little else hides the time that this takes


class ShardedAttention(NativeAttention):
    """By the native kernel: layers run in one call with one process, and with several up to where states meet."""

    def __init__(self, cache: ShardedCache, segments: Sequence[Segment], exchange: Exchange) -> None:
        self.exchange, self.counts = exchange, [segment.count for segment in segments]
        self.views = [cache.view(segment) for segment in segments]
        self.cache, self.lses, self.plans = cache.inner, None, {}
        self.layout, self.rows = cache.layout, row_plan(self.views, self.counts, cache)
        self.meeting: native.Meeting | None = None

    def plan(self, heads: int, kv_heads: int, stride: int) -> native.Plan:
        if self.meeting is None:
            self.prepare(heads, kv_heads, self.cache.keys.shape[-1])
        return super().plan(heads, kv_heads, stride)

    def prepare(self, heads: int, kv_heads: int, width: int) -> None:
        """Make room for the states of a layer."""
        exchange, rows = self.exchange, sum(self.counts)
        alone, state = exchange.peers.count == 1, (rows, heads, width + 1)
        self.schedule = exchange.schedule(4 * rows * heads * (width + 1))
        own, everyone = ([], []) if alone else (exchange.own, self.schedule.subtrees)
        self.sent = torch.full((0 if alone else exchange.most, *state), float("-inf"))
        self.received, self.shard = torch.empty(len(everyone), *state), torch.tensor([low for low, _ in everyone], dtype=torch.int64)
        self.meeting = native.Meeting(*self.looking(kv_heads, state, own), len(everyone), self.shard.data_ptr(), self.received.data_ptr())

    def looking(self, kv_heads: int, state: tuple[int, int, int], own: list[Subtree]) -> tuple[Any, ...]:
        """The kernel's facts of how attention leaves this process's states, in `sent`; of one process, which has all, `own` is empty."""
        pieces, order, block = self.pieces(kv_heads)
        self.states = self.sent if pieces == own else torch.empty(len(pieces), *state)
        lows_and_sizes = ([part[end] for part in parts] for parts in (pieces, own) for end in (0, 1))
        self.numbers = [torch.tensor(each, dtype=torch.int64) for each in (*lows_and_sizes, order)]
        piece, piece_size, low, size, in_turn = (each.data_ptr() for each in self.numbers)
        return len(pieces), piece, piece_size, in_turn, block, self.states.data_ptr(), len(own), low, size, self.sent.data_ptr()

    def pieces(self, kv_heads: int) -> tuple[list[Subtree], list[int], int]:
        """The subtrees of shards that tasks look at, ascending, the order in which they are taken, and how many rows of the pass a task
        has. No bit depends on them."""
        exchange, rows = self.exchange, sum(self.counts)
        there = sorted({int(shard) for view in self.views for shard in view.shards})
        if rows <= FEW:
            found = [(shard, 1) for shard in there]
        else:
            most = 1 << max(0, (exchange.shards * kv_heads * -(-rows // ROWS) // TASKS).bit_length() - 1)
            parts = [part for low, size in exchange.own for part in self.layout.subtrees(low, low + size, most)]
            found = [(low, size) for low, size in parts if bisect_left(there, low) < bisect_left(there, low + size)]
        block = ROWS
        while block > FEW and kv_heads * len(found) * -(-rows // block) < TASKS:
            block //= 2
        return found, sorted(range(len(found)), key=lambda place: self.layout.mirrored(found[place][0])), block

    def stages(self, layers: int, qkv: Tensor) -> Iterator[tuple[int, int]]:
        if self.exchange.peers.count == 1:
            yield 0, -1
            return
        begin, phases, joined, join = 0, native.library().eyas_phases(), native.library().eyas_joined(), NativeJoin(self.exchange.shards)
        for layer in range(layers):
            yield begin, layer * phases + joined
            self.received.copy_(self.schedule.carry(self.sent, join, layer + 1 < layers))
            begin = layer * phases + joined
        yield begin, -1

    def layer(self, layer: int) -> Attend:
        keys, values = self.cache.keys[layer], self.cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            R, H, d = q.shape
            lse = torch.empty(len(self.rows.slot), H)
            out = native.attention(q, k, v, keys, values, self.rows, lse).float()
            states = torch.cat([out.view(-1, H, d), lse[..., None]], -1)
            nothing, known, start, first = empty(R, H, d, states), dict[tuple[int, int], State](), 0, 0
            for view, count in zip(self.views, self.counts, strict=True):
                of_view = states[first : first + count * len(view.shards)].view(count, len(view.shards), H, d + 1)
                for number, shard in enumerate(view.shards):
                    known.setdefault((int(shard), 1), nothing.clone())[start : start + count] = of_view[:, number]
                start, first = start + count, first + count * len(view.shards)
            return self.exchange.joined(known, nothing)[..., :d].reshape(R, H * d).to(q.dtype)

        return attend


class SharedOutAttention(ShardedAttention):
    """Rows of one text in equal shares: each process computes the layers of its share alone. Queries, keys and values of all rows go to all
    processes, each attends over its shards for all rows, and the states go back to the rows' own processes: two messages a layer, and every
    sum is that of rows computed everywhere."""

    def __init__(self, cache: ShardedCache, segment: Segment, exchange: Exchange) -> None:
        super().__init__(cache, [segment], exchange)
        peers = exchange.peers
        self.share = -(-segment.count // peers.count)
        self.mine = slice(peers.rank * self.share, min((peers.rank + 1) * self.share, segment.count))

    def prepare(self, heads: int, kv_heads: int, width: int) -> None:
        exchange, rows = self.exchange, self.mine.stop - self.mine.start
        level, state = exchange.schedules["gather"].levels[0], (sum(self.counts), heads, width + 1)
        self.level, self.heads = level, heads
        self.sent = torch.full((exchange.most, *state), float("-inf"))
        self.look = native.Meeting(*self.looking(kv_heads, state, exchange.own), 0, None, None)
        self.received = torch.empty(len(level.given), rows, heads, width + 1)
        self.shard = torch.tensor([low for low, _ in level.given])
        nothing = [0, None, None, None, 0, None, len(exchange.own), None, None, None]  # attention is not the layers' here
        self.meeting = native.Meeting(*nothing, len(level.given), self.shard.data_ptr(), self.received.data_ptr())
        zeros, none = torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self.all, home = self.rows, torch.full((rows,), -1)  # their keys are written with all the others
        self.rows = native.RowPlan(home, zeros[1:], none, none, zeros[:1], none, none, none, none, zeros, self.exchange.shards)

    def stages(self, layers: int, qkv: Tensor) -> Iterator[tuple[int, int]]:
        begin, library = 0, native.library()
        phases, turned, joined = library.eyas_phases(), library.eyas_turned(), library.eyas_joined()
        for layer in range(layers):
            yield begin, layer * phases + turned
            self.attend(qkv, self.cache.keys[layer], self.cache.values[layer])
            begin = layer * phases + joined
        yield begin, -1

    def attend(self, qkv: Tensor, keys: Tensor, values: Tensor) -> None:
        """Let the states of this process's rows lie where the kernel takes them."""
        heads, kv_heads, d, peers = self.heads, keys.shape[1], keys.shape[-1], self.exchange.peers
        q, k, v, _ = qkv.split([heads * d, kv_heads * d, kv_heads * d, qkv.shape[1] - (heads + 2 * kv_heads) * d], 1)
        sent = packed([q, k.to(keys.dtype), v.to(keys.dtype)], self.share)  # keys and values as the cache rounds them
        everyone = peers.gather(sent, "queries").flatten(0, 1)[: sum(self.counts)]
        widths = [(heads * d, torch.float32), (kv_heads * d, keys.dtype), (kv_heads * d, keys.dtype)]
        rows = torch.cat([part.float().unflatten(1, (-1, d)) for part in unpacked(everyone, widths)], 1)
        native.attend(rows, heads, keys, values, self.all, meeting=self.look, kept=self)
        states = self.level.picked(peers.scatter(in_shares(self.sent, peers.count), "states").flatten(0, 1))
        self.received.copy_(states[:, : self.received.shape[1]])


def packed(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Rows [R, ..] of several number formats side by side as bytes [rows, ..], filled up."""
    together = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
    return F.pad(together, (0, 0, 0, rows - len(together)))


def unpacked(rows: Tensor, widths: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The parts of `packed` rows, of these widths and number formats."""
    parts = rows.split([width * dtype.itemsize for width, dtype in widths], 1)
    return [part.contiguous().view(dtype) for part, (_, dtype) in zip(parts, widths, strict=True)]


class PlainShardedAttention:
    """In PyTorch's own operations: float64, weights that the kernel cannot hold, other devices."""

    def __init__(self, cache: ShardedCache, segments: Sequence[Segment], exchange: Exchange) -> None:
        self.exchange, self.counts = exchange, [segment.count for segment in segments]
        self.views = [cache.view(segment) for segment in segments]
        self.sharded, self.cache = cache, cache.inner

    def layer(self, layer: int) -> Attend:
        keys, values = self.cache.keys[layer], self.cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            R, H, d = q.shape
            nothing, known, start = empty(R, H, d, q), dict[tuple[int, int], State](), 0
            for view, count in zip(self.views, self.counts, strict=True):
                rows, slot, end = slice(start, start + count), view.slot, view.held + len(view.rows)
                keys[slot, :, view.held : end], values[slot, :, view.held : end] = (
                    each[rows][view.rows].transpose(0, 1) for each in (k, v)
                )
                for shard, *told in keys_seen(view, self.sharded):
                    places, seen = (each.to(q.device) for each in told)
                    out, lse = attention_with_lse(q[rows], keys[slot].index_select(1, places), values[slot].index_select(1, places), seen)
                    state = torch.cat([out.view(count, H, d), lse[..., None]], -1)
                    known.setdefault((shard, 1), nothing.clone())[rows] = state
                start += count
            return self.exchange.joined(known, nothing)[..., :d].reshape(R, H * d)

        return attend


def attention_over(exchange: Exchange, cache: ShardedCache, segments: Sequence[Segment], group: int) -> PassAttention:
    return (ShardedAttention if native.attends(cache.keys) else PlainShardedAttention)(cache, segments, exchange)
