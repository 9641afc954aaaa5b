"""Seconds of a pass over a network of chosen delay and rate: Tree Attention beside a ring, and what a cost model says of both.

    python benchmarks/tree_attention_network.py [--processes 2,3,4] [--delays 0.05,0.5,5] [--contexts 4096,16384,65536] [--out F.json]

Needs root, /dev/net/tun and a C compiler: each process has a network namespace of its own, and `delayed_links.c` carries packets between
them, since many kernels lack the netem queue by which `tc` would delay them. Its own time is part of the latency, which is measured, as the
rate is, with gloo's messages. For each line a pass of the embedded target behind a context of random keys is timed: over the network, and
with answers at once (all processes at work at the same time, as they are between two gathers). From the second, latency, rate and counted
bytes tree_attention_model.py says the first. `--quick` runs it between two processes without a network of their own.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from common import options, parsed, save, target_for
from torch import Tensor, distributed
from tree_attention import Ring, evenly, filled, free_port, shape_of, tree_of
from tree_attention_model import ring_pass, tree_pass

from eyas.config import EyasError
from eyas.files.target import load_target, prepared
from eyas.model.rows import Rows
from eyas.model.target import Target
from eyas.parallel.cache import ShardedCache
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Group, Peers
from eyas.parallel.target import ShardedTarget

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
# As machines that work together are set: room for what is under way, and a connection that was idle goes on as fast as it was. Nothing is
# lost here, so Reno soon sends at the rate there is, where cubic takes the queue that the rate makes for a sign to slow down.
SET = """cd /proc/sys/net/ipv4
echo 0 > tcp_slow_start_after_idle
echo reno > tcp_congestion_control
echo '4096 8388608 33554432' | tee tcp_rmem > tcp_wmem"""
SMALL, LARGE = 2048, 4 << 20  # bytes of a message whose latency, and whose rate, is measured


# ---- the network ----


class Loopback:
    """No network of its own: for --quick."""

    device, address = "lo", "127.0.0.1"

    def enter(self, rank: int) -> None:
        pass

    def set(self, delay_ms: float, rate: float) -> None:
        pass


class Namespaces:
    """A namespace for each process, and the program that carries packets between them."""

    device, address = "eyas0", "10.77.0.1"

    def __init__(self, names: Sequence[str], links: subprocess.Popen[str]) -> None:
        self.names, self.links = names, links

    def enter(self, rank: int) -> None:
        """Let this process see the network of a rank's namespace alone."""
        with open(f"/run/netns/{self.names[rank]}") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.names[rank]}")

    def set(self, delay_ms: float, rate: float) -> None:
        """From now on; `rate` in bytes a second."""
        assert self.links.stdin and self.links.stdout
        self.links.stdin.write(f"{1e3 * delay_ms} {rate}\n")
        self.links.stdin.flush()
        self.links.stdout.readline()


