"""Keys and values of the rows that a model has read: one slot for each sequence, all layers and slots in one tensor of keys and one of
values.

Rows written after a slot's length are tentative until `keep`. Knows slots, rows and lengths; knows nothing of tokens or trees.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyas.kernels import captured, native, pages
from eyas.kernels.attention import NativeAttention, PassAttention
from eyas.model.attention import PlainAttention
from eyas.model.rows import Segment

if TYPE_CHECKING:
    from typing_extensions import Self

ALIGNED = 8  # rows of a slot are a multiple of it: a mask over them begins its lines where kernels of CUDA want them
KEPT = 2  # slabs that a pool keeps for the next calls while no cache uses them


class Slabs:
    """Keys and values [layers, slots, kv heads, rows, head_dim], and where they are pooled the graphs captured over them (captured.py)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pooled: bool = False) -> None:
        with torch.inference_mode(not pooled and torch.is_inference_mode_enabled()):  # pooled slabs outlive the call that made them
            self.keys, self.values = (pages.zeros(shape, dtype, device) for _ in range(2))
        self.pooled = pooled
        self.memory = captured.Memory()  # of the graphs
        self.views: dict[int, Slabs] = {}  # by slot
        self.captured_alike = False  # whether other processes capture the same graphs, so that this one may not leave one out
        self.graphs: dict[tuple[object, ...], captured.Graph | None] = {}  # None: it could not be captured

    def of(self, slot: int) -> Slabs:
        """The part of one slot, with graphs of its own; the slabs themselves, where they have no other."""
        if self.keys.shape[1] == 1:
            return self
        if slot not in self.views:
            self.views[slot] = self.part(slice(None), slice(slot, slot + 1))
        return self.views[slot]

    def layer(self, number: int) -> Slabs:
        """The part of one layer, over which nothing is captured by itself."""
        return self.part(slice(number, number + 1))

    def part(self, *places: slice) -> Slabs:
        """The part at these places of layers and slots, with graphs of its own."""
        view = copy(self)
        view.keys, view.values = (slab[places] for slab in (self.keys, self.values))
        view.graphs, view.views = {}, {}
        return view


