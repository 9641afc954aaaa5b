"""What was written so far: each conversation noted as soon as it is whole, so that nothing is lost but what is under way.

A folder's journal has a line a conversation; once there is enough, the first conversations that hold it become a file of text (texts.py).
Knows conversations and files; knows nothing of who writes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eyas.config import EyasError
from eyas.train.dialogue import Conversation
from eyas.train.questions import SelfPlay
from eyas.train.shards import Counts, Written
from eyas.train.texts import write_text
from eyas.train.writers import Limit

JOURNAL = "conversations.jsonl"


@dataclass(frozen=True)
class Noted:
    """A conversation that is over. One that was dropped has no tokens."""

    index: int
    tokens: list[int]
    spans: list[list[int]]  # where each answer begins, and where it has ended
    temperature: float
    looped: bool

    @classmethod
    def of(cls, row: Conversation, kept: bool) -> Noted:
        spans = [[places.start, places.stop] for places in row.answers] if kept else []
        return cls(row.index, row.tokens if kept else [], spans, row.start.temperature, row.looped and kept)

    @property
    def answer_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def last_answer(self) -> list[int]:
        """What the next conversation may ask about: the last answer's tokens, without the one that ended it; none where it looped."""
        return self.tokens[self.spans[-1][0] : self.spans[-1][1] - 1] if self.spans and not self.looped else []

    def written(self) -> Written:
        numbers = [-1] * len(self.tokens)
        for number, (start, stop) in enumerate(self.spans):
            numbers[start:stop] = [number] * (stop - start)
        return Written(self.tokens, numbers, self.temperature)


class Journal:
    """The conversations of a folder, a line each, in the order in which they ended. Threads may note at once; a line that a kill cut short
    is left out, and so is a conversation that stands there again."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.noted: dict[int, Noted] = {}
        self.first = 0  # so many of the first conversations are there, none left out,
        self.held = 0  # with so many answer tokens
        self.answer_tokens = 0  # of all
        self.last = -1  # the highest number of one that is there
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            if (found := read_line(line)) is not None:
                self.take(found)
        try:
            self.file = path.open("a")
        except OSError as error:
            raise EyasError(f"cannot write {path} ({error.strerror})") from None
        if lines and not path.read_bytes().endswith(b"\n"):
            self.file.write("\n")

    def add(self, noted: Noted) -> Noted:
        with self.lock:
            try:
                self.file.write(json.dumps(asdict(noted), separators=(",", ":")) + "\n")
                self.file.flush()
            except OSError as error:
                raise EyasError(f"cannot write {self.path} ({error.strerror})") from None
            self.take(noted)
        return noted

    def take(self, noted: Noted) -> None:
        if noted.index not in self.noted:
            self.noted[noted.index] = noted
            self.answer_tokens += noted.answer_tokens
            self.last = max(self.last, noted.index)
        while self.first in self.noted:
            self.held += self.noted[self.first].answer_tokens
            self.first += 1

    def close(self) -> None:
        with self.lock:
            self.file.close()

    def kept(self) -> int:
        """How many conversations there are to train on."""
        with self.lock:
            return sum(bool(noted.tokens) for noted in self.noted.values())

    def enough(self, limit: Limit, deadline: float) -> bool:
        """Whether a limit is reached; `deadline`: when its minutes are over, on the clock of time.monotonic."""
        return self.held >= limit.tokens or limit.late(deadline, self.kept)

    def begins_no_more(self, run: Sequence[int], tokens: float) -> bool:
        """Whether these conversations need not be begun: there are so many answer tokens, and none is missing before them."""
        return self.answer_tokens >= tokens and run[0] > self.last

    def in_order(self, tokens: float) -> list[Noted]:
        """The first conversations, none left out, that together hold `tokens` answer tokens; all of them where that is no number. To take
        those that end first would be to take short ones."""
        found: list[Noted] = []
        held = 0
        with self.lock:
            for index in sorted(self.noted):
                if held >= tokens:
                    break
                found.append(self.noted[index])
                held += found[-1].answer_tokens
        return found


def read_line(line: str) -> Noted | None:
    try:
        return Noted(**json.loads(line))
    except (ValueError, TypeError):
        return None


def packed(conversations: Sequence[Noted], settings: SelfPlay, folder: Path, who: str) -> Path:
    """A file of text with these conversations, which `who` wrote. The same ones are in the same file, so that a run finds those that it
    began with."""
    kept = [noted for noted in conversations if noted.tokens]
    if not kept:
        raise EyasError(f"{who} wrote nothing to train on: {len(conversations)} conversations were dropped as too short")
    answer_tokens, looped = sum(noted.answer_tokens for noted in kept), sum(noted.looped for noted in kept)
    name = hashlib.sha256(repr([(noted.index, noted.tokens) for noted in kept]).encode()).hexdigest()[:12]
    path = folder / f"text-{name}.safetensors"
    counts = Counts(answer_tokens, len(conversations) - len(kept), looped)
    write_text([noted.written() for noted in kept], [json.loads(json.dumps(asdict(settings)))], counts, path)
    return path
