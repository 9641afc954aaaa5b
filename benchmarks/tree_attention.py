"""What Tree Attention sends and holds, counted, beside a ring that sends the keys round.

    python benchmarks/tree_attention.py [--processes 2,4,8] [--contexts 4096,16384,131072] [--rows 1,16] [--memory 65536] [--out F.json]

*Passes*: caches of the embedded target are filled with random keys, so a context of any length costs memory and no prompt; one pass of so
many rows runs in so many processes, and then the same attention as a ring (one layer of it, times the layers). *Tokens*: texts are decoded
plainly and with draft trees in two processes; what passed between them is shared out over the tokens written. *Memory*: the peak of each
process, forked once the weights are there, of which these are no part. Bytes are those that a process receives; the ring's states are
compared with the tree's. Seconds are tree_attention_network.py's.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import DEV, engine_for, options, parsed, rounded, save, target_for
from torch import Tensor, distributed

from eyas.bench.prompts import read_prompts
from eyas.config import EyasError
from eyas.engine import Engine
from eyas.files.target import load_target, prepared
from eyas.kernels import native
from eyas.kernels.attention import Attend, attention_with_lse
from eyas.model.mask import ancestor_mask, causal_mask
from eyas.model.rows import Rows, Segment
from eyas.model.target import Target
from eyas.parallel.cache import ShardedCache
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.states import empty, meet
from eyas.parallel.target import ShardedTarget

PATIENT = 600.0  # seconds in which processes answer: filling a cache takes a busy machine long
TREES = {4: "3x2x2", 16: "15x4x4", 64: "63x6x8"}  # by rows: the nodes, and the root


def filled(cache: ShardedCache, context: int) -> None:
    """Let the cache hold a text of this many tokens, with keys drawn at random: as many as a block, over and over."""
    draw, held, block = torch.Generator().manual_seed(1 + cache.low), cache.part(context), cache.layout.block
    for slab in (cache.keys, cache.values):
        some = torch.randn(slab[:, 0, :, :block].shape, generator=draw).to(slab.dtype)
        for start in range(0, held, block):
            slab[:, 0, :, start : min(start + block, held)] = some[:, :, : held - start]
    cache.lengths[0], cache.inner.lengths[0] = context, held


def tree_of(rows: int, context: int) -> Rows:
    """A binary tree of guesses behind a text, or one row."""
    parents = [-1, *((row - 1) // 2 for row in range(1, rows))]
    depths = [0] * rows
    for row in range(1, rows):
        depths[row] = depths[parents[row]] + 1
    mask = ancestor_mask(parents) if rows > 1 else None
    return Rows(torch.arange(rows), torch.tensor([context + depth for depth in depths]), [Segment(0, rows, mask)])


class Ring:
    """A fair ring: each process has a run of the keys, packed; in each layer they go round, key heads only, the next ones under way while
    the last are attended over, and states are joined as they come. Its layers' attention is that of a pass, as a cache's is."""

    def __init__(self, peers: Peers, shape: tuple[int, int, int], held: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> None:
        """`shape`: layers, key heads and their width; `held`: how many positions each process holds."""
        self.peers, self.held, self.turns, self.bytes = peers, held, peers.count, 0
        self.sends = True  # False: it attends over its own keys so many turns, which takes the time that attention takes
        self.packed = torch.ones(shape[0], 2, shape[1], max(held), shape[2], dtype=dtype)
        self.coming = [torch.empty_like(self.packed[0]) for _ in range(3 if peers.count > 1 else 0)]
        self.ahead: list[tuple[Any, Tensor]] = []  # what may come already, and where to
        self.left = self.number = 0
        self.segment: Segment | None = None

    def filled(self, cache: ShardedCache) -> Ring:
        """With the keys that a cache holds here."""
        for layer, packed in enumerate(self.packed):
            for place, slab in zip(packed, (cache.keys, cache.values), strict=True):
                held = cache.inner.lengths[0]
                place[:, :held] = slab[layer, 0, :, :held]
        return self

    def of(self, segment: Segment) -> Ring:
        """The attention of a pass of these rows."""
        self.segment, self.left = segment, len(self.packed) * (self.peers.count - 1)
        return self

    def layer(self, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert self.segment is not None
            seen = causal_mask(self.segment.count) if self.segment.mask is None else self.segment.mask
            out, lse = attention_with_lse(q, k.transpose(0, 1), v.transpose(0, 1), seen)
            rows = torch.cat([out.view(q.shape), lse[..., None]], -1).float()
            return meet(self.state(q, layer), rows)[..., :-1].flatten(1).to(q.dtype)

        return attend

    def state(self, q: Tensor, layer: int) -> Tensor:
        """The state of q [R, H, d] over all keys of a layer."""
        state, here = empty(*q.shape, torch.empty(0)), self.packed[layer]
        rank, count = self.peers.rank, self.peers.count
        for turn in range(self.turns):
            sends = self.sends and turn + 1 < self.turns
            if sends:
                going, (received, coming) = distributed.isend(here, (rank + 1) % count), self.next()
            state = meet(state, self.part(q, here, self.held[(rank - turn) % count]))
            if sends:
                going.wait()
                received.wait()
                here = coming
                self.bytes += here.nbytes
        return state

    def next(self) -> tuple[Any, Tensor]:
        """What comes next, and where it will be; from here on the one after it may come too."""
        self.left = self.left or self.peers.count - 1  # of one layer alone
        while len(self.ahead) < min(2, self.left):
            coming = self.coming[self.number % len(self.coming)]
            self.ahead.append((distributed.irecv(coming, (self.peers.rank - 1) % self.peers.count), coming))
            self.number += 1
        self.left -= 1
        return self.ahead.pop(0)

    def part(self, q: Tensor, packed: Tensor, held: int) -> Tensor:
        """The state of q over one process's keys."""
        if not native.attends(packed):
            out, lse = attention_with_lse(q.float(), *packed[:, :, :held].float())
        else:
            rows, lse = len(q), torch.empty(q.shape[:2])
            nowhere, zeros, all_of_it = (torch.full((rows + 1,), number) for number in (-1, 0, held))
            plan = native.RowPlan(nowhere[1:], zeros[1:], zeros[1:], all_of_it[1:], zeros, zeros[:0])
            out = native.attention(q, *packed.new_zeros(2, rows, packed.shape[1], packed.shape[3]), packed[:1], packed[1:], plan, lse)
        return torch.cat([out.view(q.shape).float(), lse[..., None]], -1)


