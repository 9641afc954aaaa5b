"""Which processes are there. Each gives signs of life; one that gives none is lost, is named once, and the others end.

The signs are numbers that go up in the store that `torchrun` keeps (or the first process, without it), set by a thread of each process's
own, so that a process which computes or waits gives them too. Whoever misses another process looks who is there, and the first to find
out says so in the store, so that all name the same. Knows ranks, signals and the store; knows nothing of what processes do together.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from eyas import launched
from eyas.config import EyasError

BEAT = 0.5  # seconds between two signs of life
NAMED = 3.0  # seconds in which a process that is well gives one, whatever it is at
GRACE = 1.0  # seconds in which a process ends by itself, before it is ended where it stands
POLL = 0.02  # seconds between two looks, where a process has nothing else to do
ENDED = 2  # the status of a process that ends because another is lost


def named(ranks: Iterable[int], count: int, what: str) -> str:
    """`process 2 of 3 is gone`, counted from 1. `what`: "gone", or that it did not answer in time."""
    numbers = [str(rank + 1) for rank in ranks]
    many, who = len(numbers) > 1, " and ".join(filter(None, [", ".join(numbers[:-1]), numbers[-1]]))
    is_gone = ("are gone" if many else "is gone") if what == "gone" else what
    return f"process{'es' * many} {who} of {count} {is_gone}"


class Silence:
    """For how long some processes have given no sign of life. Time in which this process itself was stopped does not count."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.seen: dict[int, bytes] = dict.fromkeys(ranks, b"")
        self.seconds: dict[int, float] = dict.fromkeys(self.seen, 0.0)
        self.looked = time.monotonic()

    def look(self, signs: dict[int, bytes]) -> None:
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, 2 * BEAT), now
        for rank, before in self.seen.items():
            self.seconds[rank] = self.seconds[rank] + passed if signs[rank] == before else 0.0
            self.seen[rank] = signs[rank]

    def beyond(self, timeout: float) -> list[int]:
        return [rank for rank, seconds in self.seconds.items() if seconds > timeout]


