"""This process's part of the keys and values of sequences, and a pass's view of it.

To decoding it is a cache like any other: slots, lengths, `keep`. A row's key goes to the shard of the position that the row has, or would
have as text; it is there before the walk says which rows are kept, so keeping sends nothing. Knows a layout, a range of shards and rows;
knows nothing of messages between processes or of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import PassAttention
from eyas.model.cache import Cache, KVCache, Slabs
from eyas.model.mask import causal_mask
from eyas.model.rows import Segment
from eyas.parallel.layout import Layout

SPARE = 64  # rows of a shard beyond those of the text: a tree's rows at one position lie in one shard


class View(NamedTuple):
    """What one segment's R rows see of the shards held here."""

    slots: list[int]  # [P] slots of the inner cache, one for each shard that may hold a key that a row sees, ascending by shard
    shards: list[int]  # [P]
    held: list[int]  # [P] committed rows
    rows: list[list[int]]  # [P] which of the segment's rows have their key there, in order
    seen: np.ndarray | None  # bool [R, R]: which rows see which; None: causal


class ShardedCache(Cache):
    """Slots of a text's shards: shard i of sequence s is slot s * S + i of one KVCache, where S shards are held here."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int,
        capacity: int,
        kind: tuple[torch.dtype, torch.device],
        layout: Layout,
        held: tuple[int, int],
        attend: Callable[[ShardedCache, Sequence[Segment], int], PassAttention],
    ) -> None:
        """`shape`: layers, key heads and their width; `held`: the shards [low, high) of this process; `attend`: makes a pass's attention of
        this cache, its segments and the number of query heads that share a key head."""
        self.layout, self.low, self.high, self.attend = layout, *held, attend
        self.shape, self.kind = shape, kind
        self.lengths, self.capacity = [0] * slots, capacity
        room = max(layout.held(capacity, shard) for shard in range(*held)) + SPARE
        self.inner = self.made(room)
        self.tentative: dict[int, dict[int, list[int]]] = {}  # by slot: by shard's number here, the rows of the last pass with keys there
        self.told: list[tuple[str, int, list[int]]] = []  # what was done to it since it was last asked

    def made(self, room: int) -> KVCache:
        layers, kv_heads, width = self.shape
        return KVCache(layers, len(self.lengths) * self.count, room, kv_heads, width, *self.kind)

    @property
    def count(self) -> int:
        """How many shards are held here."""
        return self.high - self.low

    @property
    def slabs(self) -> Slabs:
        return self.inner.slabs

    @property
    def keys(self) -> Tensor:
        return self.inner.keys

    @property
    def values(self) -> Tensor:
        return self.inner.values

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        self.told.append(("keep", slot, list(rows)))
        for shard, mine in self.tentative.get(slot, {}).items():
            place = {row: index for index, row in enumerate(mine)}
            self.inner.keep(slot * self.count + shard, [place[row] for row in rows if row in place])
        self.lengths[slot] += len(rows)
        self.tentative.pop(slot, None)

    def cut(self, slot: int, length: int) -> None:
        self.told.append(("cut", slot, [length]))
        self.lengths[slot] = min(length, self.lengths[slot])
        for shard in range(self.count):
            self.inner.cut(slot * self.count + shard, self.layout.held(self.lengths[slot], self.low + shard))

    def clear(self, slot: int) -> None:
        self.cut(slot, 0)

    def copy_prefix(self, other: ShardedCache, source: int, slot: int, length: int) -> None:
        for shard in range(self.count):
            held = self.layout.held(length, self.low + shard)
            self.inner.copy_prefix(other.inner, source * self.count + shard, slot * self.count + shard, held)
        self.lengths[slot] = length

    def attention(self, segments: Sequence[Segment], group: int, lses: list[Tensor] | None = None) -> PassAttention:
        assert lses is None, "states are what meets here"
        return self.attend(self, segments, group)

    def follow(self, told: Sequence[tuple[str, int, list[int]]]) -> None:
        """Do what was done to another process's part."""
        for what, slot, rows in told:
            if what == "keep":
                self.keep(slot, rows)
            else:
                self.cut(slot, rows[0])
        self.told.clear()

    # ---- a pass ----

    def view(self, segment: Segment) -> View:
        """Where a segment's rows lie and what they see; from here on they are tentative."""
        length, first = self.lengths[segment.slot], segment.slot * self.count
        assert length + segment.count <= self.capacity, f"slot {segment.slot} holds {self.capacity} rows, {length + segment.count} wanted"
        seen = None if segment.mask is None else segment.mask.numpy()
        assert seen is None or seen.shape[1] == segment.count, "only rows of this pass are masked"
        depths = range(segment.count) if seen is None else (seen.sum(1) - 1).tolist()  # a row sees itself and its ancestors
        mine: dict[int, list[int]] = {}
        for row, depth in enumerate(depths):
            shard = self.layout.shard_of(length + depth)
            if self.low <= shard < self.high:
                mine.setdefault(shard - self.low, []).append(row)
        self.tentative[segment.slot] = mine
        held = [self.inner.lengths[first + shard] for shard in range(self.count)]
        self.make_room(max((held[shard] + len(rows) for shard, rows in mine.items()), default=0))
        there = [shard for shard in range(self.count) if held[shard] or shard in mine]
        return View(
            [first + shard for shard in there],
            [self.low + shard for shard in there],
            [held[shard] for shard in there],
            [mine.get(shard, []) for shard in there],
            seen,
        )

    def make_room(self, rows: int) -> None:
        if rows <= self.inner.capacity:
            return
        larger = self.made(rows + SPARE)
        for slot, length in enumerate(self.inner.lengths):
            larger.copy_prefix(self.inner, slot, slot, length)
        self.inner = larger


