"""`eyas new-draft`: a draft for a model in one command and a given time, with no data set.

The model writes its own conversations, the draft trains on them, its acceptance is measured, and the directory tells all of it. If it is
killed at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eyas.bench.prompts import PromptItem
from eyas.bench.report import print_result
from eyas.bench.speed import parse_methods, run_bench
from eyas.commands.data import OwnWords, disk_limit, evaluation_prompts, free_space, own_words, reading_target, shard_facts, slow_start
from eyas.commands.follow import follow
from eyas.commands.next_steps import again, generate_with
from eyas.commands.output import progress, terminal
from eyas.commands.writer import check_writer, earlier_text, let_write, say_own_share, written_text
from eyas.config import PRECISIONS, EyasError, Request, TrainSettings
from eyas.decode.prompt import Prompt
from eyas.engine import Engine, load
from eyas.files.disk import recover_directory, replace_text
from eyas.files.target import check_device, load_target, target_directory
from eyas.train import trainer as training
from eyas.train.build import Setup, Studied, build, with_trees
from eyas.train.card import CARD, PICTURE, card
from eyas.train.device_writer import DevicePlay, write_here
from eyas.train.features import Example, ShardStates, StateSource, kept_states
from eyas.train.forecast import MadeUpStates, forecast, forecast_on, made_up_examples
from eyas.train.selfplay import SLOTS, Writer
from eyas.train.shards import PATTERN, Counts, counts_of
from eyas.train.template import Template
from eyas.train.writers import Limit, affordable, writing_precision
from eyas.view.pictures import can_draw, draw_curve

WRITING, TRAINING = 0.42, 0.53  # shares of the time; the rest measures
LEAST_HOURS, MOST_HOURS = 0.05, 10_000
RUN = "run.json"  # what the command was asked for and how long it has been writing
MEASURED = 12  # held-out questions
RAW_PROMPT = 12  # tokens of a text to go on with, where there are no questions
FALLBACK = "Tell me about hawks."  # where no held-out question is new
METHODS = "plain,eagle3@60x7x10,eagle3@chain:3,eagle3"


@dataclass
class Run:
    """What must not change between a run and its resumption, and how far the writing is."""

    target_sha256: str
    hours: float
    seed_prompts: str
    written_minutes: float = 0.0
    finished: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    writer: bool = False  # whether an engine that runs already writes
    device: str = "cpu"

    @classmethod
    def begun(cls, out: Path, wanted: Run) -> Run:
        """The run that `out` holds, or the wanted one where `out` is new. Raises `EyasError`, which names the differences, if they
        differ."""
        if not (out / RUN).exists():
            if out.exists() and any(not path.name.startswith(f".{RUN}.") for path in out.iterdir()):
                raise EyasError(f"{out} holds other things than a run of new-draft; choose a new directory as --out")
            return wanted
        try:
            found = cls(**json.loads((out / RUN).read_text()))
        except (OSError, ValueError, TypeError):
            raise EyasError(f"{out / RUN} cannot be read; choose another --out") from None
        names = ("target_sha256", "hours", "seed_prompts", "chat_template_kwargs", "writer", "device")
        pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
        told = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
        if told:
            raise EyasError(f"{out} was begun otherwise ({'; '.join(told)}); go on with the same or choose another --out")
        return found

    def save(self, out: Path) -> None:
        replace_text(out / RUN, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class Job:
    """What one run makes its draft from."""

    studied: Studied
    words: OwnWords
    settings: TrainSettings
    out: Path
    hours: float
    device: str = "cpu"

    @property
    def on_card(self) -> bool:
        """Whether the model writes, and the draft trains, on a GPU: as tokens, whose states are read there."""
        return self.device.startswith("cuda")

    @property
    def workers(self) -> int:
        return 1 if self.on_card else os.cpu_count() or 1  # who share a card wait for each other

    def setup(
        self,
        examples: list[Example],
        source: StateSource,
        facts: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Setup:
        return Setup(
            target=load_target(self.studied.directory, "fp32", self.device),
            taps=self.studied.taps,
            examples=examples,
            source=source,
            settings=self.settings,
            out=self.out,
            facts=facts or {},
            workers=self.workers,
            say=say,
        )


def run(options: argparse.Namespace) -> int:
    if not options.hours >= LEAST_HOURS:
        raise EyasError(f"--hours {options.hours:g} is too short to train anything; give at least {LEAST_HOURS:g}")
    if options.hours > MOST_HOURS:
        raise EyasError(f"--hours {options.hours:g} is longer than anything runs; give at most {MOST_HOURS:g}")
    check_writer(options)
    check_device(options.device)
    if options.writer and options.dry_run:
        raise EyasError("--dry-run measures how fast the target writes here, and --writer lets an engine write; leave one of them out")
    out = Path(options.out).expanduser().resolve()
    recover_directory(out)
    studied = Studied.at(target_directory(options.model), None, options.chat_template_kwargs)
    settings = TrainSettings(draft_vocab_size=min(TrainSettings.draft_vocab_size, studied.config.vocab_size))
    console = terminal(stderr=True)
    evaluation_prompts(options.apart)  # hours of writing come first: a file that cannot be read is said before
    words = own_words(studied, options.seed_prompts, None, console)
    wanted = Run(
        words.play.target,
        options.hours,
        words.play.seed_prompts,
        chat_template_kwargs=studied.chat_template_kwargs,
        writer=options.writer is not None,
        device=options.device,
    )
    if (state := Run.begun(out, wanted)).finished:
        print(f"{out} is finished; see {out / CARD}")
        return 0
    job = Job(studied, words, settings, out, options.hours, options.device)
    if options.dry_run:
        return dry_run(job, console)
    if not can_draw():
        console.print("no learning-curve picture will be drawn: that needs matplotlib (pip install 'eyas[bench]')", markup=False)
    make_directory(out)
    state.save(out)
    try:
        finish(options, job, state, trained(options, job, state, console), console)
    except KeyboardInterrupt:
        print(f"\nstopped; all of it is kept. Go on with: {again(options)}", file=sys.stderr)
        raise
    state.finished = True
    state.save(out)
    print(f"draft written to {out}; its card is {out / CARD}; try: {generate_with(options, options.model, out, job.words.template.chat)}")
    return 0


def trained(options: argparse.Namespace, job: Job, state: Run, console: Console) -> list[str]:
    """Write and train, or go on with it; returns held-out questions to measure with."""
    before = training.read_checkpoint(job.out) if (job.out / training.CHECKPOINT).exists() else None
    examples, source, data = text_of(options, job, state, before, console)
    facts = {**data, **job.studied.facts(), "command": again(options)}
    trainer = build(job.setup(examples, source, facts, lambda line: console.print(line, soft_wrap=True)))
    with_trees(trainer, job.studied.directory, job.device)
    if before is not None:
        trainer.resume(before)
    follow(trainer, training.Budget(minutes=60 * TRAINING * job.hours), console)
    return questions_of(trainer.held_out, trainer.examples, job.words.template)


def text_of(
    options: argparse.Namespace, job: Job, state: Run, before: dict[str, Any] | None, console: Console
) -> tuple[list[Example], StateSource, dict[str, Any]]:
    """Examples, written now where none were trained on before; where their states come from, and what they are."""
    if options.writer or job.on_card:
        write_text = write_by_engine if options.writer else write_on_card
        path = earlier_text(before) if before else write_text(options, job, state, console)
        examples, data = written_text(options, job.words, job.settings, before, path)
        source = kept_states(reading_target(job.studied, job.device), job.studied.taps, examples)
        if options.writer:
            say_own_share(source, examples, data, console)
        return examples, source, data
    if before is None:
        write(job, state, disk_limit(options.disk, job.words.folder), console)
    shards = sorted(job.words.folder.glob(PATTERN))
    examples, data = shard_facts(shards, [job.words.folder], job.settings, before, job.words.template, options.apart)
    return examples, ShardStates(), data


def dry_run(job: Job, console: Console) -> int:
    """Say what the run would take and make; nothing is written."""
    words, directory, config = job.words, job.studied.directory, job.studied.config
    if job.on_card:
        for line in memory_on_card(job):
            print(line)
    console.print("measuring for about a minute ...")
    trainer = build(job.setup(made_up_examples(config), MadeUpStates(config)))
    if job.on_card:
        told = forecast_on(reading_target(job.studied, job.device), words.template, words.play, words.questions, trainer)
    else:
        writer = Writer(load_target(directory, writing_precision()).prepare(), words.template, words.play, words.questions, SLOTS)
        told = forecast(writer, trainer, affordable(job.workers, directory, words.play))
    for line in told.lines(60 * WRITING * job.hours, 60 * TRAINING * job.hours):
        print(line)
    print(f"{free_space(words.folder) / 1e9:.0f} GB are free for the written text, {free_space(job.out) / 1e9:.0f} GB for the draft")
    return 0


def memory_on_card(job: Job) -> list[str]:
    """What the run holds in the card's memory, before any of it is loaded."""
    config, weights = job.studied.config, sum(file.stat().st_size for file in job.studied.directory.glob("*.safetensors"))
    longest = min(job.words.play.longest, config.max_position_embeddings)
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    state = 2 * (len(job.studied.taps) + 1) * config.hidden_size
    free = torch.cuda.mem_get_info(job.device)[0] if torch.cuda.is_available() else None
    told = "" if free is None else f"; {free / 1e9:.0f} GB are free on {job.device}"
    return [
        f"on the card: the target takes about {weights / 1e9:.1f} GB to write and to read, and as loose weights beside the draft up to "
        f"{2 * weights / 1e9:.1f} GB",
        f"a conversation under way takes {row * longest / 1e6:.0f} MB for its keys, a token's kept states {state} bytes{told}",
    ]