class Presence:
    """This process among `count`, and which of the others are there. `timeout`: seconds after which one that gives no sign is lost."""

    def __init__(self, rank: int, count: int, timeout: float) -> None:
        self.rank, self.count, self.timeout = rank, count, timeout
        self.slow = f"did not answer within {timeout:g} s"
        self.thread = threading.Thread(target=self.watch, daemon=True)
        keeps = self.first and not launched.agent_keeps_store()
        self.of_main, self.of_thread = self.connected(keeps), self.connected(False)
        self.naming = threading.Lock()
        self.ending = self.found = self.interrupted = self.left = False  # the first ends; one is lost; Ctrl-C; this one has ended
        self.asked_to_end = time.monotonic() if launched.follows and launched.ended_by_torchrun else None
        self.here, self.there = socket.socketpair()
        if threading.current_thread() is threading.main_thread():
            self.signals()
        self.thread.start()
        atexit.register(self.leave)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.rank]

    @property
    def store(self) -> Any:
        """A call that waits holds a connection, so the thread has its own."""
        return self.of_thread if threading.current_thread() is self.thread else self.of_main

    def connected(self, keeps: bool) -> Any:
        """A connection to the store, under names of this run. `keeps`: this process keeps the store."""
        where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=self.timeout)
        try:
            store = TCPStore(where, port, None, keeps, wait, wait_for_workers=False, multi_tenant=True)
        except RuntimeError:
            raise EyasError(f"process {self.rank + 1} of {self.count} cannot reach {where}:{port}, where processes meet") from None
        return PrefixStore(f"eyas/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    # ---- signals ----

    def signals(self) -> None:
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.there.setblocking(False)
        signal.set_wakeup_fd(self.there.fileno(), warn_on_full_buffer=False)  # the thread hears of them, wherever this one waits
        if callable(self.before[signal.SIGINT]):
            signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.terminate if self.first else lambda number, frame: None)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C, which reaches all. Before all have met each ends where it stands; then the first one ends the text, and its end is the
        others'. Whoever was interrupted calls nobody lost."""
        if self.ending:
            return
        self.interrupted = True
        if launched.met and not self.first:
            return
        for each in self.before:  # one is enough; torchrun may send another
            signal.signal(each, signal.SIG_IGN)
        if not launched.met:
            self.end()
        self.as_before(signal.SIGINT, frame)

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """torchrun ends all where one is lost, and where it is asked to end itself."""
        if self.ending or self.naming.locked():
            return
        if lost := self.silent():
            raise self.lost(lost, "gone")
        self.as_before(signal.SIGTERM, frame)

    def as_before(self, number: signal.Signals, frame: FrameType | None) -> None:
        """What the signal did in this process before there were others."""
        before = self.before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    # ---- signs of life ----

    def watch(self) -> None:
        """In a thread of its own: give signs of life, and end this process where its main thread may wait for what does not come."""
        try:
            self.give_signs()
        except KeyboardInterrupt:
            self.end_soon(launched.INTERRUPTED)

    def give_signs(self) -> None:
        silence, narrowed = Silence(self.others), False
        for beat in itertools.count():
            if launched.met and not narrowed:  # later a process that is not heard in a pass is missed there
                silence, narrowed = Silence([] if self.first else [0]), True
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                silence.look(self.signs(silence.seen))
                if not self.first and self.store.check(["ended"]):
                    self.end_soon(0)
                if not self.first and self.store.check(["verdict"]):
                    self.end_soon(ENDED, self.lost([], "gone"))
            except RuntimeError:
                self.without_store()
                return
            if lost := silence.beyond(self.timeout):
                self.end_soon(ENDED, self.lost(lost, self.slow), 0.0)
            if self.asked_to_end is not None and time.monotonic() - self.asked_to_end > NAMED + GRACE + launched.patience:
                lost = silence.beyond(NAMED)
                self.end_soon(ENDED, self.lost(lost, "gone") if lost else None, 0.0)
            self.listen()
            if self.left:
                return

    def listen(self) -> None:
        """Wait for the next beat, or a signal."""
        self.here.settimeout(BEAT)
        with suppress(TimeoutError, OSError):
            told = self.here.recv(64)
            if signal.SIGTERM in told and not self.first and self.asked_to_end is None:
                self.asked_to_end = time.monotonic()
            if signal.SIGINT in told and not launched.met:
                self.interrupted = True
                raise KeyboardInterrupt

    def end_soon(self, status: int, error: EyasError | None = None, grace: float = GRACE) -> None:
        """Leave the main thread a moment to end by itself: it may wait in a call that cannot be broken off."""
        until = time.monotonic() + grace
        while not self.left and time.monotonic() < until:
            time.sleep(POLL)
        if self.left:
            return
        if status == launched.INTERRUPTED:
            launched.say_interrupted()
            self.end()
        elif error:
            launched.say(f"eyas: {error}")
        self.part()
        os._exit(status)

    def without_store(self) -> None:
        """Whoever kept the store is no more."""
        if self.first:
            os.kill(os.getpid(), signal.SIGTERM)  # for the main thread, which may have something to write yet
        else:
            self.end_soon(ENDED, self.lost([0], "gone"))

    def signs(self, ranks: Iterable[int]) -> dict[int, bytes]:
        found = {}
        for rank in ranks:
            key = f"beat/{rank}"
            found[rank] = self.store.get(key) if self.store.check([key]) else b""
        return found

    def silent(self) -> list[int]:
        """Which other processes give no sign of life from now on."""
        with suppress(RuntimeError):
            before = self.signs(self.others)
            return self.left_of(self.others, lambda rank: self.signs([rank])[rank] != before[rank])
        return [0]  # the store was the first one's

    def left_of(self, ranks: list[int], done: Callable[[int], bool]) -> list[int]:
        """Those of which this is still not so after the time that a process takes which is well."""
        until = time.monotonic() + NAMED
        while (ranks := [rank for rank in ranks if not done(rank)]) and time.monotonic() < until:
            time.sleep(POLL)
        return ranks

    # ---- who is lost ----

    def missed(self, slow: bool) -> EyasError:
        """The error of a process that waited for others in vain. `slow`: for all of the time there was."""
        with self.naming:
            lost: list[int] = []
            with suppress(RuntimeError):
                self.store.set(f"missed/{self.rank}", "1")
                if not slow:  # whoever waited too long for one ends connections to others, and says first why
                    time.sleep(BEAT)
                slow = self.store.compare_set("cause", "", "slow" if slow else "gone") == b"slow"
                lost = self.silent()
                if slow and not lost:  # all are there; who has missed nobody so far is what they waited for
                    lost = self.left_of(self.others, lambda rank: self.store.check([f"missed/{rank}"]))
            return self.lost(lost, self.slow if slow else "gone")

    def lost(self, ranks: list[int], what: str) -> EyasError:
        """The error that names them, the same in all processes: the first to find out says it in the store. Raises `KeyboardInterrupt` in
        a process that was interrupted: the others were too."""
        self.found = True
        if self.interrupted:
            raise KeyboardInterrupt
        line = named(ranks, self.count, what) if ranks else "a connection between processes broke"
        try:
            line = self.store.compare_set("verdict", "", line).decode()
        except RuntimeError:
            line = "torchrun is gone" if launched.agent_keeps_store() else named([0], self.count, "gone")
        return EyasError(line)

    # ---- meeting and leaving ----

    def meet(self, what: str, said: str = "") -> list[str]:
        """What every process said, once all have. Raises `EyasError` where one is lost, or does not come in time."""
        self.store.set(f"{what}/{self.rank}", said)
        silence = Silence(range(self.count))
        waiting = list(range(self.count))
        while True:
            ended = not self.first and self.ended()  # before the others are looked at: it ends once it knows what all said
            try:
                waiting = [rank for rank in waiting if not self.store.check([f"{what}/{rank}"])]
                silence.look(self.signs(silence.seen))
            except RuntimeError:
                raise self.lost([0], "gone") from None
            if not waiting:
                return [self.store.get(f"{what}/{rank}").decode() for rank in range(self.count)]
            if ended:
                self.leave()
                sys.exit(0)
            if lost := [rank for rank in silence.beyond(self.timeout) if rank in waiting]:
                raise self.lost(lost, self.slow)
            time.sleep(POLL)

    def ready(self) -> None:
        """Say that from now on this process answers at once; the first one waits for all others to say so."""
        if self.first:
            self.meet("ready")
        else:
            self.store.set(f"ready/{self.rank}", "")

    def end(self) -> None:
        """Say that the first process ends, to those that will find it gone."""
        if not self.first or self.ending:
            return
        self.ending = True
        with suppress(RuntimeError):
            self.store.set("ended", "1")

    def see_off(self) -> None:
        """Wait for the others to end. Raises `EyasError` where one does not."""
        left: list[int] = []
        with suppress(RuntimeError):
            left = self.left_of(self.others, lambda rank: self.store.check([f"left/{rank}"]))
        if left:
            raise self.lost(left, "did not end")

    def part(self) -> None:
        """Say that this process ends."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "1")

    def ended(self) -> bool:
        with suppress(RuntimeError):
            return self.store.check(["ended"])
        return False

    def leave(self) -> None:
        if self.left:
            return
        self.end()
        self.part()
        self.left = True
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        with suppress(OSError):
            self.there.send(b"\0")
        self.thread.join(NAMED)