def ran(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EyasError(
            f"{' '.join(words[:3])} failed, {getattr(error, 'stderr', error)}; this needs root, iproute2 and a C compiler"
        ) from None


@contextmanager
def namespaces(count: int) -> Iterator[Namespaces]:
    names = [f"eyas-{os.getpid()}-{rank}" for rank in range(count)]
    with ExitStack() as stack:
        program = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "links"
        ran("cc", "-O2", "-o", str(program), str(Path(__file__).with_name("delayed_links.c")))
        for name in names:
            ran("ip", "netns", "add", name)
            stack.callback(ran, "ip", "netns", "del", name)
        links = stack.enter_context(subprocess.Popen([program, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        if not links.stdout or links.stdout.readline() != "ready\n":
            raise EyasError("no devices could be made in the namespaces; is there /dev/net/tun?")
        for rank, name in enumerate(names):
            ran("ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eyas0")
            ran("ip", "-n", name, "link", "set", "eyas0", "mtu", "65535", "up")
            ran("ip", "-n", name, "link", "set", "lo", "up")
            ran("ip", "netns", "exec", name, "sh", "-c", SET)
        yield Namespaces(names, links)


# ---- a process ----


class AtOnce(Peers):
    """Peers that answer at once with this process's own states: a pass without a network."""

    def gather(self, state: Tensor, name: str = "", group: Group | None = None, more: bool = False) -> Tensor:
        return state.expand(self.count, *state.shape)

    def everyones(self, fact: Any) -> list[Any]:
        return [fact] * self.count


class Worker:
    """One of the processes. Each job is asked of all, and each answers; in most all take part."""

    def __init__(self, target: Target, peers: Peers) -> None:
        self.target, self.peers = target, peers
        alone = AtOnce(peers.rank, peers.count)
        alone.control = peers.control
        # What a cache gives a pass, without the network and over it.
        self.attend = [ShardedTarget(target, Layout(), each, "gather").made(1, 1).attend for each in (alone, peers)]
        self.cache: ShardedCache | None = None
        self.ring: Ring | None = None
        self.rows: Rows | None = None

    def link(self, repeats: int) -> dict[str, float]:
        """Seconds of a small message from the first process to the second, and bytes a second of large ones; zeros in the others."""
        found = {}
        for what, size, times in (("latency", SMALL, repeats), ("rate", LARGE, 3)):
            if self.peers.rank < 2:
                taken, message, answer = [], torch.zeros(size, dtype=torch.uint8), torch.zeros(SMALL, dtype=torch.uint8)
                for _ in range(times + 2):
                    began = time.perf_counter()
                    for sender, each in ((0, message), (1, answer)):
                        (distributed.send if self.peers.rank == sender else distributed.recv)(each, 1 - self.peers.rank)
                    taken.append(time.perf_counter() - began)
                found[what] = statistics.median(taken[2:])
            distributed.barrier()
        if self.peers.rank > 1:
            return {"latency": 0.0, "rate": 0.0}
        return {"latency": found["latency"] / 2, "rate": LARGE / max(found["rate"] - found["latency"], 1e-6)}

    def prepare(self, context: int, rows: int) -> None:
        """Keys for both ways, and the rows of a pass."""
        self.cache = self.ring = None
        self.rows = tree_of(rows, context)
        self.cache = ShardedTarget(self.target, Layout(), self.peers).made(1, context + rows)
        filled(self.cache, context)
        self.ring = Ring(self.peers, shape_of(self.target), evenly(context, self.peers.count))

    def tree(self, over: bool) -> dict[str, float]:
        """Seconds of a pass, and the bytes received in it. `over`: over the network, or answered at once."""
        assert self.cache and self.rows
        rows, cache = self.rows, self.cache
        cache.attend, before = self.attend[over], self.peers.carried[1]
        return {"seconds": self.timed(lambda: self.target(rows, cache), over), "bytes": self.peers.carried[1] - before}

    def round(self, over: bool, turns: int) -> dict[str, float]:
        """The same by the ring; of so many turns where it is not over the network."""
        assert self.ring and self.rows
        rows, ring = self.rows, self.ring
        ring.turns, ring.sends, before = turns, over, ring.bytes
        run = lambda: self.target.read(rows.tokens, rows.positions, ring.of(rows.segments[0]), (), None)  # noqa: E731
        return {"seconds": self.timed(run, over), "bytes": ring.bytes - before}

    def timed(self, run: Callable[[], Any], told: bool) -> float:
        """Of a pass that the first process tells, as in decoding. All begin together."""
        distributed.barrier()
        began = time.perf_counter()
        if told:
            self.peers.tell("a pass")
        run()
        return time.perf_counter() - began


@torch.inference_mode()
def work(rank: int, count: int, network: Any, port: int, target: Target, jobs: Any) -> None:
    network.enter(rank)
    os.environ |= {"MASTER_ADDR": network.address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"GLOO_SOCKET_IFNAME": network.device, "EYAS_BOARD": "0"}  # as between machines
    torch.set_num_threads(1)  # its other threads do not survive a fork
    worker = Worker(target, Peers.join(timeout=300))
    jobs.send(None)
    while (job := jobs.recv()) is not None:
        jobs.send(getattr(worker, job[0])(*job[1:]))
    worker.peers.leave()


class Workers:
    """All processes, as one that is asked."""

    def __init__(self, count: int, network: Any, target: Target) -> None:
        port = free_port()
        forks = multiprocessing.get_context("fork")
        pipes = [forks.Pipe() for _ in range(count)]
        self.ends = [here for here, _ in pipes]
        self.processes = [forks.Process(target=work, args=(rank, count, network, port, target, pipes[rank][1])) for rank in range(count)]
        for process in self.processes:
            process.start()
        for _, there in pipes:
            there.close()
        self.answers()

    def answers(self) -> list[Any]:
        return [end.recv() for end in self.ends]

    def ask(self, *job: Any) -> list[Any]:
        for end in self.ends:
            end.send(job)
        return self.answers()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for end in self.ends:
            if kind is None:
                end.send(None)
        for process in self.processes:
            if kind is not None:
                process.kill()
            process.join()


# ---- what is measured ----


def lines(workers: Workers, network: Any, given: Any, count: int, layers: int) -> Iterator[dict[str, Any]]:
    """What each pass took and what the model says, for every context, number of rows and delay."""
    for context, rows in itertools.product(given.contexts, given.rows):
        network.set(0, 0)
        workers.ask("prepare", context, rows)
        for job in (("tree", True), ("round", False, 1)):
            workers.ask(*job)  # a first pass is no measure
        for delay in given.delays:
            network.set(delay, given.rate * 1e6)
            link = workers.ask("link", 20)[0]
            about = {"processes": count, "context": context, "rows": rows, "delay_ms": delay}
            about |= {"latency_ms": round(1e3 * link["latency"], 3), "rate_mb": round(link["rate"] / 1e6, 1)}
            alone, over = in_turns(workers, [("tree", False), ("tree", True)], given.repeats)
            size = over["bytes"] / layers / (count - 1)
            said = tree_pass(alone["seconds"], layers, count, size, link["latency"], link["rate"])
            yield about | line_of("tree", alone, over, said)
            if rows * context > given.ring_most:
                continue
            once, alone, over = in_turns(
                workers, [("round", False, 1), ("round", False, count), ("round", True, count)], given.ring_repeats
            )
            part = max(alone["seconds"] - once["seconds"], 0.0) / layers / (count - 1)
            rest, size = once["seconds"] - layers * part, over["bytes"] / layers / (count - 1)
            said = ring_pass(rest, part, layers, count, size, link["latency"], link["rate"])
            yield about | line_of("ring", alone, over, said)


def in_turns(workers: Workers, jobs: Sequence[tuple[Any, ...]], repeats: int) -> list[dict[str, float]]:
    """For each job the median of its seconds, all jobs one after another so many times. Where processes end for themselves it is the
    slowest that counts; where they meet, the first."""
    found: list[list[dict[str, float]]] = [[] for _ in jobs]
    for _ in range(repeats):
        for job, each in zip(jobs, found, strict=True):
            answers = workers.ask(*job)
            each.append(answers[0] if job[1] else max(answers, key=lambda answer: answer["seconds"]))
    return [{"seconds": statistics.median(one["seconds"] for one in each), "bytes": each[0]["bytes"]} for each in found]


def line_of(kind: str, alone: dict[str, float], over: dict[str, float], said: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "bytes": over["bytes"],
        "alone_ms": round(1e3 * alone["seconds"], 1),
        "measured_ms": round(1e3 * over["seconds"], 1),
        "model_ms": round(1e3 * said, 1),
        "model_over_measured": round(said / over["seconds"], 3),
    }


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: milliseconds a pass, measured and as the model says, of the tree and of the ring."""
    about = ("processes", "context", "rows", "delay_ms")
    lines = [
        "| processes | context | rows | delay, ms | latency, ms | tree, ms (model) | ring, ms (model) |",
        "|---|---|---|---|---|---|---|",
    ]
    for tree in found:
        if tree["kind"] == "ring":
            continue
        ring = [each for each in found if each["kind"] == "ring" and all(each[name] == tree[name] for name in about)]
        times = [f"{each['measured_ms']:.0f} ({each['model_ms']:.0f})" for each in (tree, *ring)]
        cells = [f"{tree['processes']}", f"{tree['context']:,}", f"{tree['rows']}", f"{tree['delay_ms']}", f"{tree['latency_ms']}"]
        lines.append("| " + " | ".join([*cells, *times, *["not timed"] * (2 - len(times))]) + " |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--processes", default="2,3,4")
    parser.add_argument("--contexts", default="4096,16384,65536")
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--delays", default="0.05,0.5,5", help="milliseconds, one way")
    parser.add_argument("--rate", type=float, default=125.0, help="MB a second that a process can send")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ring-repeats", type=int, default=1)
    parser.add_argument("--ring-most", type=int, default=262144, help="rows times context up to which the ring is timed too")
    small = {"processes": "2", "contexts": "300", "rows": "1,4", "delays": "0", "repeats": 1}
    given = parsed(parser, words, **small)
    for name, kind in (("processes", int), ("contexts", int), ("rows", int), ("delays", float)):
        setattr(given, name, [kind(each) for each in getattr(given, name).split(",")])
    target = prepared(load_target(target_for(given), "bf16"), "bf16")
    assert isinstance(target, Target)
    found: list[dict[str, Any]] = []
    for count in given.processes:
        with ExitStack() as stack:
            network = Loopback() if given.quick else stack.enter_context(namespaces(count))
            workers = stack.enter_context(Workers(count, network, target))
            for line in lines(workers, network, given, count, target.config.num_hidden_layers):
                print(json.dumps(line), flush=True)
                found.append(line)
                save({"rate_mb": given.rate, "torch": torch.__version__, "rows": found}, given.out)
    print("\n".join(table(found)))
    off = [abs(each["model_over_measured"] - 1) for each in found]
    print(f"{sum(each <= 0.2 for each in off)} of {len(off)} lines within 20%, median {100 * statistics.median(off):.0f}% off")


if __name__ == "__main__":
    main()
