"""What passes between processes that share a text's keys: Tree Attention, counted, beside a ring that sends the keys round.

    python benchmarks/tree_attention.py [--processes 2,4] [--contexts 4096,16384,131072] [--rows 1,16] [--out F.json]

Caches of the embedded target are filled with random keys, so a context of any length costs memory and no prompt. For each line of the
result one pass of so many rows runs in so many processes, and then the same attention as a ring: each process sends the packed keys and
values of its key heads to the next, as many times as there are other processes, and joins states as they come. Bytes are those that a
process receives; the ring's states are compared with the tree's. Seconds are of one machine's loopback, and no network's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import options, parsed, save, target_for
from torch import Tensor, distributed

from eyas.files.target import load_target, prepared
from eyas.kernels.attention import attention_with_lse
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment
from eyas.parallel.cache import ShardedCache
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.states import empty, meet
from eyas.parallel.target import ShardedTarget


def filled(cache: ShardedCache, context: int) -> None:
    """Let the cache hold a text of this many tokens, with keys drawn at random."""
    draw = torch.Generator().manual_seed(1 + cache.low)
    for shard in range(cache.count):
        held = cache.layout.held(context, cache.low + shard)
        for slab in (cache.keys, cache.values):
            slab[:, shard, :, :held] = torch.randn(slab[:, shard, :, :held].shape, generator=draw).to(slab.dtype)
        cache.inner.lengths[shard] = held
    cache.lengths[0] = context


def tree_of(rows: int, context: int) -> Rows:
    """A binary tree of guesses behind a text, or one row."""
    parents = [-1, *((row - 1) // 2 for row in range(1, rows))]
    depths = [0] * rows
    for row in range(1, rows):
        depths[row] = depths[parents[row]] + 1
    mask = ancestor_mask(parents) if rows > 1 else None
    return Rows(torch.arange(rows), torch.tensor([context + depth for depth in depths]), [Segment(0, rows, mask)])


class Ring:
    """One layer's attention as a ring: keys and values go round, states are joined as they come."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.bytes, self.seconds = peers, 0, 0.0

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The state of q [R, H, d] over all keys; `keys`, `values`: this process's [k, t, d]."""
        state, packed = empty(*q.shape, q), torch.stack([keys, values]).contiguous()
        for turn in range(self.peers.count):
            out, lse = attention_with_lse(q, *packed.float())
            state = meet(state, torch.cat([out.view(q.shape), lse[..., None]], -1))
            if turn + 1 < self.peers.count:
                packed = self.passed(packed)
        return state

    def passed(self, packed: Tensor) -> Tensor:
        """What the process before sends, while this one's goes to the next. Sizes differ by a few rows, so they go first."""
        began, count = time.perf_counter(), self.peers.count
        after, before = (self.peers.rank + 1) % count, (self.peers.rank - 1) % count
        size = torch.tensor([packed.shape[2]])
        coming = torch.empty_like(size)
        for sent, received in ((size, coming), (packed, None)):
            if received is None:
                received = packed.new_empty(*packed.shape[:2], int(coming), packed.shape[3])
            waiting = distributed.isend(sent, after)
            distributed.recv(received, before)
            waiting.wait()
        self.bytes += received.nbytes
        self.seconds += time.perf_counter() - began
        return received


def one(target: ShardedTarget, context: int, rows: int) -> dict[str, Any]:
    """A pass of this many rows behind a text of this length, and its first layer's attention as a ring."""
    cache, peers = target.made(1, context + rows + 8), target.peers
    filled(cache, context)
    target.target(tree_of(rows, context), cache)
    before, waited, began = peers.bytes["gather"], peers.seconds["gather"], time.perf_counter()
    calls = peers.calls["gather"]
    target.target(tree_of(rows, context), cache)
    seconds, layers = time.perf_counter() - began, target.config.num_hidden_layers
    q = torch.randn(rows, target.config.num_attention_heads, target.config.head_dim, generator=torch.Generator().manual_seed(2))
    parts = [(shard, cache.inner.lengths[shard]) for shard in range(cache.count)]
    keys, values = (torch.cat([slab[0, shard, :, :held] for shard, held in parts], 1) for slab in (cache.keys, cache.values))
    ring = Ring(peers)
    state = ring.attend(q, keys, values)
    own, lse = attention_with_lse(q, keys.float(), values.float())
    everyone = peers.gather(torch.cat([own.view(q.shape), lse[..., None]], -1)) if peers.count > 1 else state[None]
    joined = everyone[0]
    for each in everyone[1:]:
        joined = meet(joined, each)
    assert torch.allclose(joined, state, rtol=1e-4, atol=1e-4), "a ring's states and the tree's are those of the same keys"
    tree = peers.bytes["gather"] - before - (everyone.nbytes - everyone[0].nbytes if peers.count > 1 else 0)
    return {
        "processes": peers.count,
        "context": context,
        "rows": rows,
        "collectives_a_layer": (peers.calls["gather"] - calls - (peers.count > 1)) / layers,
        "tree_bytes": tree,
        "ring_bytes": ring.bytes * layers,
        "ring_over_tree": round(ring.bytes * layers / tree, 1) if tree else None,
        "keys_mb": round(2 * sum(held for _, held in parts) * layers * keys.shape[0] * keys.shape[2] * keys.element_size() / 1e6, 1),
        "pass_ms": round(seconds * 1e3, 1),
        "waited_ms": round((peers.seconds["gather"] - waited) * 1e3, 1),
    }


@torch.inference_mode()
def work(rank: int, count: int, port: int, directory: Path, jobs: list[tuple[int, int]], out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    peers = Peers.join()
    target = ShardedTarget(prepared(load_target(directory, "bf16"), "bf16"), Layout(), peers)
    for context, rows in jobs:
        found = one(target, context, rows)
        if peers.first:
            out.put(found)
    peers.leave()


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--contexts", default="4096,16384,131072")
    parser.add_argument("--rows", default="1,16")
    given = parsed(parser, words, processes="2", contexts="300", rows="1,4")
    processes, contexts, rows = ([int(each) for each in text.split(",")] for text in (given.processes, given.contexts, given.rows))
    jobs, directory, rows_found = [(context, count) for context in contexts for count in rows], target_for(given), []
    forks = multiprocessing.get_context("fork")
    for count in processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = forks.Queue()
        workers = [forks.Process(target=work, args=(rank, count, port, directory, jobs, out)) for rank in range(count)]
        for worker in workers:
            worker.start()
        for _ in jobs:
            rows_found.append(out.get(timeout=600))
            print(json.dumps(rows_found[-1]), flush=True)
            save(rows_found, given.out)
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
