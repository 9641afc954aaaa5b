"""This process's part of the keys and values of sequences, and a pass's view of it.

To decoding it is a cache like any other: slots, lengths, `keep`. A row's key goes to the shard of the position that the row has, or would
have as text; it is there before the walk says which rows are kept, so keeping sends nothing. Knows a layout, a range of shards and rows;
knows nothing of messages between processes or of layers.
"""

from __future__ import annotations

import itertools
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
    home, place, source, slot, prefix, shard, first, seen_by = [], [], [], [], [], [], [0], []
    others: list[int] = []
    start = 0
    for view, count in zip(views, counts, strict=True):
        where = {
            row: (at, length + index)
            for at, length, rows in zip(view.slots, view.held, view.rows, strict=True)
            for index, row in enumerate(rows)
        }
        home += [where[row][0] if row in where else -1 for row in range(count)]
        place += [where[row][1] if row in where else 0 for row in range(count)]
        source += np.repeat(np.arange(start, start + count), len(view.slots)).tolist()
        slot += view.slots * count
        shard += view.shards * count
        before, found, after = seen_of(view, count)
        prefix += before
        seen_by += found
        others += after
        first += [first[-1] + len(view.slots) * (row + 1) for row in range(count)]
        start += count
    parts = (home, place, slot, prefix, [0, *itertools.accumulate(seen_by)], others, source, shard, first)
    whole = torch.tensor([*itertools.chain(*parts)], dtype=torch.int64)
    home, place, slot, prefix, starts, other, source, shard, first = whole.split([len(part) for part in parts])
    return native.RowPlan(home, place, slot, prefix, starts, other, source, shard, first, shards)


def seen_of(view: View, count: int) -> tuple[list[int], list[int], list[int]]:
    """For each row and shard of a view, row by row: how many of the shard's first rows it sees, how many of those behind, and these."""
    if view.seen is None:  # a chain: of this pass's rows it sees those up to itself, which follow each other
        rows = np.arange(count)[:, None]
        more = (
            np.stack([np.searchsorted(mine, rows[:, 0], side="right") for mine in view.rows], 1) if view.rows else np.zeros((count, 0), int)
        )
        return (np.array(view.held, dtype=int)[None] + more).ravel().tolist(), [0] * (count * len(view.slots)), []
    counts, others = [], []
    for row in range(count):
        for held, mine in zip(view.held, view.rows, strict=True):
            sees = [held + index for index, other in enumerate(mine) if view.seen[row, other]]
            counts.append(len(sees))
            others += sees
    return view.held * count, counts, others


def seen_mask(view: View, number: int, count: int) -> Tensor:
    """Bool [count, held + tentative]: which keys of the view's shard `number` its rows see."""
    among = causal_mask(count) if view.seen is None else torch.from_numpy(view.seen)
    own = among[:, torch.tensor(view.rows[number], dtype=torch.int64)]
    return torch.cat([torch.ones(count, view.held[number], dtype=torch.bool), own], 1)