def row_plan(views: Sequence[View], counts: Sequence[int], shards: int) -> native.RowPlan:
    """The kernel's plan of a pass over shards: for each row a view of each shard that may hold a key it sees. `counts`: rows of each
    segment, in order."""
    columns: list[list[np.ndarray]] = [[] for _ in range(9)]
    start, ends = 0, np.zeros(1, int)
    for view, count in zip(views, counts, strict=True):
        home, place, many = np.full(count, -1), np.zeros(count, int), len(view.slots)
        for slot, held, rows in zip(view.slots, view.held, view.rows, strict=True):
            home[rows], place[rows] = slot, held + np.arange(len(rows))
        prefix, seen, others = seen_of(view, count)
        slots, in_shards = (np.tile(np.array(numbers, int), count) for numbers in (view.slots, view.shards))
        source, first = np.repeat(np.arange(start, start + count), many), ends[-1] + many * np.arange(1, count + 1)
        for column, part in zip(columns, (home, place, slots, prefix, seen, others, source, in_shards, first), strict=True):
            column.append(part)
        start, ends = start + count, first
    home, place, slot, prefix, seen, other, source, shard, first = (np.concatenate(column) for column in columns)
    starts, first = (np.concatenate([np.zeros(1, int), numbers]) for numbers in (seen.cumsum(), first))
    parts = (home, place, slot, prefix, starts, other, source, shard, first)
    whole = torch.from_numpy(np.concatenate(parts)).split([len(part) for part in parts])
    return native.RowPlan(*whole, shards=shards)


def seen_of(view: View, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row and shard of a view, row by row: how many of the shard's first rows it sees, how many of those behind, and these."""
    held = np.tile(np.array(view.held, int), (count, 1))
    more, others = np.zeros_like(held), np.zeros(0, int)
    some = [number for number, rows in enumerate(view.rows) if rows]  # shards with rows of this pass
    if view.seen is None:  # a chain: of this pass's rows it sees those up to itself, which follow each other
        for number in some:
            held[:, number] += np.searchsorted(view.rows[number], np.arange(count), side="right")
    elif some:
        sees = [view.seen[:, view.rows[number]] for number in some]
        more[:, some] = np.stack([each.sum(1) for each in sees], 1)
        behind = np.concatenate([view.held[number] + np.arange(len(view.rows[number])) for number in some])
        others = behind[np.concatenate(sees, 1).nonzero()[1]]
    return held.ravel(), more.ravel(), others


def seen_mask(view: View, number: int, count: int) -> Tensor:
    """Bool [count, held + tentative]: which keys of the view's shard `number` its rows see."""
    among = causal_mask(count) if view.seen is None else torch.from_numpy(view.seen)
    own = among[:, torch.tensor(view.rows[number], dtype=torch.int64)]
    return torch.cat([torch.ones(count, view.held[number], dtype=torch.bool), own], 1)