def make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EyasError(f"cannot write {out} ({error.strerror}); choose another --out") from None


def write(job: Job, state: Run, most_bytes: float, console: Console) -> None:
    """Let the target write for its share of the time; what an earlier run of the same settings wrote is there already."""
    note = slow_start(job.words)
    with writing("the target writes", job, state, console) as (left, report):

        def told(written: int) -> None:
            report(written)
            note(written, console)

        shards = job.words.write(Limit(minutes=left, bytes=most_bytes), job.workers, told)
    counts = sum(map(counts_of, shards), Counts())
    console.print(
        f"the target has written {counts.answer_tokens} answer tokens in {job.words.folder} ({counts.bytes / 1e9:.1f} GB); "
        f"{counts.looped} answers were cut where they looped, {counts.dropped} conversations were dropped as too short",
        markup=False,
        soft_wrap=True,
    )


def write_by_engine(options: argparse.Namespace, job: Job, state: Run, console: Console) -> Path:
    """The same by an engine; the file of its text."""
    with writing("the engine writes", job, state, console) as (left, report):
        return let_write(options, job.words, Limit(minutes=left), report, console)


def write_on_card(options: argparse.Namespace, job: Job, state: Run, console: Console) -> Path:
    """The same by the target on a GPU, as many conversations at once as its memory holds."""
    target = reading_target(job.studied, job.device)
    with writing("the target writes", job, state, console) as (left, report):
        play = DevicePlay.of(job.words.play, target.device)
        return write_here(target, job.words.template, play, job.words.questions, Limit(minutes=left), report)