def passes(_: int, target: Target, context: int, rows: int) -> dict[str, Any]:
    """A pass of this many rows behind a text of this length, and its first layer's attention as a ring."""
    peers = Peers.join(timeout=PATIENT)
    cache, layers = ShardedTarget(target, Layout(), peers).made(1, context + rows), target.config.num_hidden_layers
    filled(cache, context)
    target(tree_of(rows, context), cache)
    calls, tree = peers.carried
    q = torch.randn(rows, target.config.num_attention_heads, target.config.head_dim, generator=torch.Generator().manual_seed(2))
    held = peers.gather(torch.tensor([sum(cache.inner.lengths)])).flatten().tolist()
    ring = Ring(peers, (1, *shape_of(target)[1:]), held, cache.keys.dtype).filled(cache)
    state, own = ring.state(q, 0), ring.part(q, ring.packed[0], ring.held[peers.rank])
    joined, *others = peers.gather(own).unbind(0)
    for each in others:
        joined = meet(joined, each)
    assert torch.allclose(joined, state, rtol=1e-4, atol=1e-4), "a ring's states and the tree's are those of the same keys"
    peers.leave()
    return {
        "processes": peers.count,
        "context": context,
        "rows": rows,
        "collectives_a_layer": calls / layers,
        "tree_bytes": tree,
        "ring_bytes": ring.bytes * layers,
        "ring_over_tree": round(ring.bytes * layers / tree, 1),
        "keys_bytes": bytes_held(cache),
        "keys_over_share": round(bytes_held(cache) * peers.count / (bytes_a_position(cache) * context), 4),
    }


def bytes_a_position(cache: ShardedCache) -> int:
    """Bytes of a position's key and value in all layers."""
    return 2 * cache.keys.element_size() * cache.keys.shape[0] * cache.keys.shape[2] * cache.keys.shape[4]


def bytes_held(cache: ShardedCache) -> int:
    return bytes_a_position(cache) * sum(cache.inner.lengths)


def tokens(_: int, load: Callable[[], Engine], prompts: Sequence[str], rows: Sequence[int], length: int) -> list[dict[str, Any]]:
    """For plain decoding and trees of so many rows, what passed between the processes for each token behind a text's first: the prompts'
    own passes are left out. Returns in the first process alone."""
    engine = load()
    target = engine.target
    assert isinstance(target, ShardedTarget)

    def counted(most: int, **settings: Any) -> torch.Tensor:
        """Tokens, passes, gathers and bytes of texts of at most so many tokens."""
        before = torch.tensor([target.passes, target.peers.carried[0], sum(target.peers.bytes.values())])
        written = sum(len(engine.generate(prompt, temperature=0.0, max_new_tokens=most, **settings).tokens) for prompt in prompts)
        after = torch.tensor([target.passes, target.peers.carried[0], sum(target.peers.bytes.values())])
        return torch.cat([torch.tensor([written]), after - before])

    found, layers = [], target.target.config.num_hidden_layers
    for count in (1, *rows):
        settings = {"method": "plain"} if count == 1 else {"method": "eagle3", "copy": False, "tree": TREES[count]}
        written, seen, calls, size = (counted(length + 1, **settings) - counted(1, **settings)).tolist()
        found.append(
            {
                "rows": count,
                "processes": target.peers.count,
                "tokens": written,
                "tau": round(written / seen, 3),
                "collectives_a_token": round(calls / written, 2),
                "collectives_a_token_and_layer": round(calls / written / layers, 3),
                "bytes_a_token": round(size / written),
            }
        )
    target.stop()
    return found


