"""How the states of a layer's rows come together: which messages carry them, in what order. The same bits whichever it is.

- gather: every process gets the states of all; one message, of (N - 1) states a process with N processes.
- scatter: each process gets the states of its share of the rows, joins them, and the joined rows are gathered: two messages, of
  2 (N - 1) / N states. For many rows.
- nodes: first among the processes of a node, whose states are joined, then between nodes: two messages, and few bytes between nodes.
- nodes-scatter: the same with the rows shared out within a node: three messages. For many rows.

States meet along the one tree over all shards in each of them: a schedule decides where that is done. Knows layouts, processes and states;
knows nothing of keys or rows' meaning.

Axes: R rows of the pass, H query heads, d head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.config import EyasError
from eyas.kernels import native
from eyas.parallel.layout import Layout, Together
from eyas.parallel.peers import Group, Peers
from eyas.parallel.states import State, empty, join

Subtree = tuple[int, int]  # first shard, size
Joiner = Callable[[Tensor, Sequence[Subtree], Sequence[Subtree]], Tensor]  # states [n, ..] of subtrees -> [m, ..] of larger ones
SCHEDULES = ("auto", "gather", "scatter", "nodes", "nodes-scatter")
# Bytes that a gather may bring a process; beyond, the rows are shared out: two messages of fewer bytes. benchmarks/sharded_speed.py
# --schedules, three processes of one machine with much other work: at 0.37 MB a gather is ahead (0.89 of the time), at 1.5 MB neither is.
LARGE = 1 << 20


@dataclass(frozen=True)
class Level:
    """Processes that make of their states those of larger subtrees."""

    name: str  # by which its messages are counted
    group: Group | None  # None: all processes
    count: int
    parts: Sequence[Sequence[Subtree]]  # what each of them has, in the order of ranks
    wanted: Sequence[Subtree]  # what they make together
    most: int  # states that each sends; those beyond its own are empty

    @property
    def given(self) -> list[Subtree]:
        return [subtree for part in self.parts for subtree in part]

    def picked(self, states: Tensor) -> Tensor:
        """States [given, ..] of [count * most, ..]: without the empty ones."""
        places = [rank * self.most + number for rank, part in enumerate(self.parts) for number in range(len(part))]
        return states if len(places) == len(states) else states[torch.tensor(places, device=states.device)]


class Schedule(NamedTuple):
    """One way for the states of a layer's rows."""

    peers: Peers
    levels: Sequence[Level]
    shares: bool  # whether the processes of the first level share the rows out
    whole: Subtree

    @property
    def subtrees(self) -> list[Subtree]:
        """Of which subtrees `carry` gives the states; they are all shards together."""
        return [self.whole] if self.shares else self.levels[-1].given

    def carry(self, sent: Tensor, joined: Joiner, more: bool = False) -> Tensor:
        """The states [subtrees, R, H, d + 1] of all processes together, from this one's [most, R, H, d + 1], which ends in empty ones.
        `more`: those of another layer's same rows come next."""
        rows, first = sent.shape[1], self.levels[0]
        for level, most in zip(self.levels, [*(level.most for level in self.levels[1:]), 1], strict=True):
            if self.shares and level is first:
                everyone = self.peers.scatter(in_shares(sent, level.count), f"{level.name} scatter", level.group)
            else:
                everyone = self.peers.gather(sent, level.name, level.group, more)
            states = level.picked(everyone.flatten(0, 1))
            if level is self.levels[-1] and not self.shares:
                return states
            states = joined(states, level.given, level.wanted)
            nothing = empty(*states.shape[1:3], states.shape[3] - 1, states)
            sent = torch.cat([states, nothing.expand(most - len(states), -1, -1, -1)])
        return self.peers.gather(sent[0], f"{first.name} rows", first.group, more).flatten(0, 1)[None, :rows]


