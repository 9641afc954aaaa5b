"""A process's keys taken together: a state over all its committed keys, one over this pass's rows that lie here, one message a layer.

So it is on CUDA, where a state a shard would be many small kernels. A kernel of PyTorch's hands out the log-sum-exps of committed keys, all
of which every row of a pass sees; the pass's own rows, of which a row sees its ancestors, are few and are computed plainly. Which states
meet depends on the number of processes, so texts are equal up to rounding, as texts on CUDA are anyway. On a CPU the same code runs, for
tests. Knows a sharded cache and the processes; knows nothing of what rows mean.

Axes: R rows of the pass, H query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as remembered
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eyas.kernels import captured
from eyas.kernels.attention import Attend, attention_with_lse, parted_attention
from eyas.model.cache import KVCache, Slabs
from eyas.model.mask import causal_mask
from eyas.model.rows import Segment
from eyas.parallel.cache import SPARE, ShardedCache, View
from eyas.parallel.layout import Layout
from eyas.parallel.schedules import Exchange, Subtree
from eyas.parallel.states import State, empty, merged

PART = 1024  # keys of a part are a multiple of these
MOST = 32  # parts
BLOCKS = 256  # of a kernel, about two for each processor of a large card; it has one for each part, key head and 64 rows of its query heads


class TogetherCache(ShardedCache):
    """A process's keys for passes that take them together; from a pool, one sequence's passes run in fixed shapes. Caches of all processes
    have equal slabs and windows, whoever has most keys, so that all make and replay the same graphs."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int,
        capacity: int,
        kind: tuple[torch.dtype, torch.device],
        layout: Layout,
        exchange: Exchange,
        inner: KVCache | None = None,
    ) -> None:
        """`inner`: where keys are to lie, of at least `room(layout, processes, capacity)` rows."""
        self.exchange, peers = exchange, exchange.peers
        self.given: KVCache | None = inner or KVCache(shape[0], slots, room(layout, peers.count, capacity), *shape[1:], *kind)
        super().__init__(shape, slots, capacity, kind, layout, layout.range_of(peers.rank, peers.count), attention_together)

    def made(self, room: int) -> KVCache:
        given, self.given = self.given, None
        return given or super().made(room)

    def release(self) -> None:
        self.inner.release()

    def most(self, length: int) -> int:
        """Rows of a text of this length in the process that has most of them."""
        return most(self.layout, self.exchange.peers.count, length)

    def view(self, segment: Segment) -> View:
        length, count = self.lengths[segment.slot], segment.count
        self.make_room(self.most(length + count) if segment.mask is None else self.most(length) + count)
        return super().view(segment)

    def fixed(self, segment: Segment, rows: int, group: int) -> captured.Fixed:
        """How a segment's rows lie in a pass of `rows` in fixed shapes."""
        spare, window = self.inner.capacity, captured.window_of(self.most(self.lengths[segment.slot]), self.inner.capacity + 1)
        part = here(self, segment, 0)
        places, seen = torch.full((rows,), spare), torch.zeros(rows, rows, dtype=torch.bool)  # rows that pad see nothing
        places[part.own] = part.held + torch.arange(len(part.own))
        seen[: segment.count, part.own] = part.seen
        attention = partial(FixedTogetherAttention, window=window, group=group, exchange=self.exchange)
        return captured.Fixed(window, places, (torch.tensor(part.held), seen), attention)


def most(layout: Layout, count: int, length: int) -> int:
    """Rows of a text of `length` in that of `count` processes which has most of them."""
    held = layout.rows_of(np.array(length), begins(layout))
    return int(np.add.reduceat(held, [layout.range_of(rank, count)[0] for rank in range(count)]).max())


@remembered
def begins(layout: Layout) -> np.ndarray:
    """By shard: where its first block begins in a text."""
    return np.array([layout.mirrored(shard) * layout.block for shard in range(layout.shards)])


def room(layout: Layout, count: int, capacity: int) -> int:
    """Rows of a slot for texts of `capacity`."""
    return most(layout, count, capacity) + SPARE


def attention_together(cache: ShardedCache, segments: Sequence[Segment], group: int) -> TogetherAttention:
    assert isinstance(cache, TogetherCache)
    return TogetherAttention(cache, segments)


def own_state(q_RHd: Tensor, k_nkd: Tensor, v_nkd: Tensor, seen_Rn: Tensor) -> State:
    """The state [R, H, d + 1] over n rows of this pass, at least float32."""
    wide = torch.promote_types(q_RHd.dtype, torch.float32)
    out, lse = attention_with_lse(q_RHd.to(wide), k_nkd.transpose(0, 1).to(wide), v_nkd.transpose(0, 1).to(wide), seen_Rn)
    return torch.cat([out.view(q_RHd.shape), lse[..., None]], -1)


