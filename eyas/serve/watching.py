"""Who watches rounds: events from the thread that decodes to whoever asked for them, and rounds that are told with an answer. A watcher
that is slow loses rounds.

Nothing is computed for a round that nobody watches. Knows rounds as they are told, queues and the event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from eyas.serve.answers import sse
from eyas.view.rounds import Word, round_told

if TYPE_CHECKING:
    from eyas.decode.generate import Decoder
    from eyas.decode.sequence import RoundRecord, Sequence

MOST_WATCHERS = 8
MOST_RECORDED = 256  # rounds that an answer tells of itself
MOST_BEHIND = 64  # rounds that a watcher may be behind before it loses some


class Watcher:
    """Gets the rounds of one request, or of all where `request` is None; with the target's draws at every row where it wants them
    `everywhere`. Made and read on the event loop."""

    def __init__(self, request: str | None, everywhere: bool = False) -> None:
        self.request, self.everywhere = request, everywhere
        self.rounds: asyncio.Queue[bytes] = asyncio.Queue(MOST_BEHIND)
        self.loop = asyncio.get_running_loop()

    def wants(self, call: str) -> bool:
        return (self.request is None or self.request == call) and not self.rounds.full()

    def tell(self, event: bytes) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the watcher with it
            self.loop.call_soon_threadsafe(self.take, event)

    def take(self, event: bytes) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self.rounds.put_nowait(event)


class Recorder:
    """Keeps the first rounds of one request's own texts, to be told with its answer."""

    def __init__(self, texts: Iterable[Sequence]) -> None:
        self.texts = list(texts)
        self.rounds: list[dict[str, Any]] = []

    def wants(self, text: Sequence) -> bool:
        return len(self.rounds) < MOST_RECORDED and any(text is each for each in self.texts)


class Rounds:
    """The watchers and recorders there are. One that its stream or answer has let go is gone."""

    def __init__(self, word: Word, everyone: bool) -> None:
        """`everyone`: whether all requests may be watched at once."""
        self.word, self.everyone = word, everyone
        self.watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self.recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self.lock = threading.Lock()

    def watch(self, request: str | None, everywhere: bool = False) -> Watcher | None:
        """A new watcher; None where there are too many."""
        with self.lock:
            if len(self.watchers) >= MOST_WATCHERS:
                return None
            self.watchers.add(watcher := Watcher(request, everywhere))
        return watcher

    def leave(self, watcher: Watcher) -> None:
        with self.lock:
            self.watchers.discard(watcher)

    def record(self, texts: Iterable[Sequence]) -> Recorder:
        """What keeps the rounds of these texts, for as long as somebody holds it."""
        with self.lock:
            self.recorders.add(recorder := Recorder(texts))
        return recorder

    def heard(self, record: RoundRecord, decoder: Decoder) -> None:
        """A round of one sequence; called on the thread that decodes."""
        text = record.text
        if not (self.watchers or self.recorders) or text is None:
            return
        with self.lock:
            wanting = [watcher for watcher in self.watchers if watcher.wants(text.call)]
            keeping = [recorder for recorder in self.recorders if recorder.wants(text)]
        for everywhere in {watcher.everywhere for watcher in wanting} | ({False} if keeping else set()):
            told = round_told(record, decoder, self.word, everywhere)
            event = sse(told)
            for watcher in wanting:
                if watcher.everywhere == everywhere:
                    watcher.tell(event)
            for recorder in keeping if not everywhere else ():
                recorder.rounds.append(told)
