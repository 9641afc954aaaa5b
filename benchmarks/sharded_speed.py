"""How fast a text goes on whose keys are sharded: one process with shards and without, and two processes against one.

    python benchmarks/sharded_speed.py [--contexts 1024,8192,65536] [--rows 1,16,256] [--repeats 15] [--processes 2] [--prompt 128]
        [--schedules] [--out F.json]

Caches of the embedded target are filled with random keys, so a context of any length costs memory and no prompt. One process has as many
threads as there are processes in the other, which have one each. All take turns: a pass without shards, one with shards, one of all
processes, and of a prompt's part one of all processes each of which computes every row; what is given is the median of each and, turn by
turn, the median ratios. `--prompt` is the number of rows from which a pass is a part of a prompt, whose rows are then shared out however
few they are; with `--schedules` passes whose states are gathered, and shared out by rows, take turns too, and the bytes that a process gets
of a layer's states by a gather are given. The constants `SPARED` and `LARGE` are chosen by these two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import in_turn, options, parsed, save, target_for
from tree_attention import filled, tree_of

from eyas.files.target import load_target, prepared
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment
from eyas.parallel.cache import ShardedCache
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import NONE, ShardedTarget

Timed = Callable[[], float]  # seconds of a pass
WAYS = ("gather", "scatter")  # of schedules.py, which are compared


def timed(run: Callable[..., Any], *given: Any) -> float:
    began = time.perf_counter()
    run(*given)
    return time.perf_counter() - began


def rows_behind(context: int, count: int, prompt: bool) -> Rows:
    """A part of a prompt, or a tree of guesses."""
    if not prompt:
        return tree_of(count, context)
    return Rows(torch.arange(count), torch.arange(context, context + count), [Segment(0, count)])


def alone(target: TargetModel, context: int, count: int, prompt: bool) -> dict[str, Timed]:
    """Passes of one process: over one slab of keys, and over the same number of keys in shards."""
    sharded, rows = ShardedTarget(target, Layout(), Peers()), rows_behind(context, count, prompt)
    caches = {"whole": target.new_cache(1, context + count), "shards": sharded.made(1, context + count)}
    draw = torch.Generator().manual_seed(1)
    whole = caches["whole"]
    for slab in (whole.keys, whole.values):
        for layer in slab:
            layer[0, :, :context] = torch.randn(layer[0, :, :context].shape, generator=draw).to(slab.dtype)
    whole.lengths[0] = context
    filled(caches["shards"], context)
    return {name: partial(timed, target, rows, cache) for name, cache in caches.items()}


def together(target: TargetModel, peers: Peers, context: int, count: int, prompt: bool, ways: Sequence[str]) -> dict[str, Timed]:
    """Passes of one of several processes; those of a prompt's part also without sharing its rows out; and by these schedules."""
    rows, wanted = rows_behind(context, count, prompt), None if peers.first else NONE  # the first process alone wants logits
    found: dict[str, Timed] = {}

    def add(name: str, made: ShardedTarget, cache: ShardedCache) -> None:
        found[name] = partial(timed, made.run, rows, cache, (), wanted)

    sharded, whole = (ShardedTarget(target, Layout(), peers, spared=spared) for spared in (1, 1 << 30))
    add("processes", sharded, cache := cache_of(sharded, context, count))
    add("replicated", whole, cache)
    for way in ways:
        made = ShardedTarget(target, Layout(), peers, schedule=way, spared=1 << 30)
        add(way, made, cache_of(made, context, count))
    return found


def cache_of(made: ShardedTarget, context: int, count: int) -> ShardedCache:
    cache = made.made(1, context + count)
    assert isinstance(cache, ShardedCache)
    filled(cache, context)
    return cache


def gathered(target: TargetModel, peers: Peers, count: int) -> int:
    """Bytes that a gather of the states of so many rows brings a process."""
    state = target.config.num_attention_heads * (target.config.head_dim + 1) * 4
    return ShardedTarget(target, Layout(), peers).exchange.received("gather", count * state)


@torch.inference_mode()
def work(rank: int, count: int, port: int, given: tuple[Path, str], asked: Connection) -> None:
    """One process of `count`: make passes as asked, and tell their seconds. With one process the cores are all its own."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1 if count > 1 else (os.cpu_count() or 1))
    target, peers = prepared(load_target(*given), given[1]), Peers.join()
    passes: dict[str, Timed] = {}
    with target.threads():
        while (said := asked.recv()) is not None:
            if isinstance(said, str):
                asked.send(passes[said]())
            else:
                passes.clear()
                passes |= alone(target, *said[:3]) if count == 1 else together(target, peers, *said)
                asked.send(gathered(target, peers, said[1]))
    peers.leave()


class Workers:
    """`count` processes that make passes."""

    def __init__(self, count: int, given: tuple[Path, str]) -> None:
        forks = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [forks.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pipes]
        for rank, (_, theirs) in enumerate(pipes):
            forks.Process(target=work, args=(rank, count, port, given, theirs), daemon=True).start()

    def ask(self, what: str | tuple[int, int, bool, Sequence[str]] | None) -> float:
        for pipe in self.pipes:
            pipe.send(what)
        return max(pipe.recv() for pipe in self.pipes) if what is not None else 0.0


def line(one: Workers, several: Workers, context: int, rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of each pass, and of the ratios within a turn."""
    prompt, repeats, ways = rows >= given.prompt, given.repeats, WAYS if given.schedules else ()
    turns: list[dict[str, float]] = []
    _, size = (workers.ask((context, rows, prompt, ways)) for workers in (one, several))
    for turn in range(repeats + 2):
        names = in_turn(("whole", "shards", "processes", *(("replicated",) if prompt else ()), *ways), turn)
        turns.append({name: (one if name in ("whole", "shards") else several).ask(name) * 1e3 for name in names})
    turns = turns[2:]  # the first passes meet cold memory
    found = {f"{name}_ms": round(median(turn[name] for turn in turns), 2) for name in turns[0]}
    ratios = {"whole_over_shards": ("whole", "shards"), "shards_over_processes": ("shards", "processes")}
    ratios["whole_over_processes"] = ("whole", "processes")
    if prompt:
        ratios["replicated_over_processes"] = ("replicated", "processes")
    if ways:
        ratios["gather_over_scatter"] = WAYS
    return {
        "context": context,
        "rows": rows,
        **({"bytes_gathered": size} if ways else {}),
        **dict(sorted(found.items())),
        **{name: round(median(turn[above] / turn[below] for turn in turns), 3) for name, (above, below) in ratios.items()},
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--contexts", default="1024,8192,65536")
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--schedules", action="store_true")
    parser.add_argument("--precision", default="bf16")
    given = parsed(parser, words, contexts="300", rows="1,4", repeats=2, prompt=4, schedules=True)
    directory, found = target_for(given), []
    one, several = (Workers(count, (directory, given.precision)) for count in (1, given.processes))
    for context in map(int, given.contexts.split(",")):
        for rows in map(int, given.rows.split(",")):
            found.append(line(one, several, context, rows, given))
            print(json.dumps(found[-1]), flush=True)
            save(found, given.out)
    for workers in (one, several):
        workers.ask(None)


if __name__ == "__main__":
    main()
