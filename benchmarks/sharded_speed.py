"""How fast a text goes on whose keys are sharded: one process with shards and without, and two processes against one.

    python benchmarks/sharded_speed.py [--contexts 1024,8192,65536] [--rows 1,16,256] [--repeats 15] [--processes 2] [--out F.json]

Caches of the embedded target are filled with random keys, so a context of any length costs memory and no prompt. One process has as many
threads as there are processes in the other, which have one each. All take turns: a pass without shards, one with shards, one of all
processes, and of a prompt's part one of all processes each of which computes every row; what is given is the median of each and, turn by
turn, the median ratios.
"""

from __future__ import annotations

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
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import NONE, SPARED, ShardedTarget

Timed = Callable[[], float]  # seconds of a pass
PROMPT = 128  # rows from which on a pass is a part of a prompt, and no tree


def timed(run: Callable[..., Any], *given: Any) -> float:
    began = time.perf_counter()
    run(*given)
    return time.perf_counter() - began


def rows_behind(context: int, count: int) -> Rows:
    """A tree of guesses, or from 128 rows on a part of a prompt."""
    if count < PROMPT:
        return tree_of(count, context)
    return Rows(torch.arange(count), torch.arange(context, context + count), [Segment(0, count)])


def alone(target: TargetModel, context: int, count: int) -> dict[str, Timed]:
    """Passes of one process: over one slab of keys, and over the same number of keys in shards."""
    sharded, rows = ShardedTarget(target, Layout(), Peers()), rows_behind(context, count)
    caches = {"whole": target.new_cache(1, context + count), "shards": sharded.made(1, context + count)}
    draw = torch.Generator().manual_seed(1)
    whole = caches["whole"]
    for slab in (whole.keys, whole.values):
        for layer in slab:
            layer[0, :, :context] = torch.randn(layer[0, :, :context].shape, generator=draw).to(slab.dtype)
    whole.lengths[0] = context
    filled(caches["shards"], context)
    return {name: partial(timed, target, rows, cache) for name, cache in caches.items()}


def together(target: TargetModel, peers: Peers, context: int, count: int) -> dict[str, Timed]:
    """Passes of one of several processes; those of a prompt's part also without sharing its rows out."""
    sharded, whole = (ShardedTarget(target, Layout(), peers, spared=spared) for spared in (SPARED, 1 << 30))
    cache, rows = sharded.made(1, context + count), rows_behind(context, count)
    filled(cache, context)
    wanted = None if peers.first else NONE  # the first process alone wants logits
    return {name: partial(timed, each.run, rows, cache, (), wanted) for name, each in (("processes", sharded), ("replicated", whole))}


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
                passes |= alone(target, *said) if count == 1 else together(target, peers, *said)
                asked.send(0.0)
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

    def ask(self, what: str | tuple[int, int] | None) -> float:
        for pipe in self.pipes:
            pipe.send(what)
        return max(pipe.recv() for pipe in self.pipes) if what is not None else 0.0


def line(one: Workers, several: Workers, context: int, rows: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each pass, and of the ratios within a turn."""
    turns: list[dict[str, float]] = []
    for workers in (one, several):
        workers.ask((context, rows))
    for turn in range(repeats + 2):
        names = in_turn(("whole", "shards", "processes", *(("replicated",) if rows >= PROMPT else ())), turn)
        turns.append({name: (one if name in ("whole", "shards") else several).ask(name) * 1e3 for name in names})
    turns = turns[2:]  # the first passes meet cold memory
    found = {f"{name}_ms": round(median(turn[name] for turn in turns), 2) for name in turns[0]}
    ratios = {"whole_over_shards": ("whole", "shards"), "shards_over_processes": ("shards", "processes")}
    ratios["whole_over_processes"] = ("whole", "processes")
    if rows >= PROMPT:
        ratios["replicated_over_processes"] = ("replicated", "processes")
    return {
        "context": context,
        "rows": rows,
        **dict(sorted(found.items())),
        **{name: round(median(turn[above] / turn[below] for turn in turns), 3) for name, (above, below) in ratios.items()},
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--contexts", default="1024,8192,65536")
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    given = parsed(parser, words, contexts="300", rows="1,4", repeats=2)
    directory, found = target_for(given), []
    one, several = (Workers(count, (directory, given.precision)) for count in (1, given.processes))
    for context in map(int, given.contexts.split(",")):
        for rows in map(int, given.rows.split(",")):
            found.append(line(one, several, context, rows, given.repeats))
            print(json.dumps(found[-1]), flush=True)
            save(found, given.out)
    for workers in (one, several):
        workers.ask(None)


if __name__ == "__main__":
    main()
