"""A server writes a text, many conversations at once, each noted as soon as it is whole: nothing is lost but what is under way.

The rules are self-play's (dialogue.py): a part that the server sends is taken token by token, and what lies beyond a rule's end is left
out. Knows threads, the rules and the folder where it is noted; knows nothing of HTTP (remote.py asks).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eyas.config import EyasError
from eyas.train.dialogue import Conversation, Dialogues
from eyas.train.journal import JOURNAL, Journal, Noted, packed
from eyas.train.questions import Asked, SelfPlay
from eyas.train.remote import Server
from eyas.train.shards import claim_folder, data_folder
from eyas.train.writers import Limit

SHORT = 64  # conversations one after the other of which nothing is kept: then nothing will be


@dataclass(frozen=True)
class RemotePlay(SelfPlay):
    """The settings of text that a server writes."""

    writer: str = ""  # the model's name there

    @classmethod
    def of(cls, settings: SelfPlay, server: Server) -> RemotePlay:
        """The same settings for a server. One that cannot be let write questions is given all of them; raises `EyasError` where there are
        none to give."""
        if server.chat_only and not settings.seed_prompts:
            raise EyasError(
                f"{server.api.url} has no /v1/completions, so it cannot be let write questions; give some with --seed-prompts F.jsonl or "
                "--data F --regenerate"
            )
        told: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(settings)}
        if server.chat_only:
            told["seeded_share"] = 1.0
        return cls(**told, writer=server.model)


class Crew:
    """Threads that write conversations `indices` with a server, `at_once` of them, until there are so many `tokens` of answers. Then those
    that are under way end, and what is missing before them is written, but no other is begun."""

    def __init__(self, server: Server, dialogues: Dialogues, journal: Journal, indices: Iterator[int], tokens: float, at_once: int) -> None:
        self.server, self.dialogues, self.journal, self.tokens = server, dialogues, journal, tokens
        self.runs, self.lock = dialogues.runs(indices), threading.Lock()
        self.ended = threading.Event()
        self.error: BaseException | None = None  # what ended one of them
        self.short = 0  # conversations since one was kept
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(at_once)]

    def run(self, done: Callable[[], bool], report: Callable[[], None]) -> None:
        """Write until it is done, until there is nothing more to ask, or until a thread fails; then the requests under way are ended."""
        for thread in self.threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in self.threads) and not done():
                self.ended.wait(0.2)
                report()
                if self.error:
                    break
        finally:
            self.ended.set()
            self.server.api.close()

    def work(self) -> None:
        try:
            while not self.ended.is_set():
                with self.lock:
                    run = next(self.runs, None)
                if run is None or self.journal.begins_no_more(run, self.tokens):
                    return
                self.write(run)
        except BaseException as error:
            self.error = self.error or (None if self.ended.is_set() else error)
            self.ended.set()

    def write(self, run: Sequence[int]) -> None:
        """Write conversations that follow one another, without those that are there."""
        text: list[int] = []
        for index in run:
            noted = self.journal.noted.get(index) or self.journal.add(self.converse(index, text))
            text = noted.last_answer()

    def converse(self, index: int, text: Sequence[int]) -> Noted:
        row = self.dialogues.begin(index, text)
        while (room := self.room(row)) and not self.take(row, self.server.go_on(row, self.dialogues, room)):
            pass
        kept = self.dialogues.finish(row)
        with self.lock:
            self.short = 0 if kept else self.short + 1
            if self.short >= SHORT:
                raise EyasError(
                    f"{self.server.api.url} gives no text to speak of: {SHORT} conversations in a row were dropped as too short"
                )
        return Noted.of(row, kept)

    def room(self, row: Conversation) -> int:
        """How many tokens the question or answer under way may have yet; 0 where the conversation fills the context before it is asked."""
        settings, read = self.dialogues.settings, len(row.tokens) + len(row.waiting)
        longest = settings.longest_question + 1 if row.asking else settings.longest_answer
        return max(1, min(row.part + longest, self.dialogues.capacity - 1) - read) if read < self.dialogues.capacity else 0

    def take(self, row: Conversation, tokens: Sequence[int]) -> bool:
        """Take tokens as far as the conversation goes on with them. Says whether it is over."""
        for token in tokens:
            if self.dialogues.go_on(row, token):
                return True
            if row.waiting != [token]:  # a rule has opened what comes next
                return False
        return False


def write_remotely(
    server: Server, settings: RemotePlay, given: Sequence[Asked], capacity: int, limit: Limit, at_once: int, report: Callable[[int], None]
) -> Path:
    """Let a server write until `limit`, where the folder does not hold enough already. A file of text (texts.py): the first conversations
    that hold the limit's tokens, or all. `capacity`: tokens of a conversation at most. Raises `EyasError` where the server stops before,
    which says what is kept."""
    folder = data_folder(settings)
    claim_folder(folder, settings)
    journal = Journal(folder / JOURNAL)
    deadline = time.monotonic() + 60 * limit.minutes
    dialogues = Dialogues(server.template, settings, given, min(settings.longest, capacity, server.context or capacity))
    indices = iter(range(len(given))) if settings.regenerate else itertools.count()
    crew = Crew(server, dialogues, journal, indices, limit.tokens, at_once)

    def done() -> bool:
        return journal.enough(limit, deadline)

    def tell() -> None:
        report(int(min(journal.answer_tokens, limit.tokens)))

    tell()
    try:
        if not done():
            crew.run(done, tell)
    finally:
        journal.close()
    if crew.error and not done():
        if not isinstance(crew.error, EyasError):
            raise crew.error
        raise EyasError(f"{crew.error}; {journal.answer_tokens:,} answer tokens are kept, and the same command goes on with them")
    return packed(journal.in_order(limit.tokens), settings, folder, "the server")