def memory(_: int, target: Target, kind: str, context: int, rows: int) -> dict[str, Any]:
    """The peak of this process, beyond what it had when it was forked and when it had met the others, for a pass of the tree or a ring."""
    before, peers, given = peak_mb(), Peers.join(timeout=PATIENT), tree_of(rows, context)
    met, sharded = peak_mb(), ShardedTarget(target, Layout(), peers)
    if kind == "tree":
        cache = sharded.made(1, context + rows)
        filled(cache, context)
        target(given, cache)
        keys, room = bytes_held(cache), cache.keys.nbytes + cache.values.nbytes
    else:
        ring = Ring(peers, shape_of(target), evenly(context, peers.count))
        target.read(given.tokens, given.positions, ring.of(given.segments[0]), (), None)
        keys, room = ring.packed.nbytes, ring.packed.nbytes + sum(each.nbytes for each in ring.coming)
    sizes = {"weights_mb": before, "meeting_mb": met - before, "keys_mb": keys / 1e6, "room_mb": room / 1e6, "more_mb": peak_mb() - met}
    peers.leave()
    return {"processes": peers.count, "kind": kind, "context": context, "rows": rows, **rounded(sizes, 2)}


def evenly(context: int, count: int) -> list[int]:
    """Positions of each of so many processes."""
    return [context * (rank + 1) // count - context * rank // count for rank in range(count)]


def shape_of(target: Target) -> tuple[int, int, int]:
    """Layers, key heads and their width."""
    config = target.config
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


def peak_mb() -> float:
    """The most memory that this process has had at once, in MB: Linux counts KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def forked(count: int, work: Callable[[int], Any], board: bool = False) -> list[Any]:
    """What `work` returns in each of so many processes, which can meet as those of `torchrun` do; None for one that ends before.
    `board`: what they send may pass in shared memory, else over the network. Raises `EyasError` where the first one ends before."""
    port = free_port()
    forks = multiprocessing.get_context("fork")

    def one(rank: int, end: Any) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ["EYAS_BOARD"] = str(int(board))
        torch.set_num_threads(1)  # its other threads do not survive a fork
        with torch.inference_mode():
            end.send(work(rank))

    ends = [forks.Pipe(duplex=False) for _ in range(count)]
    workers = [forks.Process(target=one, args=(rank, ends[rank][1])) for rank in range(count)]
    for worker, (_, there) in zip(workers, ends, strict=True):
        worker.start()
        there.close()
    found = []
    for here, _ in ends:
        try:
            found.append(here.recv())
        except EOFError:
            found.append(None)
    for worker in workers:
        worker.join()
    if found[0] is None:
        raise EyasError("a process of this run ended before its time; what it said is above")
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--processes", default="2,4,8", help="of passes")
    parser.add_argument("--contexts", default="4096,16384,131072", help="of passes")
    parser.add_argument("--rows", default="1,16", help="of passes")
    parser.add_argument("--trees", default="16,64", help="rows of the trees with which texts are written")
    parser.add_argument(
        "--memory", type=int, default=65536, help="context for which memory is taken, in one process and the first two numbers of them"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="tokens of each text")
    small = {"processes": "2", "contexts": "300", "rows": "1,4", "trees": "4", "memory": 300, "prompts": 1, "length": 4}
    given = parsed(parser, words, **small)
    listed = (given.processes, given.contexts, given.rows, given.trees)
    processes, contexts, rows, trees = ([int(each) for each in text.split(",")] for text in listed)
    prompts = [item.prompt for item in read_prompts(DEV)[0]][: given.prompts]
    target = prepared(load_target(target_for(given), "bf16"), "bf16")
    assert isinstance(target, Target)
    found: dict[str, list[dict[str, Any]]] = {"passes": [], "tokens": [], "memory": []}

    def note(what: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            print(json.dumps({"of": what, **row}), flush=True)
        found[what] += rows
        save(found, given.out)

    for count, context, many in itertools.product(processes, contexts, rows):
        note("passes", forked(count, partial(passes, target=target, context=context, rows=many))[:1])
    load = partial(engine_for, given, context_parallel=True)
    note("tokens", forked(2, partial(tokens, load=load, prompts=prompts, rows=trees, length=given.length))[0])
    for count, kind in itertools.product((1, *processes[:2]), ("tree", "ring")):
        of_each = forked(count, partial(memory, target=target, kind=kind, context=given.memory, rows=rows[1]))
        note("memory", [max(of_each, key=lambda row: row["more_mb"])])


if __name__ == "__main__":
    main()
