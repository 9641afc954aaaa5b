"""The processes that share a text's keys, as `torchrun` starts them: what passes between them, counted.

Idle processes wait long for the next pass; once one is under way, one that does not answer within `timeout` seconds is an error. Knows
ranks and tensors; knows nothing of keys or of passes.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from eyas import launched
from eyas.config import EyasError
from eyas.parallel.board import Board, shared
from eyas.parallel.presence import Presence

IDLE = timedelta(hours=48)  # how long a process waits for the next pass
PACKET = 2048  # bytes of a message's first part; most messages have no other
PASSES = 1000  # whose seconds are remembered
GATHER = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)  # its name from torch 2.13 on
LATER = 30.0  # seconds after which PyTorch ends a process whose nccl message did not come, when we should have said so long since


def place_of(device: str) -> tuple[str, str]:
    """This process's device, and what carries messages between the processes: "gloo" or "nccl".

    "cuda" is a CUDA device for each process, by its number on this machine. A numbered one, such as "cuda:0", is for all processes here;
    nccl does not take two processes on one device, so their messages go through host memory. Raises `EyasError` where there are more
    processes than devices.
    """
    if not device.startswith("cuda") or launched.count() == 1:
        return device, "gloo"
    if ":" in device:
        return device, "gloo"
    here, cards = launched.count_here(), torch.cuda.device_count()
    if here > cards:
        raise EyasError(
            f"{here} processes were started on this machine, which has {cards} CUDA device{'s' * (cards != 1)}; start one for each device, "
            "or give --device cuda:0, and all share that one (slower: their messages go through host memory)"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', launched.rank())}", "nccl"


def join_group(backend: str, timeout: timedelta, **where: Any) -> bool:
    """Meet the other processes, where `torchrun` started several; False where this one is alone. `where`: the store to meet at, and this
    process's rank among how many, where the environment's is not meant."""
    if launched.count() == 1:
        return False
    if not distributed.is_initialized():
        # Defaults of this module's functions hold the process group of the moment it is first imported (optimisers import it). If that
        # is after `init_process_group`, the group and its threads outlive `leave`, and such a thread can abort the process at its end.
        importlib.import_module("torch.distributed.nn.functional")
        distributed.init_process_group(backend, timeout=timeout, **where)
    return True


class Group(NamedTuple):
    """Some of the processes, among which messages pass that the others do not see."""

    count: int
    handle: Any  # as torch.distributed knows it


class Coming:
    """A gather whose parts the other processes may send from now on.

    gloo asks a sender for a message once somebody waits for it, and its own all-gather goes round in a ring: 2 (N - 1) times the network's
    delay. Here each process sends its part to all others at once, and where they waited before it was there, that is one delay.
    """

    def __init__(self, like: Tensor, name: str, group: Any) -> None:
        """`like`: of the shape of a part; `name`: that by which messages of one gather are told from another's."""
        self.ranks: list[int] = distributed.get_process_group_ranks(group or distributed.group.WORLD)
        self.own, self.how = self.ranks.index(distributed.get_rank()), {"group": group, "tag": zlib.crc32(name.encode()) % 1000}
        self.everyone = like.new_empty(len(self.ranks), *like.shape)
        self.others = [*range(self.own + 1, len(self.ranks)), *range(self.own)]  # each begins with another one
        self.waiting = [distributed.irecv(self.everyone[place], self.ranks[place], **self.how) for place in self.others]

    def come(self, state: Tensor) -> Tensor:
        """[count, ..], once all parts are there; `state`: this process's."""
        self.everyone[self.own] = state
        self.waiting += [distributed.isend(self.everyone[self.own], self.ranks[place], **self.how) for place in self.others]
        for each in self.waiting:
            assert each is not None, "this process is one of the group"
            each.wait()
        return self.everyone


def check_timeout(seconds: float) -> None:
    if not 0 < seconds < IDLE.total_seconds():
        raise EyasError(f"peer-timeout must be above 0 seconds and below two days, not {seconds:g}")


