"""Three processes' parts of a text, uneven ones, without any process: each row's key lies in one of them, and is found there by whoever
sees it, after branches were kept, texts cut and copied, and a slot given more room."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from eyas.model.mask import ancestor_mask
from eyas.model.rows import Segment
from eyas.parallel.cache import ShardedCache, keys_seen, row_plan
from eyas.parallel.layout import Layout

LAYOUT, COUNT = Layout(8, 4), 3  # shards 0 and 1, 2 to 4, 5 to 7


class Parts:
    """The caches of all processes. A row's key is its number, and `texts` has the numbers of each slot's text."""

    def __init__(self, slots: int, capacity: int) -> None:
        kind, ranges = (torch.float32, torch.device("cpu")), [LAYOUT.range_of(rank, COUNT) for rank in range(COUNT)]
        self.caches = [ShardedCache((1, 1, 1), slots, capacity, kind, LAYOUT, held, lambda *_: None) for held in ranges]
        self.texts: list[list[int]] = [[] for _ in range(slots)]

    def read(self, slot: int, numbers: list[int], parents: list[int] | None = None) -> None:
        """Rows behind a text, a chain or a tree, each of which sees the keys that it should and no other."""
        count, text = len(numbers), self.texts[slot]
        mask = None if parents is None else ancestor_mask(parents)
        sees = np.tri(count, dtype=bool) if mask is None else mask.numpy()
        shards = [LAYOUT.shard_of(len(text) + depth) for depth in sees.sum(1) - 1]
        keys, segment = torch.tensor(numbers, dtype=torch.float32)[:, None, None], Segment(slot, count, mask)
        for cache in self.caches:
            view = cache.view(segment)
            assert view.rows.tolist() == [row for row, shard in enumerate(shards) if cache.low <= shard < cache.high]
            written, _ = cache.inner.write(0, slot, keys[view.rows], keys[view.rows])
            seen = {shard: [written[0, places[mine], 0].tolist() for mine in of_rows] for shard, places, of_rows in keys_seen(view, cache)}
            for shard, row in itertools.product(range(cache.low, cache.high), range(count)):
                there = [number for place, number in enumerate(text) if LAYOUT.shard_of(place) == shard]
                there += [numbers[other] for other in sees[row].nonzero()[0] if shards[other] == shard]
                assert seen.get(shard, [[]] * count)[row] == there
            plan = row_plan([view], [count], cache)
            here = np.isin(np.arange(count), view.rows)
            assert plan.home.tolist() == np.where(here, slot, -1).tolist(), "a row whose key lies elsewhere is written nowhere"
            assert plan.place[view.rows].tolist() == [*range(view.held, view.held + len(view.rows))]

    def keep(self, slot: int, numbers: list[int], rows: list[int]) -> None:
        self.texts[slot] += [numbers[row] for row in rows]
        for cache in self.caches:
            cache.keep(slot, rows)

    def cut(self, slot: int, length: int) -> None:
        del self.texts[slot][length:]
        for cache in self.caches:
            cache.cut(slot, length)

    def copy(self, source: int, slot: int, length: int) -> None:
        self.texts[slot] = self.texts[source][:length]
        for cache in self.caches:
            cache.copy_prefix(cache, source, slot, length)


@pytest.mark.parametrize("seed", range(6))
def test_every_key_lies_in_one_process_and_is_found_by_the_rows_that_see_it(seed):
    draw, parts, numbers = random.Random(seed), Parts(2, 400), itertools.count(1)
    for _ in range(25):
        slot, what = draw.randrange(2), draw.choice(["chain", "chain", "tree", "tree", "cut", "copy"])
        length = draw.randint(0, len(parts.texts[slot]))
        if what == "cut":
            parts.cut(slot, length)
        elif what == "copy":
            parts.copy(slot, 1 - slot, length)
        else:
            rows = [next(numbers) for _ in range(draw.randint(1, 15))]
            parents = [-1, *(draw.randrange(row) for row in range(1, len(rows)))] if what == "tree" else None
            parts.read(slot, rows, parents)
            path = [draw.randrange(len(rows))]
            while parents and path[0]:
                path.insert(0, parents[path[0]])
            parts.keep(slot, rows, path if parents else [*range(path[0] + 1)])


def test_a_slot_is_given_more_room_and_keeps_what_it_has():
    parts, siblings = Parts(2, 200), 150  # all of one process, which has room for a third of a text and a few
    for slot, first in ((0, 1000), (1, 2000)):
        parts.read(slot, text := [*range(first, first + 30)])
        parts.keep(slot, text, [*range(30)])
    rooms = [cache.inner.capacity for cache in parts.caches]
    parts.read(1, tree := [*range(1, siblings + 1)], [-1] + [0] * (siblings - 1))
    parts.keep(1, tree, [0, siblings - 1])
    assert sum(cache.inner.capacity > room for cache, room in zip(parts.caches, rooms, strict=True)) == 1
    for slot in (0, 1):
        parts.read(slot, [7])