@contextmanager
def writing(who: str, job: Job, state: Run, console: Console) -> Iterator[tuple[float, Callable[[int], None]]]:
    """The minutes that are left for writing, and what is called with the answer tokens that there are; the minutes spent are noted."""
    minutes = 60 * WRITING * state.hours
    started, before = time.monotonic(), state.written_minutes
    with progress(console) as bar:
        task = bar.add_task(who, total=minutes, told="0 answer tokens")

        def report(written: int) -> None:
            state.written_minutes = before + (time.monotonic() - started) / 60
            state.save(job.out)
            bar.update(task, completed=state.written_minutes, told=f"{written:,} answer tokens")

        yield minutes - before, report
    state.written_minutes = max(state.written_minutes, minutes)
    state.save(job.out)


def questions_of(held_out: Sequence[Example], trained: Sequence[Example], template: Template) -> list[str]:
    """First questions of held-out conversations as text, without those that were trained with other answers; at least one.

    Without a chat template: the first tokens of held-out texts.
    """

    def question(example: Example) -> str:
        start = len(template.before) if template.chat else 0
        end = example.answers.index(0) - len(template.after) if template.chat else RAW_PROMPT
        return template.tokenizer.decode(example.tokens[start:end], skip_special_tokens=not template.chat).strip()

    seen = set(map(question, trained))
    found = dict.fromkeys(text for example in held_out if (text := question(example)) and text not in seen)
    return list(found)[:MEASURED] or [FALLBACK]


def finish(options: argparse.Namespace, job: Job, state: Run, questions: list[str], console: Console) -> None:
    """Measure tau with real trees on held-out questions, as many as the time that is left allows, and write picture and card."""
    out, chat = job.out, job.words.template.chat
    told = json.loads((out / "training.json").read_text())
    deadline = time.monotonic() + 60 * (60 * job.hours - state.written_minutes - told["minutes"])
    engine = load(job.words.directory, out, job.device, PRECISIONS[0])
    request = Request(seed=0, max_new_tokens=100, raw=not chat, chat_template_kwargs=job.studied.chat_template_kwargs)
    readable = [question for question in questions if fits(engine, question, request)] or [FALLBACK]
    items = [PromptItem(number, question) for number, question in enumerate(readable, start=1)]
    with progress(console) as bar:
        task = bar.add_task("measuring", total=None)

        def tell(done: int, total: int, method: str) -> None:
            bar.update(task, completed=done, total=total, description=f"measuring {method}")

        result = run_bench(engine, items, parse_methods(METHODS), request, tell, deadline)
    if not result.get("complete", True):
        raise KeyboardInterrupt
    print_result(result, console)
    if left_out := result.get("left_out"):
        console.print(f"measured on {len(items) - left_out} of {len(items)} held-out questions: the time of --hours is over", markup=False)
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    if can_draw():
        draw_curve(told["curve"], out / PICTURE)
    (out / CARD).write_text(card(told, result, again(options), generate_with(options, options.model, out, chat), can_draw()))


def fits(engine: Engine, question: Prompt, request: Request) -> bool:
    """Whether a question leaves room for an answer once its text is tokenized again, which may give more tokens than it had."""
    try:
        tokens = engine.encode(question, request.raw, request.tools, request.chat_template_kwargs)
        return len(tokens) + request.max_new_tokens <= engine.target.config.max_position_embeddings
    except EyasError:
        return False
