"""One thread that decodes, turn by turn: who is admitted, who reads, who is told what came of it.

The thread owns the decoder; others leave sequences in its inbox and get pieces through a function of theirs. Between any two turns requests
join and leave: prompts are read in parts that take no longer than a round, and after these everybody else gets a round. Knows the
decoder's turns and its sequences; knows nothing of HTTP, JSON or prompts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eyas.config import EyasError
from eyas.decode.generate import PROMPT_PART, Decoder

if TYPE_CHECKING:
    from eyas.config import TreeShape
    from eyas.decode.logprobs import TokenLogprobs
    from eyas.decode.sequence import Sequence

LEAST_PART = 16  # rows of a prompt that are read at once, however long others then wait
MOST_STALLS = 5  # how many times `stall` those that decode are held up at most, unless a round takes longer
RATE_WEIGHT = 0.2  # weight of a new part in the mean of seconds a row


@dataclass(frozen=True)
class Piece:
    """What a turn brought one sequence."""

    choice: int  # its number among the sequences of its job
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt's tokens but the first, in the first piece of a text that tells them


@dataclass(eq=False)
class Job:
    """Sequences that were asked for together. `tell` is called on the scheduler's thread with the pieces of a turn; an exception in their
    place is the end of it."""

    sequences: list[Sequence]
    tell: Callable[[list[Piece] | Exception], None]
    piecewise: bool = True  # whether each turn's pieces are wanted; else the last one of each sequence alone is told
    told: list[int] = field(default_factory=list)  # tokens of each that were told
    open: int = 0  # sequences that have not ended
    asked: float = field(default_factory=time.perf_counter)
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.told, self.open = [0] * len(self.sequences), len(self.sequences)


@dataclass
class Settings:
    """How many sequences are decoded at a time, how long each may be, and how many more may wait."""

    slots: int = 8
    context: int = 4096
    queue: int = 32
    keep_prefixes: bool = True
    stall: float = 0.1  # seconds for which a part of a prompt may hold up those that decode


class Scheduler:
    """Drives a decoder. `submit` and `cancel` may be called from any thread."""

    def __init__(self, decoder: Decoder, shapes: Iterable[TreeShape], settings: Settings) -> None:
        self.decoder, self.settings = decoder, settings
        decoder.reserve(settings.slots, settings.context, shapes, settings.keep_prefixes)
        self.lock = threading.Condition()
        self.inbox: deque[Job] = deque()
        self.cancels: deque[Job] = deque()
        self.jobs: dict[int, tuple[Job, int]] = {}  # by a sequence's id: its job, and its number there
        self.in_hand = 0  # sequences that were submitted and have not ended
        self.accepting, self.stopping = True, False
        self.failure: Exception | None = None
        self.turned = time.monotonic()  # when the last turn ended, or the thread last waited for work
        self.seconds_a_row = 0.0  # of a prompt that is read
        self.round_seconds = 0.0  # of the last round
        self.seconds = self.decoder_seconds = 0.0  # of all turns; the part of them that the decoder took
        self.woke = 0.0  # when the turn under way began
        self.thread = threading.Thread(target=self.run, name="eyas decodes", daemon=True)

    # ---- from any thread ----

    @property
    def most(self) -> int:
        return self.settings.slots + self.settings.queue

    def submit(self, job: Job) -> bool:
        """Take a job in; False where so many are in hand already, or none is taken any more."""
        with self.lock:
            if not self.accepting or self.in_hand + len(job.sequences) > self.most:
                return False
            self.in_hand += len(job.sequences)
            self.inbox.append(job)
            self.lock.notify()
        return True

    def cancel(self, job: Job) -> None:
        """End a job wherever it stands; nothing more of it is told."""
        with self.lock:
            job.cancelled = True
            self.cancels.append(job)
            self.lock.notify()

    def start(self) -> None:
        self.thread.start()

    def drain(self) -> None:
        """Take nothing more in."""
        with self.lock:
            self.accepting = False
            self.lock.notify()

    def stop(self) -> None:
        """End the thread; what is under way is told that the server ends."""
        with self.lock:
            self.accepting, self.stopping = False, True
            self.lock.notify()

    @property
    def idle(self) -> bool:
        return self.in_hand == 0

    @property
    def turn_age(self) -> float:
        """Seconds since a turn ended, while there is work; else 0."""
        return time.monotonic() - self.turned if self.in_hand else 0.0

    def stuck(self, seconds: float) -> bool:
        """Whether there is work, and no turn has ended for so long."""
        return self.turn_age > seconds

    # ---- the thread ----

    def run(self) -> None:
        try:
            while self.take_in():
                self.turn()
                self.turned = time.monotonic()
                self.seconds += time.perf_counter() - self.woke
        except Exception as error:  # a fault in a pass is everybody's: no later turn could be trusted
            self.failure = error
        with self.lock:
            self.accepting = False
        self.end_all(self.failure or EyasError("the server is ending"))

    def take_in(self) -> bool:
        """Apply what others left, and wait where there is nothing to do; False: the thread is to end."""
        with self.lock:
            while not (self.inbox or self.cancels or self.decoder.busy or self.stopping):
                self.turned = time.monotonic()
                self.lock.wait(1.0)
            if self.stopping:
                return False
            self.woke = time.perf_counter()
            new, gone = list(self.inbox), list(self.cancels)
            self.inbox.clear()
            self.cancels.clear()
        for job in new:
            for number, sequence in enumerate(job.sequences):
                self.jobs[id(sequence)] = job, number
                self.decoder.admit(sequence)
        for job in gone:
            for sequence in job.sequences:
                self.decoder.abort(sequence)
                self.forget(job, sequence)
        return True

    def turn(self) -> None:
        """Parts of the oldest unread prompts, for as long as those that decode may be held up, then one round of all that decode."""
        decoder, held = self.decoder, 0.0
        decoder.seat()
        while decoder.reading and (rows := self.part(held)):
            held += self.read_part(rows)  # who waits for these rows is seated in the next turn, when the draft has read them too
        if decoder.decoding:
            began = time.perf_counter()
            served = decoder.decode()
            self.round_seconds = time.perf_counter() - began
            self.decoder_seconds += self.round_seconds
            self.tell(served)

    def read_part(self, rows: int) -> float:
        """Read so many rows of the oldest unread prompt, and tell its first token if that is its end. Returns the seconds for which that
        held up others."""
        others, before, began = bool(self.decoder.decoding), self.decoder.reading[0].read, time.perf_counter()
        (sequence,) = self.decoder.read_prompt(rows)
        seconds = time.perf_counter() - began
        self.decoder_seconds += seconds
        a_row = seconds / max(sequence.read - before, 1)
        self.seconds_a_row += (a_row - self.seconds_a_row) * (RATE_WEIGHT if self.seconds_a_row else 1.0)
        if sequence.read == sequence.prompt_length:
            self.tell([sequence])
        return seconds if others else 0.0

    def part(self, held: float) -> int:
        """Rows of a prompt to read now, where others were held up for `held` seconds in this turn; 0: none."""
        if not self.decoder.decoding or not self.seconds_a_row:
            return PROMPT_PART
        rows = min(PROMPT_PART, int((self.patience() - held) / self.seconds_a_row))
        if held:
            return rows if rows >= LEAST_PART else 0
        return max(LEAST_PART, rows)

    def patience(self) -> float:
        """Seconds for which those that decode may be held up in a turn: as long as a round takes, or `stall` if that is more; where many
        prompts wait for few texts longer in proportion, since rounds of few cost most a token."""
        usual, share = max(self.settings.stall, self.round_seconds), len(self.decoder.reading) / len(self.decoder.decoding)
        return min(usual * (1 + share), max(MOST_STALLS * self.settings.stall, usual))

    def tell(self, served: Iterable[Sequence]) -> None:
        pieces: dict[int, tuple[Job, list[Piece]]] = {}
        for sequence in served:
            job, number = self.jobs[id(sequence)]
            if job.piecewise or sequence.finish_reason:
                pieces.setdefault(id(job), (job, []))[1].append(self.piece(job, number, sequence))
            if sequence.finish_reason:
                self.forget(job, sequence)
        for job, found in pieces.values():
            if not job.cancelled:
                job.tell(found)

    @staticmethod
    def piece(job: Job, number: int, sequence: Sequence) -> Piece:
        first = job.told[number]
        tokens = sequence.tokens[sequence.prompt_length + first :]
        job.told[number] += len(tokens)
        prompt = sequence.prompt_logprobs if sequence.tells_prompt and not first else None
        return Piece(number, sequence.stream.certain(), tokens, sequence.logprobs[first:], sequence.finish_reason, prompt)

    def forget(self, job: Job, sequence: Sequence) -> None:
        if self.jobs.pop(id(sequence), None) is not None:
            job.open -= 1
            with self.lock:
                self.in_hand -= 1

    def end_all(self, error: Exception) -> None:
        """Tell everybody that nothing more comes."""
        with self.lock:
            waiting = list(self.inbox)
            self.inbox.clear()
        for job in {id(job): job for job in [*waiting, *(job for job, _ in self.jobs.values())]}.values():
            if not job.cancelled:
                job.tell(error)
        self.jobs.clear()
        with self.lock:
            self.in_hand = 0
