"""A target whose text's keys lie in several processes. The first one decodes; the others follow its passes and hold their part.

Only the first process has a draft, a tokenizer, a planner and noise. Were each to decode by itself, one near tie that fell otherwise, or a
planner's clock, would let them part. Knows targets and sharded caches; knows nothing of rounds.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eyas import launched
from eyas.config import EyasError
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment
from eyas.model.target import Output, Target
from eyas.parallel.adapted import ShardedLayeredCache
from eyas.parallel.attention import SharedOutAttention, attention_over, packed, unpacked
from eyas.parallel.cache import ShardedCache, Shards
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.schedules import Exchange

SPARED = 64  # rows of a pass; benchmarks/sharded_speed.py measures what sharing out brings

NONE = slice(0, 0)  # of a pass's rows: those whose logits a process wants that draws nothing


class ShardedTarget:
    """A target like the one it wraps, but for its caches. In the first process each pass is told to the others before it runs."""

    def __init__(self, target: TargetModel, layout: Layout, peers: Peers, schedule: str = "auto", spared: int = SPARED) -> None:
        """`schedule`: how states pass between processes (schedules.py); `spared`: rows of a pass that a process must be spared, if each is
        to compute a share of them. Both are the same in all processes."""
        self.spared = spared
        self.target, self.layout, self.peers = target, layout, peers
        self.exchange = Exchange(layout, peers, schedule)
        self.held = layout.range_of(peers.rank, peers.count)
        self.numbers = itertools.count()
        self.named: weakref.WeakKeyDictionary[Shards[Any], int] = weakref.WeakKeyDictionary()
        self.gone: list[int] = []  # caches that are no more, which the others have yet to hear
        self.passes, self.began = 0, time.monotonic()
        if peers.first and peers.count > 1:
            atexit.register(self.at_exit)

    def __getattr__(self, name: str) -> Any:
        if name == "target":
            raise AttributeError(name)
        return getattr(self.target, name)

    @property
    def arrangement(self) -> str:
        """What the text depends on beside the seed, and prices on."""
        return f"{self.layout.shards}x{self.layout.block} shards, {self.peers.count} processes"

    def prepare(self, bits: int = 16) -> ShardedTarget:
        self.target = self.target.prepare(bits)
        return self

    def new_cache(self, slots: int, capacity: int) -> ShardedCache | ShardedLayeredCache:
        number = next(self.numbers)
        self.peers.tell(("cache", number, slots, capacity))
        cache = self.made(slots, capacity)
        self.named[cache] = number
        weakref.finalize(cache, self.gone.append, number).atexit = False
        return cache

    def made(self, slots: int, capacity: int) -> ShardedCache | ShardedLayeredCache:
        config, kind = self.target.config, (self.target.dtype, self.target.device)
        if self.target.blocks is None:  # they are transformers'
            return ShardedLayeredCache(config.num_hidden_layers, slots, capacity, kind, self.layout, self.held, self.exchange)
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        return ShardedCache(shape, slots, capacity, kind, self.layout, self.held, partial(attention_over, self.exchange))

    def __call__(self, rows: Rows, cache: Any, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        if not isinstance(cache, Shards):
            return self.target(rows, cache, taps, logits_of)
        told, cache.told = cache.told, []
        gone, self.gone[:] = [*self.gone], []
        if self.peers.count > 1:
            segments = [(each.slot, each.count, None if each.mask is None else np.packbits(each.mask.numpy())) for each in rows.segments]
            tokens, positions = (each.numpy().astype(np.int32) for each in (rows.tokens, rows.positions))
            self.peers.tell(("pass", self.named[cache], gone, told, tokens, positions, segments, tuple(taps)))
        self.passes += 1
        return self.run(rows, cache, taps, logits_of)

    def run(self, rows: Rows, cache: Any, taps: Sequence[int], logits_of: Tensor | slice | None) -> Output:
        """One pass, which all processes run at once. What it gives is whole in the first process alone."""
        if not self.shares_out(rows):
            return self.target(rows, cache, taps if self.peers.first else (), logits_of)
        assert isinstance(self.target, Target)
        attention = SharedOutAttention(cache, rows.segments[0], self.exchange)
        hidden, features = self.target.states(rows.tokens[attention.mine], rows.positions[attention.mine], attention, taps)
        parts = [hidden] if features is None else [hidden, features]
        everyone = self.peers.collect(packed(parts, attention.share), "features")
        if everyone is not None:
            hidden, *others = unpacked(everyone.flatten(0, 1)[: len(rows.tokens)], [(part.shape[1], part.dtype) for part in parts])
            features = others[0] if others else None
        return self.target.output(hidden, features, taps, logits_of if self.peers.first else NONE)

    def shares_out(self, rows: Rows) -> bool:
        """Whether each process computes a share of these rows alone: a part of one prompt, by the native kernel, which computes a row to
        the same bits whatever rows are beside it, and where that spares each process some rows."""
        count, number, segment = self.peers.count, len(rows.tokens), rows.segments[0]
        if count == 1 or len(rows.segments) > 1 or segment.mask is not None or not self.target.rows_stand_alone:
            return False
        return number - -(-number // count) >= self.spared and number > (count - 1) ** 2  # else some would have none

    def stop(self) -> None:
        """Let the others end. Called once, when the first process ends. Raises `EyasError` where one does not end."""
        atexit.unregister(self.at_exit)
        self.peers.end()
        try:
            if self.peers.well:
                with suppress(RuntimeError):
                    self.peers.tell(("stop",))
                self.peers.see_off()
        finally:
            self.peers.leave()

    def at_exit(self) -> None:
        try:
            self.stop()
        except EyasError as error:
            launched.say(f"eyas: {error}")
            sys.stdout.flush()
            os._exit(2)  # else torchrun would wait for the others

    def lies(self, position: int) -> tuple[int, int]:
        """The shard of a position, and the process (counted from 1) that holds it."""
        shard, layout, count = self.layout.shard_of(position), self.layout, self.peers.count
        return shard, next(rank + 1 for rank in range(count) if shard < layout.range_of(rank, count)[1])

    def shards_of(self, length: int) -> int:
        """How many shards hold some of the first `length` positions."""
        return sum(self.layout.held(length, shard) > 0 for shard in range(self.layout.shards))

    def facts(self) -> dict[str, Any]:
        """How the keys lay and what passed between the processes so far, for a result. In the first process alone: it asks the others how
        long they waited (None where they cannot answer). `slow_process`: one that the others waited for, where they did so for a tenth of
        the time; counted from 1."""
        peers, (carried, size) = self.peers, self.peers.carried
        waits: list[float | None] = [round(peers.waited, 3), *[None] * (peers.count - 1)]
        if peers.well:
            with suppress(EyasError):  # one may be lost just now; the text is there all the same
                peers.tell(("waits",))
                waits = [*peers.waits()]
        return {
            "processes": peers.count,
            "shards": self.layout.shards,
            "block": self.layout.block,
            "passes": self.passes,
            "collectives": carried,
            "messages": peers.calls["tell"],
            "bytes": size + peers.bytes["tell"],
            "seconds_waited": waits,
            "slow_process": slow_process([each for each in waits if each is not None], time.monotonic() - self.began),
        }


def slow_process(waits: Sequence[float], seconds: float) -> int | None:
    """The process that waited least, where each other waited for a tenth of the time more: it is what they waited for."""
    least, *others = sorted(waits)
    return waits.index(least) + 1 if others and others[0] - least > seconds / 10 else None


def follow(target: ShardedTarget) -> None:
    """In every process but the first: run the passes that it tells, until it says stop or ends otherwise. Raises `EyasError` where a
    process is lost."""
    try:
        with torch.inference_mode(), target.target.threads():
            run_passes(target)
    except EyasError:
        if not target.peers.ended():  # the first was interrupted in the middle of a pass
            raise
    target.peers.leave()


def run_passes(target: ShardedTarget) -> None:
    caches: dict[int, ShardedCache | ShardedLayeredCache] = {}
    while True:
        what, *words = target.peers.tell()
        if what == "stop":
            return
        if what == "waits":
            target.peers.waits()
            continue
        if what == "cache":
            number, slots, capacity = words
            caches[number] = target.made(slots, capacity)
            continue
        number, gone, told, tokens, positions, masks, taps = words
        for each in gone:
            caches.pop(each, None)
        caches[number].follow(told)
        segments = [Segment(slot, count, whole_mask(mask, count)) for slot, count, mask in masks]
        rows = Rows(torch.from_numpy(tokens).long(), torch.from_numpy(positions).long(), segments)
        target.run(rows, caches[number], taps, NONE)


def whole_mask(mask: np.ndarray | None, count: int) -> Tensor | None:
    return None if mask is None else torch.from_numpy(np.unpackbits(mask)[: count * count].reshape(count, count).astype(bool))