class Cache(ABC):
    """What a round asks of a target's cache: slots, each with a committed length. What a pass asks of it is up to the target."""

    lengths: list[int]
    capacity: int  # rows of a slot

    @property
    def slots(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def keep(self, slot: int, rows: Sequence[int]) -> None:
        """Commit these tentative rows (counted from the committed length, ascending), in order, and forget the others."""

    @abstractmethod
    def copy_prefix(self, other: Self, source: int, slot: int, length: int) -> None:
        """Let `slot` begin with the first `length` rows that `other` (or this cache itself) holds in `source`."""

    def cut(self, slot: int, length: int) -> None:
        """Forget all rows of a slot but the first `length`."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def clear(self, slot: int) -> None:
        self.lengths[slot] = 0

    def release(self) -> None:  # noqa: B027 (most caches have nothing to give back)
        """Give back what this cache holds for another cache to use; it must not be used afterwards. Without this call that waits for the
        garbage collector."""


class KVCache(Cache):
    """A cache whose layers all have keys and values of one shape, in slabs."""

    give_back: weakref.finalize | None = None  # gives the slabs back to their pool, where they are from one

    def __init__(
        self, layers: int, slots: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.hold(Slabs((layers, slots, kv_heads, capacity, head_dim), dtype, device), capacity)

    @classmethod
    def over(cls, slabs: Slabs, capacity: int) -> KVCache:
        """An empty cache in slabs that another cache may have used; what they hold counts for nothing."""
        cache = cls.__new__(cls)
        cache.hold(slabs, capacity)
        return cache

    def release(self) -> None:
        if self.give_back:
            self.give_back()

    def hold(self, slabs: Slabs, capacity: int) -> None:
        self.slabs, self.keys, self.values = slabs, slabs.keys, slabs.values
        self.lengths, self.capacity = [0] * slabs.keys.shape[1], capacity

    def attention(self, segments: Sequence[Segment], group: int, lses: list[Tensor] | None = None) -> PassAttention:
        """The attention of one pass over this cache. `group`: query heads that share a key head.

        On a CPU the native kernel computes it, elsewhere PyTorch. `lses`: a list to which each layer appends the log-sum-exps [N, q] of its
        scores, so that results over parts of the keys can be merged.
        """
        if native.attends(self.keys):
            return NativeAttention(self, segments, lses)
        return PlainAttention(self, segments, group, lses)

    def fixed(self, segment: Segment, rows: int, group: int) -> captured.Fixed:
        """How a segment's rows lie in a pass of `rows` in fixed shapes; padding goes to the slabs' spare row."""
        count, length = segment.count, self.lengths[segment.slot]
        assert length + count <= self.capacity, f"the cache holds {self.capacity} rows, {length + count} wanted"
        window = captured.window_of(length + count, self.capacity + 1)
        places = torch.full((rows,), self.capacity)
        places[:count] = torch.arange(length, length + count)
        masks = (captured.layout_seen(segment, length, rows, window),)
        return captured.Fixed(window, places, masks, partial(captured.StaticAttention, group=group))

    def write(self, layer: int, slot: int, k_nhd: Tensor, v_nhd: Tensor) -> tuple[Tensor, Tensor]:
        """Put n tentative rows behind the committed ones; returns the slot's keys and values [heads, length + n, head_dim]."""
        start = self.lengths[slot]
        end = start + k_nhd.shape[0]
        assert end <= self.capacity, f"slot {slot} holds {self.capacity} rows, {end} wanted"
        keys, values = self.keys[layer, slot], self.values[layer, slot]
        keys[:, start:end] = k_nhd.transpose(0, 1)
        values[:, start:end] = v_nhd.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        start, count = self.lengths[slot], len(rows)
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            to = slice(start + moved[0][0], start + count)
            source = torch.tensor([start + row for row in rows[moved[0][0] :]], device=self.keys.device)
            for slab in (self.keys, self.values):
                slab[:, slot, :, to] = slab[:, slot].index_select(2, source)
        self.lengths[slot] = start + count

    def copy_prefix(self, other: KVCache, source: int, slot: int, length: int) -> None:
        self.keys[:, slot, :, :length] = other.keys[:, source, :, :length]
        self.values[:, slot, :, :length] = other.values[:, source, :, :length]
        self.lengths[slot] = length


class Pool:
    """Slabs that outlive their caches, with the graphs captured over them: each call has a new cache, which may take slabs from here."""

    def __init__(self) -> None:
        self.idle: list[Slabs] = []
        self.lock = threading.RLock()  # reentrant: the garbage collector may run inside `cache` and call `take_back`

    def cache(
        self, layers: int, slots: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """A cache for so many sequences, of at least `capacity` rows each. The last row of a slot is spare: rows that pad a pass are
        written there. Slabs of several slots are nobody's after their call: they would hold much memory for a batch that may not come."""
        if slots > 1:
            rows = -(-(capacity + 1) // ALIGNED) * ALIGNED
            return KVCache.over(Slabs((layers, slots, kv_heads, rows, head_dim), dtype, device, pooled=True), rows - 1)
        with self.lock:
            fitting = [slabs for slabs in self.idle if slabs.keys.shape[3] > capacity]
            slabs = min(fitting, key=lambda slabs: slabs.keys.shape[3], default=None)
            self.idle = [each for each in self.idle if each is not slabs] if slabs else []  # slabs too small now would only take memory
        if slabs is None:
            slabs = Slabs(
                (layers, 1, kv_heads, -(-(capacity + 1) // captured.WINDOW) * captured.WINDOW, head_dim), dtype, device, pooled=True
            )
        cache = KVCache.over(slabs, slabs.keys.shape[3] - 1)
        cache.give_back = weakref.finalize(cache, self.take_back, slabs)
        cache.give_back.atexit = False
        return cache

    def take_back(self, slabs: Slabs) -> None:
        with self.lock:
            self.idle = [*self.idle, slabs][-KEPT:]


def new_cache(
    pool: Pool | None, layers: int, slots: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache from a pool, where there is one."""
    make = pool.cache if pool else KVCache
    return make(layers, slots, capacity, kv_heads, head_dim, dtype, device)


def pool_on(device: torch.device) -> Pool | None:
    """A pool on CUDA; None elsewhere, where a launch costs nothing that a graph would save."""
    return Pool() if device.type == "cuda" else None
