"""This process's part of the keys and values of sequences, and a pass's view of it.

To decoding it is a cache like any other: slots, lengths, `keep`. A slot holds those rows of its text that lie here, in the text's order, so
memory is read forwards; a shard's rows are blocks among them. A row's key goes to the shard of the position that the row has, or would have
as text; it is there before the walk says which rows are kept, so keeping sends nothing. Knows a layout, a range of shards and rows; knows
nothing of messages between processes or of layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import PassAttention
from eyas.model.adapter import LayeredCache
from eyas.model.cache import Cache, KVCache, Slabs
from eyas.model.rows import Segment
from eyas.parallel.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Self

Inner = TypeVar("Inner", KVCache, LayeredCache)
SPARE = 64  # rows of a slot beyond its part of a text: those of a tree may all lie here


class View(NamedTuple):
    """What one segment's R rows see of the P shards held here of which one of them sees a key."""

    slot: int
    held: int  # committed rows of the slot
    rows: np.ndarray  # which of the segment's rows have their key here; they lie behind the committed ones, in order
    shards: np.ndarray  # [P] ascending
    prefix: np.ndarray  # [R, P] how many of a shard's rows a row sees, counted through its blocks
    others: list[np.ndarray]  # [P] the places in the slot of a tree's rows that lie in the shard
    seen: list[np.ndarray]  # [P] bool [R, others]: which rows see which of these


