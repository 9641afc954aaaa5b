"""Sharded keys of a target that transformers runs: its attention over the shards held here, and all states together.

Every process runs all rows of a pass; the model's own rule (windows, chunks) is evaluated on the positions of a shard's rows. Scores are
capped one by one, and a sink, which is no key, joins once, when all states have met. Knows transformers' pass as model/adapter.py tells it,
shards and states; knows no model family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eyas.model.adapter import Distribution, LayeredCache, Pass, masked_state
from eyas.model.rows import Rows
from eyas.parallel.cache import Shards, keys_seen
from eyas.parallel.layout import Layout
from eyas.parallel.schedules import Exchange
from eyas.parallel.states import State, empty, meet


class ShardedLayeredCache(Shards[LayeredCache]):
    """The shards of a target that transformers runs."""

    def __init__(
        self,
        layers: int,
        slots: int,
        capacity: int,
        kind: tuple[torch.dtype, torch.device],
        layout: Layout,
        held: tuple[int, int],
        exchange: Exchange,
    ) -> None:
        """`held`: as in `Shards`."""
        self.layers, self.kind, self.exchange = layers, kind, exchange
        super().__init__(slots, capacity, layout, held)

    def made(self, room: int) -> LayeredCache:
        return LayeredCache(self.layers, len(self.lengths), room, *self.kind)

    def reading(self, rows: Rows, taps: Sequence[int]) -> ShardedPass:
        """A pass over this cache, for transformers to run."""
        return ShardedPass(rows, self, taps)


class ShardedPass(Pass):
    """A pass over a `ShardedLayeredCache`. A segment's mask is one for each shard that its rows may see here."""

    def __init__(self, rows: Rows, cache: ShardedLayeredCache, taps: Sequence[int]) -> None:
        super().__init__(rows, taps)
        self.cache = cache
        views = [cache.view(segment) for segment, _ in self.parts]  # before any row has its place: a slot may get more room
        self.mine = [torch.from_numpy(view.rows) for view in views]  # rows of each segment with their key here
        self.seen = [list(keys_seen(view, cache)) for view in views]
        self.k_positions = [
            cache.inner.place(segment.slot, rows.positions[part][mine]) for (segment, part), mine in zip(self.parts, self.mine, strict=True)
        ]

    def masks(self, allowed: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
        return [
            [seen_nt & allowed(q_n, k_t[places]) for _, places, seen_nt in of_shards]
            for of_shards, q_n, k_t in zip(self.seen, self.q_positions, self.k_positions, strict=True)
        ]

    def attend(self, layer: int, q_qNd: Tensor, k_kNd: Tensor, v_kNd: Tensor, masks: list[Any], how: Distribution) -> Tensor:
        heads, rows, _ = q_qNd.shape
        wide, width = torch.promote_types(q_qNd.dtype, torch.float32), v_kNd.shape[2]
        nothing, known = empty(rows, heads, width, q_qNd.to(wide)), dict[tuple[int, int], State]()
        for (segment, part), mine, of_shards, masks_here in zip(self.parts, self.mine, self.seen, masks, strict=True):
            k_nkd, v_nkd = (each[:, part][:, mine].transpose(0, 1) for each in (k_kNd, v_kNd))
            keys, values = self.cache.inner.write(layer, segment.slot, k_nkd, v_nkd)
            for (shard, places, _), seen_nt in zip(of_shards, masks_here, strict=True):
                out, lse = masked_state(q_qNd[:, part], keys[:, places], values[:, places], seen_nt, how)
                known.setdefault((shard, 1), nothing.clone())[part] = torch.cat([out, lse[..., None]], -1).transpose(0, 1)
        whole = self.cache.exchange.joined(known, nothing)
        if how.sinks_q is not None:
            sink = torch.zeros_like(whole)
            sink[..., -1] = how.sinks_q
            whole = meet(whole, sink)
        return whole[..., :-1].to(q_qNd.dtype)
