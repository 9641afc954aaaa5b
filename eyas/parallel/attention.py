"""A pass's attention over sharded keys: each process's states of its shards, one message a layer, and their meeting.

Knows a sharded cache's views, states and the processes; knows nothing of what rows mean. With one process nothing is sent.

Axes: R rows of the pass, H query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import Attend, NativeAttention, PassAttention, attention_with_lse
from eyas.model.rows import Segment
from eyas.parallel.cache import ShardedCache, row_plan, seen_mask
from eyas.parallel.schedules import Exchange, NativeJoin, in_shares
from eyas.parallel.states import State, empty


class ShardedAttention(NativeAttention):
    """By the native kernel: layers run in one call with one process, and with several up to where states meet."""

    def __init__(self, cache: ShardedCache, segments: Sequence[Segment], exchange: Exchange) -> None:
        self.exchange, self.counts = exchange, [segment.count for segment in segments]
        self.views = [cache.view(segment) for segment in segments]
        self.cache, self.lses, self.plans = cache.inner, None, {}
        self.rows = row_plan(self.views, self.counts, cache.layout.shards)
        self.meeting: native.Meeting | None = None

    def plan(self, heads: int, kv_heads: int, stride: int) -> native.Plan:
        if self.meeting is None:
            self.prepare(heads, self.cache.keys.shape[-1])
        return super().plan(heads, kv_heads, stride)

    def prepare(self, heads: int, width: int) -> None:
        """Make room for the states of a layer."""
        exchange, rows, views = self.exchange, sum(self.counts), len(self.rows.slot)
        alone, state = exchange.peers.count == 1, (rows, heads, width + 1)
        self.schedule = exchange.schedule(4 * rows * heads * (width + 1))
        self.out, self.lse = torch.empty(views, heads, width), torch.empty(views, heads)
        self.sent = torch.full((0 if alone else exchange.most, *state), float("-inf"))
        own, everyone = ([], []) if alone else (exchange.own, self.schedule.subtrees)
        self.received = torch.empty(len(everyone), *state)
        self.low, self.size, self.shard = (
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in ([low for low, _ in own], [size for _, size in own], [low for low, _ in everyone])
        )
        self.meeting = native.Meeting(
            *(part.data_ptr() for part in (self.out, self.lse)),
            len(own),
            *(part.data_ptr() for part in (self.low, self.size, self.sent)),
            len(everyone),
            *(part.data_ptr() for part in (self.shard, self.received)),
        )

    def stages(self, layers: int, qkv: Tensor) -> Iterator[tuple[int, int]]:
        if self.exchange.peers.count == 1:
            yield 0, -1
            return
        begin, phases, joined, join = 0, native.library().eyas_phases(), native.library().eyas_joined(), NativeJoin(self.exchange.shards)
        for layer in range(layers):
            yield begin, layer * phases + joined
            self.received.copy_(self.schedule.carry(self.sent, join))
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
                of_view = states[first : first + count * len(view.slots)].view(count, len(view.slots), H, d + 1)
                for number, shard in enumerate(view.shards):
                    known.setdefault((shard, 1), nothing.clone())[start : start + count] = of_view[:, number]
                start, first = start + count, first + count * len(view.slots)
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

    def prepare(self, heads: int, width: int) -> None:
        exchange, own, rows = self.exchange, self.exchange.own, self.mine.stop - self.mine.start
        level = exchange.schedules["gather"].levels[0]
        self.level, self.heads = level, heads
        self.sent = torch.full((exchange.most, sum(self.counts), heads, width + 1), float("-inf"))
        self.received = torch.empty(len(level.given), rows, heads, width + 1)
        self.wanted = torch.tensor([low for low, _ in own]), torch.tensor([size for _, size in own])
        self.shard = torch.tensor([low for low, _ in level.given])
        self.meeting = native.Meeting(
            None, None, len(own), None, None, None, len(level.given), self.shard.data_ptr(), self.received.data_ptr()
        )
        nothing, none = torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        self.all, home = self.rows, torch.full((rows,), -1)  # their keys are written with all the others
        self.rows = native.RowPlan(home, nothing[1:], none, none, nothing[:1], none, none, none, nothing, self.exchange.shards)

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
        q, k, v = (part.unflatten(1, (-1, d)) for part in unpacked(everyone, widths))
        lse = torch.empty(len(self.all.slot), heads)
        out = native.attention(q, k, v, keys, values, self.all, lse)
        native.joined_views(self.all, out, lse, self.wanted, self.sent)
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
        self.cache = cache.inner

    def layer(self, layer: int) -> Attend:
        keys, values = self.cache.keys[layer], self.cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            R, H, d = q.shape
            nothing, known, start = empty(R, H, d, q), dict[tuple[int, int], State](), 0
            for view, count in zip(self.views, self.counts, strict=True):
                rows = slice(start, start + count)
                for number, (slot, shard) in enumerate(zip(view.slots, view.shards, strict=True)):
                    held, mine = view.held[number], view.rows[number]
                    end = held + len(mine)
                    keys[slot, :, held:end], values[slot, :, held:end] = (each[rows][mine].transpose(0, 1) for each in (k, v))
                    seen = seen_mask(view, number, count).to(q.device)
                    out, lse = attention_with_lse(q[rows], keys[slot, :, :end], values[slot, :, :end], seen)
                    state = torch.cat([out.view(count, H, d), lse[..., None]], -1)
                    known.setdefault((shard, 1), nothing.clone())[rows] = state
                start += count
            return self.exchange.joined(known, nothing)[..., :d].reshape(R, H * d)

        return attend


def attention_over(exchange: Exchange, cache: ShardedCache, segments: Sequence[Segment], group: int) -> PassAttention:
    return (ShardedAttention if native.attends(cache.keys) else PlainShardedAttention)(cache, segments, exchange)