def whole(exchange: Exchange, mine: Sequence[State], like: Tensor) -> Tensor:
    """The output [R, H * d] over all keys, from this process's states over parts of its keys."""
    state = merged(torch.stack([*mine]))
    if exchange.peers.count > 1:
        states = exchange.schedule(state.nbytes).carry(state[None], at_once)
        state = merged(states) if len(states) > 1 else states[0]
    return state[..., :-1].flatten(1).to(like.dtype)


def at_once(states: Tensor, given: Sequence[Subtree], wanted: Sequence[Subtree]) -> Tensor:
    """States [n, ..] of processes or nodes as the one [1, ..] of all of them."""
    assert len(wanted) == 1, "processes of a node are neighbours"
    return merged(states)[None]


class Here(NamedTuple):
    """What of one segment's rows and their keys lies in this process."""

    rows: slice  # of the pass
    slot: int  # of the inner cache
    held: int  # committed keys
    own: Tensor  # [n] int64: which of the segment's rows have their key here
    seen: Tensor  # bool [R, n]: which rows see which of these

    def on(self, device: torch.device) -> Here:
        return self._replace(own=self.own.to(device), seen=self.seen.to(device))


def here(cache: TogetherCache, segment: Segment, start: int) -> Here:
    """`start`: the segment's first row in the pass."""
    view, among = cache.view(segment), causal_mask(segment.count) if segment.mask is None else segment.mask
    own = torch.from_numpy(view.rows)
    return Here(slice(start, start + segment.count), view.slot, view.held, own, among[:, own])


class TogetherAttention:
    """A pass of any shape, kernel after kernel."""

    def __init__(self, cache: TogetherCache, segments: Sequence[Segment]) -> None:
        self.exchange, self.parts, start = cache.exchange, list[Here](), 0
        for segment in segments:
            self.parts.append(here(cache, segment, start).on(cache.keys.device))
            start += segment.count
        self.cache = cache.inner

    def layer(self, layer: int) -> Attend:
        keys, values = self.cache.keys[layer], self.cache.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            R, H, d = q.shape
            wide = torch.promote_types(q.dtype, torch.float32)
            committed, own = (empty(R, H, d, torch.empty(0, dtype=wide, device=q.device)) for _ in range(2))
            for rows, slot, held, mine, seen in self.parts:
                k_mine, v_mine, end = k[rows][mine], v[rows][mine], held + len(mine)
                keys[slot, :, held:end], values[slot, :, held:end] = k_mine.transpose(0, 1), v_mine.transpose(0, 1)
                if held:
                    out, lse = parted_attention(q[rows], keys[slot, :, :held], values[slot, :, :held])
                    committed[rows] = torch.cat([out[0], lse[0, ..., None]], -1)
                if len(mine):
                    own[rows] = own_state(q[rows], k_mine, v_mine, seen)
            return whole(self.exchange, (committed, own), q)

        return attend


class FixedTogetherAttention:
    """One sequence's pass in fixed shapes: the first `window` keys of its slab, of which `held` are committed."""

    def __init__(
        self, slabs: Slabs, places_R: Tensor, held: Tensor, seen_RR: Tensor, *, window: int, group: int, exchange: Exchange
    ) -> None:
        """`places_R`: where each row's key goes; `held`: int64, without axes; `seen_RR`: which rows see which of those that lie here."""
        self.slabs, self.exchange, self.places, self.seen, self.window = slabs, exchange, places_R, seen_RR, window
        self.parts = parts_of(window, slabs.keys.shape[2] * -(-group * len(places_R) // 64))
        numbers = torch.arange(window, device=held.device)
        bias = torch.zeros(window, dtype=slabs.keys.dtype, device=held.device).masked_fill_(numbers >= held, float("-inf"))
        bias[:: window // self.parts] = 0.0  # a part without any key would have no softmax; its log-sum-exp is overwritten
        self.bias, self.empty = bias, (numbers[:: window // self.parts] >= held)[:, None, None]

    def layer(self, layer: int) -> Attend:
        keys, values = self.slabs.keys[layer, 0], self.slabs.values[layer, 0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.index_copy_(1, self.places, k.transpose(0, 1))
            values.index_copy_(1, self.places, v.transpose(0, 1))
            out, lse = parted_attention(q, keys[:, : self.window], values[:, : self.window], self.bias, self.parts)
            committed = torch.cat([out, lse.masked_fill(self.empty, float("-inf"))[..., None]], -1)
            return whole(self.exchange, (*committed, own_state(q, k, v, self.seen)), q)

        return attend


def parts_of(window: int, blocks: int) -> int:
    """In how many equal parts a window's keys are read by a kernel that has so many blocks for each part."""
    return max(parts for parts in range(1, max(1, min(MOST, BLOCKS // blocks)) + 1) if parts == 1 or window % (parts * PART) == 0)


def roomy(rows: int) -> int:
    """At least `rows` rows of a slab, such that with its spare row it falls into 16 equal parts or more, where it is long. At most a
    sixteenth more."""
    step = max(captured.WINDOW, 1 << max(0, (rows // 16).bit_length() - 1))
    return -(-(rows + 1) // step) * step - 1