class Peers:
    """This process's rank among those that share the keys."""

    def __init__(self, rank: int = 0, count: int = 1, timeout: float = 60.0) -> None:
        self.rank, self.count, self.timeout = rank, count, timeout
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # received
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.work: deque[float] = deque(maxlen=PASSES)  # seconds of each pass between its messages
        self.since = 0.0  # when the last message was there
        self.coming: dict[str, Coming] = {}  # by name, a gather that was announced
        self.backend = "gloo"
        self.graphs: dict[Any, list[Counter[str]]] = {}  # what a pass of captured messages counts
        self.control: Any = None  # the group in which the first process tells the others what comes; always gloo
        self.board: Board | None = None  # where all are of one machine: how bytes on the CPU pass
        self.presence: Presence | None = None  # of several: who is there
        self.asked = 0  # how often each said something to all

    @classmethod
    def join(cls, device: str = "cpu", timeout: float = 60.0) -> Peers:
        """Meet the other processes, where `torchrun` started several; else this one is alone. `device`: as in `place_of`. Raises
        `EyasError` where one does not come within `timeout` seconds."""
        if launched.count() == 1:
            return cls(timeout=timeout)
        peers = cls(launched.rank(), launched.count(), timeout)
        device, peers.backend = place_of(device)
        wait = timedelta(seconds=timeout)
        if peers.backend == "nccl":
            torch.cuda.set_device(device)
            wait += timedelta(seconds=LATER)
        peers.presence = presence = Presence(peers.rank, peers.count, timeout)
        presence.meet("came")
        try:
            store = distributed.distributed_c10d.PrefixStore("group", presence.store)
            join_group(peers.backend, wait, store=store, rank=peers.rank, world_size=peers.count)
            distributed.barrier()
            wait = timedelta(seconds=timeout) if peers.first else IDLE  # a message leaves once the others ask for it
            peers.control = distributed.new_group(backend="gloo", timeout=wait)
            distributed.barrier()
        except RuntimeError as error:
            raise peers.lost(error) from None
        if os.environ.get("EYAS_BOARD", "1") != "0":
            peers.board = shared(peers.rank, peers.count, timeout, peers.everyones)
        launched.met = True
        return peers

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, state: Tensor, name: str = "gather", group: Group | None = None, more: bool = False) -> Tensor:
        """[count, ..]: the tensor of this shape of every process, or of every one of `group`, in the order of ranks. Counted by `name`.
        `more`: the next gather of this name is of the same shape, in all of them; then what it brings may come before it is asked for."""
        count, handle = self.count if group is None else group.count, None if group is None else group.handle
        sent, began = self.sent(state), time.perf_counter()
        try:
            if self.board and group is None and sent.device.type == "cpu":
                everyone = self.board.gather(sent.flatten().view(torch.uint8)).view(sent.dtype)
            elif sent.device.type == "cpu":
                coming = self.coming.pop(name, None) or Coming(sent, name, handle)
                if more:
                    self.coming[name] = Coming(sent, name, handle)
                everyone = coming.come(sent)
            else:
                everyone = state.new_empty(count * state.numel())
                GATHER(everyone, state.flatten(), group=handle)
        except RuntimeError as error:
            raise self.lost(error) from None
        self.seen(name, state.nbytes * (count - 1), began)
        return everyone.to(state.device).view(count, *state.shape)

    def collect(self, tensor: Tensor, name: str) -> Tensor | None:
        """In the first process [count, ..]: every process's tensor of this shape, in the order of ranks; None in the others."""
        began, everyone = time.perf_counter(), None
        try:
            if self.board and tensor.device.type == "cpu":
                left = self.board.collect(tensor.flatten().view(torch.uint8))
                everyone = None if left is None else left.view(tensor.dtype).view(self.count, *tensor.shape)
            else:
                everyone = tensor.new_empty(self.count, *tensor.shape) if self.first else None
                distributed.gather(tensor, None if everyone is None else list(everyone.unbind(0)))
        except RuntimeError as error:
            raise self.lost(error) from None
        self.seen(name, tensor.nbytes * (self.count - 1) if self.first else 0, began)
        return everyone

    def scatter(self, parts: Tensor, name: str = "scatter", group: Group | None = None) -> Tensor:
        """[count, ..]: this process's part of every process's `parts` [count, ..], of one shape, in the order of ranks."""
        sent, began = self.sent(parts.contiguous()), time.perf_counter()
        try:
            if self.board and group is None and sent.device.type == "cpu":
                everyone = self.board.scatter(sent.flatten(1).view(torch.uint8)).view(sent.dtype).view(sent.shape)
            else:
                everyone = torch.empty_like(sent)
                distributed.all_to_all_single(everyone, sent, group=None if group is None else group.handle)
        except RuntimeError as error:
            raise self.lost(error) from None
        self.seen(name, parts.nbytes // len(parts) * (len(parts) - 1), began)
        return everyone.to(parts.device)

    def sent(self, tensor: Tensor) -> Tensor:
        """Where a message's tensor must lie: gloo's in host memory."""
        return tensor if self.backend == "nccl" else tensor.cpu()

    # ---- messages on a CUDA device ----

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold the messages of a pass."""
        return self.count == 1 or self.backend == "nccl"

    def mark(self) -> tuple[Counter[str], Counter[str]]:
        """What was counted so far: messages, bytes."""
        return Counter(self.calls), Counter(self.bytes)

    def replayed(self, mark: tuple[Counter[str], Counter[str]], key: Any, runs: int) -> None:
        """Count the messages of a pass that ran as a graph since `mark`. Making the graph ran it `runs` times here, and counted them; a
        replay sends as many as one of those, unseen. `key`: what their number depends on."""
        since = [now - then for now, then in zip((self.calls, self.bytes), mark, strict=True)]
        if since[0]:
            self.graphs[key] = [Counter({name: number // runs for name, number in each.items()}) for each in since]
        elif key in self.graphs:
            self.calls.update(self.graphs[key][0])
            self.bytes.update(self.graphs[key][1])

    def settle(self) -> None:
        """Wait until the device has done what was launched. gloo says that a process is lost where it is; nccl's messages are on the
        device, which would wait on: here that is an error once `timeout` is over."""
        if self.backend != "nccl":
            return
        done, until = torch.cuda.Event(), time.monotonic() + self.timeout
        done.record()
        while not done.query():
            if time.monotonic() > until:
                raise self.lost(RuntimeError("timeout"))

    # ---- what is told ----

    def tell(self, message: Any = None) -> Any:
        """The first process's message, in all."""
        if self.count == 1:
            return message
        if self.presence and not self.calls["tell"]:  # one may load for longer than another
            self.presence.ready()
        began, packed = time.perf_counter(), pickle.dumps(message) if self.first else b""
        if self.board:
            try:
                packed = self.board.tell(packed, IDLE.total_seconds())
            except RuntimeError as error:
                raise self.lost(error) from None
            self.seen("tell", len(packed), began)
            return pickle.loads(packed)
        first = torch.zeros(PACKET, dtype=torch.uint8)
        body = torch.frombuffer(bytearray(len(packed).to_bytes(8, "little") + packed), dtype=torch.uint8)
        first[: min(len(body), PACKET)] = body[:PACKET]
        try:
            distributed.broadcast(first, 0, group=self.control)
            length = 8 + int.from_bytes(first[:8].numpy().tobytes(), "little")
            rest = torch.zeros(max(0, length - PACKET), dtype=torch.uint8)
            if len(rest):
                if self.first:
                    rest.copy_(body[PACKET:])
                distributed.broadcast(rest, 0, group=self.control)
        except RuntimeError as error:
            raise self.lost(error) from None
        self.seen("tell", PACKET + len(rest), began)
        return pickle.loads(torch.cat([first, rest])[8:length].numpy().tobytes())

    @property
    def carried(self) -> tuple[int, int]:
        """How many messages carried states so far, and their bytes as this process received them."""
        names = [name for name in self.calls if name != "tell"]
        return sum(self.calls[name] for name in names), sum(self.bytes[name] for name in names)

    def seen(self, what: str, size: int, began: float) -> None:
        self.calls[what] += 1
        self.bytes[what] += size
        now = time.perf_counter()
        self.seconds[what] += now - began
        if what == "tell":  # of the pass that comes, if one does
            self.work.append(0.0)
        elif self.work and self.backend == "gloo":  # nccl's messages are not there yet
            self.work[-1] += began - self.since
        self.since = now

    def agree(self, facts: Sequence[str], names: Sequence[str]) -> None:
        """Raise `EyasError` in every process where one differs from the first in a fact, such as the version of eyas."""
        if self.presence is None:
            return
        everyone = self.everyones(list(facts))
        for rank, found in enumerate(everyone):
            for name, one, first in zip(names, found, everyone[0], strict=True):
                if one != first:
                    raise EyasError(f"process {rank + 1} of {self.count} has another {name} ({one}) than the first ({first})")

    def everyones(self, fact: Any) -> list[Any]:
        """What each process says, in the order of ranks: numbers, strings and lists of them."""
        assert self.presence is not None, "one process has nobody to ask"
        self.asked += 1
        return [json.loads(each) for each in self.presence.meet(f"fact {self.asked}", json.dumps(fact))]

    def waits(self) -> list[tuple[float, float]]:
        """For how many seconds each process waited for states so far, and how many a pass takes it; called in all."""
        own = round(self.waited, 3), self.worked
        return [(waited, worked) for waited, worked in self.everyones(own)] if self.presence else [own]

    @property
    def waited(self) -> float:
        """For how many seconds this process waited for others' states so far."""
        return sum(seconds for name, seconds in self.seconds.items() if name != "tell")

    @property
    def worked(self) -> float:
        """Seconds that a late pass took this process itself, until its last message: the median. What the first process does between passes
        is no part of it."""
        return median([each for each in self.work if each] or [0.0])

    def group(self, ranks: Sequence[int]) -> Group:
        """These processes; called in all processes, for the same groups in one order."""
        try:
            return Group(len(ranks), distributed.new_group(list(ranks), timeout=timedelta(seconds=self.timeout)))
        except RuntimeError as error:
            raise self.lost(error) from None

    def end(self) -> None:
        """Say that the first process ends, to those that will find it gone."""
        if self.presence:
            self.presence.end()

    def see_off(self) -> None:
        """Wait for the others to end. Raises `EyasError` where one does not."""
        if self.presence:
            self.presence.see_off()

    @property
    def well(self) -> bool:
        """Whether none was found lost, and nothing broken off."""
        return self.presence is None or not (self.presence.found or self.presence.interrupted)

    def ended(self) -> bool:
        return self.presence is not None and self.presence.ended()

    def lost(self, error: RuntimeError) -> EyasError:
        """The error that says which processes do not answer."""
        assert self.presence is not None, "one process misses nobody"
        return self.presence.missed(re.search("timed out|timeout|more time", str(error), re.IGNORECASE) is not None)

    def leave(self) -> None:
        if self.board:
            self.board.close()
        if self.presence:
            if distributed.is_initialized():
                if self.backend == "nccl" and not self.well:  # the usual end would wait for messages that do not come
                    distributed.distributed_c10d._abort_process_group()
                else:
                    distributed.destroy_process_group()
            self.presence.leave()
