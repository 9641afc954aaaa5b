"""How fast a target writes text on a GPU, how fast it reads text for its states, and how fast a draft trains on them.

    python benchmarks/gpu_training.py [--device cuda] [--slots 2048] [--seconds 15] [--batches 4096 8192 16384] [--out F.json]

Random weights in the shape of SmolLM2-135M, which are as fast as the real ones; needs no files and no network. Answers run to their full
length, since such a target ends none. Of the training it also says which kernels take the card's time. `--quick` runs it on a CPU.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import options, parsed, tell

from eyas.config import TrainSettings
from eyas.files.target import load_target
from eyas.kernels.captured import synchronize
from eyas.model.protocols import TargetModel
from eyas.train.build import Setup, Studied, build
from eyas.train.features import Example, StateSource, kept_states
from eyas.train.fixed_writer import FixedWriter
from eyas.train.questions import Asked, SelfPlay
from eyas.train.shards import Written
from eyas.train.template import Template
from eyas.train.trainer import Trainer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "scripts")]
WARM_UP, TIMED, PROFILED = 20, 40, 3  # steps
LEAST = 8  # conversations, of which some are held out
QUESTIONS = [Asked((f"What is {number} and {number}?",)) for number in range(50)]


def writing(target: TargetModel, template: Template, play: SelfPlay, slots: int, seconds: float) -> tuple[dict[str, Any], list[Written]]:
    """What is written in so many seconds from the first stretch on, and how much that is a second."""
    writer = FixedWriter(target, template, play, QUESTIONS, slots)
    synchronize(target.device)
    found, answer_tokens, began = [], 0, time.monotonic()
    for _, row in writer.write(itertools.count()):
        if row is not None:
            found.append(Written(row.tokens, row.numbers(), row.start.temperature))
            answer_tokens += sum(map(len, row.answers))
        if time.monotonic() > began + seconds and len(found) >= LEAST:
            break
    taken = time.monotonic() - began
    synchronize(target.device)
    told = {"slots": slots, "seconds": round(taken, 1), "answer_tokens": answer_tokens}
    return told | {"answer_tokens_per_second": round(answer_tokens / taken)}, found


def reading(source: StateSource, examples: list[Example], device: torch.device) -> float:
    """Tokens a second whose states the target gives, first in and first kept."""
    synchronize(device)
    began, parts = time.monotonic(), [examples[first : first + 24] for first in range(0, 240, 24)]
    for part in filter(None, parts):
        source.states(part)
    synchronize(device)
    return sum(len(example.tokens) for part in filter(None, parts) for example in part) / (time.monotonic() - began)


def training(trainer: Trainer, device: torch.device) -> dict[str, float]:
    batches = itertools.chain.from_iterable(map(trainer.batches, itertools.count()))
    for _ in range(WARM_UP):
        trainer.step(next(batches))
    synchronize(device)
    before, began = trainer.progress.slots, time.monotonic()
    for _ in range(TIMED):
        trainer.step(next(batches))
    synchronize(device)
    taken, anchors = time.monotonic() - began, trainer.progress.slots - before
    return {
        "anchors_per_second": round(anchors / taken),
        "ms_a_step": round(1e3 * taken / TIMED, 2),
        "anchors_a_step": round(anchors / TIMED),
    }


def kernels_of(trainer: Trainer) -> list[str]:
    """The kernels in which a step spends the card's time, and the time of all of them."""
    from torch.profiler import ProfilerActivity, profile

    batch = next(trainer.batches(0))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            trainer.step(batch)
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in events)
    lines = [
        f"{event.self_device_time_total / PROFILED / 1e3:7.2f} ms {event.count // PROFILED:5d} x {event.key[:90]}" for event in events[:14]
    ]
    return [f"{whole / PROFILED / 1e3:.2f} ms of the card a step", *lines]


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens")
    given = parsed(parser, words, device="cpu", slots=8, seconds=5, batches=[300])
    device = torch.device(given.device)
    from gpu_train import made_up_target

    with tempfile.TemporaryDirectory(prefix="eyas-") as scratch:
        directory = made_up_target(Path(scratch), real_shape=not given.quick)
        found = measured(Studied.at(directory), given, device)
    tell(found, given.out)


def measured(studied: Studied, given: Any, device: torch.device) -> dict[str, Any]:
    from rich.console import Console

    from eyas.commands.data import own_words

    words = own_words(studied, None, None, Console(stderr=True))
    play = SelfPlay(studied.sha256, words.template.text, studied.taps, seeded_share=1.0)
    target = load_target(studied.directory, "bf16" if device.type == "cuda" else "fp32", given.device).prepare()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    found["writing"], written = writing(target, words.template, play, given.slots, given.seconds)
    examples = [Example(each.tokens, each.answers, each.temperature == 0) for each in written]
    source = kept_states(target, studied.taps, examples)
    found["reading_tokens_per_second"] = round(reading(source, examples, device))
    loose = load_target(studied.directory, "fp32", given.device)
    vocabulary = 200 if given.quick else 16384
    for batch in given.batches:
        settings = TrainSettings(draft_vocab_size=vocabulary, tokens_per_batch=batch, induction=not given.quick)
        trainer = build(Setup(loose, studied.taps, examples, source, settings, None))
        found[f"training, batches of {batch} tokens"] = training(trainer, device)
        if device.type == "cuda":
            found[f"kernels of a step of {batch} tokens"] = kernels_of(trainer)
            found["gpu_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return found


if __name__ == "__main__":
    main()