def in_shares(sent: Tensor, count: int) -> Tensor:
    """States [most, R, ..] as [count, most, share, ..]: rows in equal shares, the last ones filled up."""
    share = -(-sent.shape[1] // count)
    filled = F.pad(sent, (0, 0, 0, 0, 0, share * count - sent.shape[1]))
    return filled.unflatten(1, (count, share)).transpose(0, 1)


class Exchange:
    """All that passes between processes while layers run: which states this one has, and the schedule for rows of any number."""

    def __init__(self, layout: Layout | Together, peers: Peers, schedule: str = "auto") -> None:
        """`schedule`: one of `SCHEDULES`, the same in all processes. Called in all of them at once. Raises `EyasError` for another word,
        and where there are no nodes to go by."""
        if schedule not in SCHEDULES:
            raise EyasError(f"schedule (EYAS_SCHEDULE) must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
        self.peers, self.shards, self.asked, count = peers, layout.shards, schedule, peers.count
        parts = [layout.subtrees(*layout.range_of(rank, count)) for rank in range(count)]
        self.own, self.most = parts[peers.rank], max(map(len, parts))
        whole = 0, layout.shards
        self.schedules = {
            name: Schedule(peers, [Level("gather", None, count, parts, [whole], self.most)], shares, whole)
            for name, shares in (("gather", False), ("scatter", True))
        }
        if (of_node := processes_of_a_node(peers)) is not None:
            levels = node_levels(layout, peers, of_node, parts)
            self.schedules |= {name: Schedule(peers, levels, shares, whole) for name, shares in (("nodes", False), ("nodes-scatter", True))}
        if schedule not in ("auto", *self.schedules):
            raise EyasError(f"schedule {schedule!r} is for several processes on each of several nodes, as torchrun starts them")

    def schedule(self, size: int) -> Schedule:
        """For rows whose states, each over all keys, are of `size` bytes."""
        name = self.asked
        if name == "auto":
            nodes = "nodes" in self.schedules
            large = self.received("gather", size) > LARGE and self.received("scatter", size) < self.received("gather", size)
            name = ("nodes-scatter" if large else "nodes") if nodes else "scatter" if large else "gather"
        return self.schedules[name]

    def received(self, name: str, size: int) -> int:
        """Bytes that a process gets by a schedule of one level."""
        others = self.peers.count - 1
        return others * self.most * size if name == "gather" else others * (self.most + 1) * size // self.peers.count

    def joined(self, known: dict[Subtree, State], nothing: State) -> State:
        """The state over all keys, from this process's states by (shard, 1). `nothing`: that of rows which saw no key."""
        if self.peers.count == 1:
            whole = join(known, 0, self.shards)
            return nothing if whole is None else whole
        mine = [nothing if (state := join(known, *subtree)) is None else state for subtree in self.own]
        schedule = self.schedule(nothing.nbytes)
        states = schedule.carry(torch.stack([*mine, *[nothing] * (self.most - len(mine))]), joined)
        return joined(states, schedule.subtrees, [(0, self.shards)])[0]


def joined(states: Tensor, given: Sequence[Subtree], wanted: Sequence[Subtree]) -> Tensor:
    """States [n, ..] of the subtrees `given`, joined to those [m, ..] of `wanted`, each of which some of them make up."""
    known = dict(zip(given, states.unbind(0), strict=True))
    made = [join(known, *subtree) for subtree in wanted]
    return torch.stack([state for state in made if state is not None])


class NativeJoin:
    """`joined` by the kernel, to the bits that its layers make of states."""

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def __call__(self, states: Tensor, given: Sequence[Subtree], wanted: Sequence[Subtree]) -> Tensor:
        firsts, low, size = (torch.tensor(numbers) for numbers in ([low for low, _ in given], *zip(*wanted, strict=True)))
        return native.joined(states.contiguous(), firsts, (low, size), self.shards)


def processes_of_a_node(peers: Peers) -> int | None:
    """How many processes each node has, as `torchrun` started them; None where there is one node, or they differ, or each has one."""
    if peers.count == 1:
        return None
    counts = set(peers.everyones(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    count = counts.pop()
    return None if counts or not 1 < count < peers.count or peers.count % count else count


def node_levels(layout: Layout | Together, peers: Peers, of_node: int, parts: Sequence[Sequence[Subtree]]) -> list[Level]:
    """First the processes of each node, then those of all nodes that have one place in theirs. `parts`: what each process has."""
    nodes, (node, place) = peers.count // of_node, divmod(peers.rank, of_node)
    made = [layout.subtrees(*layout.range_of(number, nodes)) for number in range(nodes)]  # V * (node * L) // (M * L) is V * node // M
    within = [peers.group(range(first, first + of_node)) for first in range(0, peers.count, of_node)][node]
    between = [peers.group(range(number, peers.count, of_node)) for number in range(of_node)][place]
    of_this = parts[node * of_node : (node + 1) * of_node]
    return [
        Level("node", within, of_node, of_this, made[node], max(map(len, parts))),
        Level("nodes", between, nodes, made, [(0, layout.shards)], max(map(len, made))),
    ]
