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
from eyas.kernels.captured import RUNS, fits, fixed_pass, padded
from eyas.model.cache import KVCache, Pool, Slabs
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment
from eyas.model.target import Output, Target
from eyas.parallel.adapted import ShardedLayeredCache
from eyas.parallel.attention import SharedOutAttention, attention_over, packed, unpacked
from eyas.parallel.cache import ShardedCache, Shards
from eyas.parallel.layout import Layout, Together
from eyas.parallel.peers import Peers
from eyas.parallel.schedules import Exchange
from eyas.parallel.together import TogetherCache, room, roomy

# Rows of a pass. benchmarks/sharded_speed.py --prompt 4, two processes, 1024 keys: sharing out 32 rows brings nothing, 64 rows 1.06 times
# the speed, 128 rows, with 64 spared, 1.26. On cores with much other work, so that 32 would be enough is not shown.
SPARED = 64

NONE = slice(0, 0)  # of a pass's rows: those whose logits a process wants that draws nothing


class ShardedTarget:
    """A target like the one it wraps, but for its caches. In the first process each pass is told to the others before it runs."""

    def __init__(
        self,
        target: TargetModel,
        layout: Layout,
        peers: Peers,
        schedule: str = "auto",
        spared: int = SPARED,
        together: bool = False,
    ) -> None:
        """`schedule`: how states pass between processes (schedules.py); `spared`: rows of a pass that a process must be spared, if each is
        to compute a share of them; `together`: a process takes one state over all its keys, not one for each shard. They are the same in
        all processes."""
        self.spared = spared
        self.target, self.layout, self.peers = target, layout, peers
        self.together = Together(peers.count) if together else None
        self.exchange = Exchange(self.together or layout, peers, schedule)
        self.held = layout.range_of(peers.rank, peers.count)
        self.numbers = itertools.count()
        self.named: weakref.WeakKeyDictionary[Shards[Any] | Slabs, int] = weakref.WeakKeyDictionary()
        self.gone: list[int] = []  # caches and pooled slabs that are no more, which the others have yet to hear
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
        return f"{self.layout.shards}x{self.layout.block} shards{', together' if self.together else ''}, {self.peers.count} processes"

    def prepare(self, bits: int = 16) -> ShardedTarget:
        self.target = self.target.prepare(bits)
        return self

    @property
    def pool(self) -> Pool | None:
        """Where slabs come from over which passes are captured. A message that goes through host memory cannot be captured."""
        pool = getattr(self.target, "pool", None)
        return pool if self.together and (self.target.device.type == "cpu" or self.peers.captures) else None

    def new_cache(self, slots: int, capacity: int) -> Shards[Any]:
        inner = None
        if self.together and self.pool and slots == 1:
            (layers, kv_heads, width), kind = self.shape, (self.target.dtype, self.target.device)
            inner = self.pool.cache(layers, 1, roomy(room(self.layout, self.peers.count, capacity)), kv_heads, width, *kind)
            inner.slabs.captured_alike = self.peers.count > 1
        slabs = inner and (inner.keys.shape[3], self.number(inner.slabs))
        cache = self.made(slots, capacity, inner)
        self.peers.tell(("cache", self.number(cache), self.ended(), slots, capacity, slabs))
        return cache

    def number(self, each: Shards[Any] | Slabs) -> int:
        """By which the others know a cache or its slabs; they hear once it is no more."""
        if each not in self.named:
            self.named[each] = next(self.numbers)
            weakref.finalize(each, self.gone.append, self.named[each]).atexit = False
        return self.named[each]

    def ended(self) -> list[int]:
        """What is no more since this was last asked."""
        gone, self.gone[:] = [*self.gone], []
        return gone

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.target.config
        return config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    def made(self, slots: int, capacity: int, inner: KVCache | None = None) -> Shards[Any]:
        kind = self.target.dtype, self.target.device
        if self.target.blocks is None:  # they are transformers'
            layers = self.target.config.num_hidden_layers
            return ShardedLayeredCache(layers, slots, capacity, kind, self.layout, self.held, self.exchange)
        if self.together:
            return TogetherCache(self.shape, slots, capacity, kind, self.layout, self.exchange, inner)
        return ShardedCache(self.shape, slots, capacity, kind, self.layout, self.held, partial(attention_over, self.exchange))

    def __call__(self, rows: Rows, cache: Any, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        if not isinstance(cache, Shards):
            return self.target(rows, cache, taps, logits_of)
        told, cache.told = cache.told, []
        fixed = logits_of is None and isinstance(cache, TogetherCache) and fits(cache, rows.segments)
        if self.peers.count > 1:
            segments = [(each.slot, each.count, None if each.mask is None else np.packbits(each.mask.numpy())) for each in rows.segments]
            tokens, positions = (each.numpy().astype(np.int32) for each in (rows.tokens, rows.positions))
            self.peers.tell(("pass", self.named[cache], self.ended(), told, tokens, positions, segments, tuple(taps), fixed))
        self.passes += 1
        mark = self.peers.mark()
        output = self.run(rows, cache, taps, logits_of)
        if fixed and self.target.device.type == "cuda":
            self.peers.replayed(mark, padded(len(rows.tokens)), RUNS)
        self.peers.settle()
        return output

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
        if count == 1 or self.together or len(rows.segments) > 1 or segment.mask is not None or not self.target.rows_stand_alone:
            return False
        return number - -(-number // count) >= self.spared and number > (count - 1) ** 2  # else some would have none

    # ---- in all processes but the first ----

    def laid(self, known: dict[int, Slabs], rows: int, number: int) -> KVCache:
        """A cache in the slabs that the first process knows by this number: like its own they are used again, with their graphs."""
        if number not in known:
            layers, kv_heads, width = self.shape
            known[number] = Slabs((layers, 1, kv_heads, rows, width), self.target.dtype, self.target.device, pooled=True)
            known[number].captured_alike = True
        return KVCache.over(known[number], rows - 1)

    def follow_fixed(self, rows: Rows, cache: Shards[Any], taps: Sequence[int]) -> None:
        """A pass that the first process runs in fixed shapes: made and replayed here when it is there, but for what only that one wants."""
        assert isinstance(self.target, Target) and isinstance(cache, TogetherCache)
        (_, kv_heads, _), heads = self.shape, self.target.config.num_attention_heads
        read = partial(self.target.read, taps=(), logits_of=NONE)
        fixed_pass(read, (*taps,), heads // kv_heads, cache, rows.tokens, rows.positions, rows.segments[0])

    # ---- what is told ----

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
        long they waited (None where they cannot answer). `slow_process`: the one that the others wait for, counted from 1."""
        peers, (carried, size) = self.peers, self.peers.carried
        known = [(round(peers.waited, 3), 0.0)]
        if peers.well:
            with suppress(EyasError):  # one may be lost just now; the text is there all the same
                peers.tell(("waits",))
                known = peers.waits()
        waits: list[float | None] = [waited for waited, _ in known]
        return {
            "processes": peers.count,
            "shards": self.layout.shards,
            "block": self.layout.block,
            "passes": self.passes,
            "collectives": carried,
            "messages": peers.calls["tell"],
            "bytes": size + peers.bytes["tell"],
            "seconds_waited": [*waits, *[None] * (peers.count - len(waits))],
            "slow_process": slow_process([worked for _, worked in known]),
        }


def slow_process(worked: Sequence[float]) -> int | None:
    """The process, counted from 1, that a pass takes half as long again as any other; None where there is no such. All compute as much, so
    the others wait for it."""
    *others, most = sorted(worked)
    return worked.index(most) + 1 if others and most > 1.5 * others[-1] else None


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
    caches, slabs = dict[int, Shards[Any]](), dict[int, Slabs]()
    while True:
        what, *words = target.peers.tell()
        if what == "stop":
            return
        if what == "waits":
            target.peers.waits()
            continue
        number, gone, *words = words
        for each in gone:
            caches.pop(each, None)
            slabs.pop(each, None)
        if what == "cache":
            slots, capacity, laid = words
            caches[number] = target.made(slots, capacity, laid and target.laid(slabs, *laid))
            continue
        told, tokens, positions, masks, taps, fixed = words
        caches[number].follow(told)
        segments = [Segment(slot, count, whole_mask(mask, count)) for slot, count, mask in masks]
        rows = Rows(torch.from_numpy(tokens).long(), torch.from_numpy(positions).long(), segments)
        if fixed:
            target.follow_fixed(rows, caches[number], taps)
        else:
            target.run(rows, caches[number], taps, NONE)


def whole_mask(mask: np.ndarray | None, count: int) -> Tensor | None:
    return None if mask is None else torch.from_numpy(np.unpackbits(mask)[: count * count].reshape(count, count).astype(bool))
