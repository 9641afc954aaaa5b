"""What a run of `new-draft` would cost and make in the given time, from about a minute of measuring on this machine.

Knows a writer and a trainer well enough to time each for a while; writes no file.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from eyas.config import TargetConfig
from eyas.model.protocols import TargetModel
from eyas.train.device_writer import DevicePlay, conversations
from eyas.train.dialogue import Conversation
from eyas.train.features import Example, States
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Writer
from eyas.train.template import Template
from eyas.train.trainer import Trainer

SECONDS = 25.0  # seconds of each measurement
BYTES_OF_TEXT = 9  # for each token in the journal, and in the file of text that is made of it
DOCUMENT, ANSWER = 200, 140  # tokens of a typical conversation, and of its answer


@dataclass(frozen=True)
class Forecast:
    parameters: int  # parameters that are trained
    answer_tokens: float  # answer tokens written per second by all writers together
    slots: float  # anchors trained per second
    bytes_per_token: int  # bytes of a shard for each token
    workers: int  # workers that train
    largest_batch: int | None = None  # tokens of the largest batch that a card's memory holds, where that is known

    def lines(self, writing_minutes: float, training_minutes: float) -> list[str]:
        tokens, slots = 60 * writing_minutes * self.answer_tokens, 60 * training_minutes * self.slots
        disk = tokens * DOCUMENT / ANSWER * self.bytes_per_token
        memory = self.parameters * 4 * (4 + self.workers)  # weights, the best ones, two moments, each worker's gradients
        most = "" if self.largest_batch is None else f"; batches of up to about {self.largest_batch:,} tokens fit"
        return [
            f"the draft trains {self.parameters / 1e6:.1f} million parameters: {memory / 1e9:.2f} GB of memory beside the target's{most}",
            f"{writing_minutes:.0f} minutes of writing at {self.answer_tokens:.0f} answer tokens a second: {tokens / 1e3:.0f} thousand, "
            f"{disk / 1e9:.1f} GB of disk",
            f"{training_minutes:.0f} minutes of training at {self.slots:.0f} answer tokens a second: {slots / 1e3:.0f} thousand, "
            f"{slots / max(tokens, 1):.1f} passes over what was written",
        ]


@torch.inference_mode()
def writing_rate(writer: Writer, workers: int, seconds: float = SECONDS) -> float:
    """Answer tokens per second of `workers` single-thread writers, measured with one of them. The first half of the time is not counted."""
    rows = {slot: writer.begin(slot, slot) for slot in range(writer.cache.slots)}
    following, counted, started = len(rows), 0, time.monotonic()
    counting_since = started + seconds / 2
    while (now := time.monotonic()) < started + seconds:
        counted += sum(not row.asking for row in rows.values()) if now >= counting_since else 0
        for slot, _ in list(writer.step(rows)):
            rows[slot], following = writer.begin(slot, following), following + 1
    return workers * counted / (time.monotonic() - counting_since)


def writing_rate_of(found: Iterator[tuple[int, Conversation | None]], seconds: float = SECONDS) -> float:
    """Answer tokens per second of conversations as they end, from the first of them on: before that all are under way."""
    counted, started = 0, 0.0
    for _, row in found:
        if not started:
            started = time.monotonic()
        elif row is not None:
            counted += sum(map(len, row.answers))
        if time.monotonic() > started + seconds:
            break
    return counted / max(time.monotonic() - started, 1e-9)


def training_rate(trainer: Trainer, seconds: float = SECONDS) -> float:
    """Anchors per second, after one step that is not counted. The trainer must not be used afterwards."""
    batch = next(trainer.batches(0))
    trainer.step(batch)
    before, started = trainer.progress.slots, time.monotonic()
    while time.monotonic() < started + seconds:
        trainer.step(batch)
    return (trainer.progress.slots - before) / (time.monotonic() - started)


def made_up_examples(config: TargetConfig, count: int = 40) -> list[Example]:
    """Made-up conversations of usual lengths. The speed of a step does not depend on what they say."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (count, DOCUMENT), generator=draw).tolist()
    return [Example(row, [-1] * (DOCUMENT - ANSWER) + [0] * ANSWER, True) for row in tokens]


class MadeUpStates:
    """Random states for `made_up_examples`, bfloat16 as shards hold them."""

    def __init__(self, config: TargetConfig) -> None:
        self.config = config

    def states(self, examples: Sequence[Example]) -> States:
        rows, width = sum(len(example.tokens) for example in examples), self.config.hidden_size
        features, hidden = torch.randn(rows, 3 * width).bfloat16(), torch.randn(rows, width).bfloat16()
        return States(features, hidden, torch.randint(0, self.config.vocab_size, (rows,)))


def forecast_on(
    target: TargetModel, template: Template, play: SelfPlay, given: Sequence[Asked], trainer: Trainer, seconds: float = SECONDS
) -> Forecast:
    """The same for a target, prepared, that writes on a GPU, as tokens."""
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    rate = writing_rate_of(conversations(target, template, DevicePlay.of(play, target.device), given, itertools.count(), math.inf), seconds)
    return Forecast(parameters, rate, training_rate(trainer, seconds), BYTES_OF_TEXT, 1, trainer.memory.most())


def forecast(writer: Writer, trainer: Trainer, writers: int, seconds: float = SECONDS) -> Forecast:
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    bytes_per_token = 2 * (len(writer.settings.taps) + 1) * writer.target.config.hidden_size + 12  # states, and three whole numbers
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        written = writing_rate(writer, writers, seconds)
    finally:
        torch.set_num_threads(threads)
    return Forecast(parameters, written, training_rate(trainer, seconds), bytes_per_token, trainer.workers)