class Shards(Cache, Generic[Inner]):
    """The rows that lie here of the texts of all slots, in one inner cache."""

    def __init__(self, slots: int, capacity: int, layout: Layout, held: tuple[int, int]) -> None:
        """`held`: the shards [low, high) of this process."""
        self.layout, self.low, self.high = layout, *held
        self.lengths, self.capacity = [0] * slots, capacity
        self.mirror = np.array([layout.mirrored(number) for number in range(layout.shards)])  # the shard whose turn it is, and back
        turns = self.mirror[self.low : self.high]
        self.starts = turns * layout.block  # of each shard held here: where its first block begins in a text
        self.bases = turns.argsort().argsort() * layout.block  # and in a slot
        self.inner = self.made(self.part(capacity) + SPARE)
        self.tentative: dict[int, list[int]] = {}  # by slot: the rows of the last pass with keys here
        self.told: list[tuple[str, int, list[int]]] = []  # what was done to it since it was last asked

    @abstractmethod
    def made(self, room: int) -> Inner:
        """An inner cache of as many slots, with this many rows each."""

    @property
    def count(self) -> int:
        """How many shards are held here."""
        return self.high - self.low

    def held(self, lengths: np.ndarray) -> np.ndarray:
        """How many rows of texts of these lengths [..] lie in each of the P shards held here: [.., P]."""
        return self.layout.rows_of(lengths, self.starts)

    def part(self, length: int) -> int:
        """How many rows of a text of this length lie here."""
        return int(self.held(np.array(length)).sum())

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        self.told.append(("keep", slot, list(rows)))
        place = {row: index for index, row in enumerate(self.tentative.pop(slot, []))}
        self.inner.keep(slot, [place[row] for row in rows if row in place])
        self.lengths[slot] += len(rows)

    def cut(self, slot: int, length: int) -> None:
        self.told.append(("cut", slot, [length]))
        self.lengths[slot] = min(length, self.lengths[slot])
        self.inner.cut(slot, self.part(self.lengths[slot]))

    def clear(self, slot: int) -> None:
        self.cut(slot, 0)

    def copy_prefix(self, other: Self, source: int, slot: int, length: int) -> None:
        if other is self:  # another cache's rows are nobody's to copy where processes follow
            self.told.append(("copy", slot, [source, length]))
        self.inner.copy_prefix(other.inner, source, slot, self.part(length))
        self.lengths[slot] = length

    def follow(self, told: Sequence[tuple[str, int, list[int]]]) -> None:
        """Do what was done to another process's part."""
        for what, slot, rows in told:
            if what == "keep":
                self.keep(slot, rows)
            elif what == "copy":
                self.copy_prefix(self, rows[0], slot, rows[1])
            else:
                self.cut(slot, rows[0])
        self.told.clear()

    # ---- a pass ----

    def view(self, segment: Segment) -> View:
        """Where a segment's rows lie and what they see; from here on they are tentative."""
        slot, count, length = segment.slot, segment.count, self.lengths[segment.slot]
        assert length + count <= self.capacity, f"slot {slot} holds {self.capacity} rows, {length + count} wanted"
        seen = None if segment.mask is None else segment.mask.numpy()
        assert seen is None or seen.shape[1] == count, "only rows of this pass are masked"
        depths = np.arange(count) if seen is None else seen.sum(1) - 1  # a row sees itself and its ancestors
        shards = self.mirror[(length + depths) // self.layout.block % self.layout.shards]
        rows = ((shards >= self.low) & (shards < self.high)).nonzero()[0]
        held = self.inner.lengths[slot]
        self.tentative[slot] = rows.tolist()
        self.make_room(held + len(rows))
        if seen is None:  # a chain sees each shard's rows in order, its own among them
            prefix = self.held(length + 1 + depths)
            there = prefix[-1].nonzero()[0]
            return View(slot, held, rows, self.low + there, prefix[:, there], [], [])
        prefix, own = self.held(np.array(length)), shards[rows]
        there = np.union1d(prefix.nonzero()[0], own - self.low)
        in_shard = [(own == shard).nonzero()[0] for shard in self.low + there]
        others, among = [held + each for each in in_shard], [seen[:, rows[each]] for each in in_shard]
        return View(slot, held, rows, self.low + there, np.tile(prefix[there], (count, 1)), others, among)

    def make_room(self, rows: int) -> None:
        if rows <= self.inner.capacity:
            return
        larger = self.made(rows + SPARE)
        for slot, length in enumerate(self.inner.lengths):
            larger.copy_prefix(self.inner, slot, slot, length)
        self.inner = larger


class ShardedCache(Shards[KVCache]):
    """The shards of a target of ours."""

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
        """`shape`: layers, key heads and their width; `held`: as in `Shards`; `attend`: makes a pass's attention of this cache, its
        segments and the number of query heads that share a key head."""
        self.shape, self.kind, self.attend = shape, kind, attend
        super().__init__(slots, capacity, layout, held)

    def made(self, room: int) -> KVCache:
        layers, kv_heads, width = self.shape
        return KVCache(layers, len(self.lengths), room, kv_heads, width, *self.kind)

    @property
    def slabs(self) -> Slabs:
        return self.inner.slabs

    @property
    def keys(self) -> Tensor:
        return self.inner.keys

    @property
    def values(self) -> Tensor:
        return self.inner.values

    def attention(self, segments: Sequence[Segment], group: int, lses: list[Tensor] | None = None) -> PassAttention:
        assert lses is None, "states are what meets here"
        return self.attend(self, segments, group)


def row_plan(views: Sequence[View], counts: Sequence[int], cache: ShardedCache) -> native.RowPlan:
    """The kernel's plan of a pass over shards: for each row a view of each shard that may hold a key it sees. `counts`: rows of each
    segment, in order."""
    columns: list[list[np.ndarray]] = [[] for _ in range(10)]
    start, ends = 0, np.zeros(1, int)
    for view, count in zip(views, counts, strict=True):
        many = len(view.shards)
        home, place, more = np.full(count, -1), np.zeros(count, int), np.zeros((count, many), int)
        home[view.rows], place[view.rows] = view.slot, view.held + np.arange(len(view.rows))
        others = np.zeros(0, int)
        if view.others:
            more[:] = np.stack([seen.sum(1) for seen in view.seen], 1)
            others = np.concatenate(view.others)[np.concatenate(view.seen, 1).nonzero()[1]]
        slot, source = np.full(count * many, view.slot), np.repeat(np.arange(start, start + count), many)
        shard, base = (np.tile(each, count) for each in (view.shards, cache.bases[view.shards - cache.low]))
        first = ends[-1] + many * np.arange(1, count + 1)
        parts = (home, place, slot, view.prefix.ravel(), more.ravel(), others, source, shard, base, first)
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
        start, ends = start + count, first
    home, place, slot, prefix, seen, other, source, shard, base, first = (np.concatenate(column) for column in columns)
    starts, first = (np.concatenate([np.zeros(1, int), numbers]) for numbers in (seen.cumsum(), first))
    parts = (home, place, slot, prefix, starts, other, source, shard, base, first)
    whole = torch.from_numpy(np.concatenate(parts)).split([len(part) for part in parts])
    block = cache.layout.block
    return native.RowPlan(*whole, shards=cache.layout.shards, shift=block.bit_length() - 1, apart=cache.count * block)


def keys_seen(view: View, cache: Shards[Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each shard of a view: the places in the slot of the t keys that its R rows see, and which row sees which: bool [R, t]."""
    block, apart = cache.layout.block, cache.count * cache.layout.block
    for number, shard in enumerate(view.shards):
        index = np.arange(view.prefix[:, number].max())
        places = cache.bases[shard - cache.low] + index // block * apart + index % block
        seen = index < view.prefix[:, number, None]
        if view.others:
            places, seen = np.concatenate([places, view.others[number]]), np.concatenate([seen, view.seen[number]], 1)
        yield int(shard), torch.from_numpy(places), torch.from_numpy(seen)
