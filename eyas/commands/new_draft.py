"""`eyas new-draft`: a draft for a model in one command and a given time, with no data set.

The model writes its own conversations, the draft trains on them, what it accepts is measured, and the directory tells all of it. Killed
at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from eyas.bench.prompts import PromptItem
from eyas.bench.report import print_result
from eyas.bench.speed import parse_methods, run_bench
from eyas.commands import train
from eyas.config import PRECISIONS, EyasError, Request, TrainSettings
from eyas.engine import load, load_target, load_tokenizer, target_directory
from eyas.model.weights import directory_hash, replace_text, target_config
from eyas.train import trainer as training
from eyas.train.card import CARD, PICTURE, can_draw, card, draw_curve
from eyas.train.features import Example, ShardStates
from eyas.train.forecast import MadeUpStates, forecast, free_space, made_up_examples
from eyas.train.selfplay import SLOTS, SelfPlay, Template, Writer, affordable, answer_tokens, data_folder, write_own_data, writing_precision

WRITING, TRAINING = 0.42, 0.53  # shares of the time; the rest measures
LEAST_HOURS = 0.05
RUN = "run.json"  # what the command was asked for and how long it has been writing
MEASURED = 12  # held-out questions
FALLBACK = "Tell me about hawks."  # where no held-out question is new
METHODS = "plain,eagle3@60x7x10,eagle3@chain:3,eagle3"


@dataclass
class Run:
    """What must not change between a run and its continuation, and how far the writing is."""

    target_sha256: str
    hours: float
    seed_prompts: str
    written_minutes: float = 0.0
    finished: bool = False

    @classmethod
    def begun(cls, out: Path, wanted: Run) -> Run:
        """The run that `out` holds, or the wanted one where it is new; one of other wishes is refused with the difference."""
        if not (out / RUN).exists():
            if out.exists() and any(not path.name.startswith(f".{RUN}.") for path in out.iterdir()):
                raise EyasError(f"{out} holds other things than a run of new-draft; choose a new directory as --out")
            return wanted
        try:
            found = cls(**json.loads((out / RUN).read_text()))
        except (OSError, ValueError, TypeError):
            raise EyasError(f"{out / RUN} cannot be read; choose another --out") from None
        names = ("target_sha256", "hours", "seed_prompts")
        pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
        told = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
        if told:
            raise EyasError(f"{out} was begun otherwise ({'; '.join(told)}); go on with the same or choose another --out")
        return found

    def save(self, out: Path) -> None:
        replace_text(out / RUN, json.dumps(asdict(self), indent=1))


def run(options: argparse.Namespace) -> int:
    if not options.hours >= LEAST_HOURS:
        raise EyasError(f"--hours {options.hours:g} is too short to train anything; give at least {LEAST_HOURS:g}")
    out = Path(options.out).expanduser().resolve()
    directory = target_directory(options.model)
    config = target_config(directory)
    taps = train.taps_from(None, config.num_hidden_layers)
    settings = TrainSettings(draft_vocab_size=min(TrainSettings.draft_vocab_size, config.vocab_size))
    questions, prompts_key = train.seed_questions(options.seed_prompts, console := Console(stderr=True, highlight=False))
    wanted = Run(directory_hash(directory), options.hours, prompts_key)
    if (state := Run.begun(out, wanted)).finished:
        print(f"{out} is finished; see {out / CARD}")
        return 0
    workers = os.cpu_count() or 1
    template = Template(load_tokenizer(directory), config.eos_token_ids)
    play = SelfPlay(target=wanted.target_sha256, template=template.text, taps=taps, seed_prompts=prompts_key)
    if options.dry_run:
        return dry_run(directory, template, play, questions, settings, out, options.hours, workers, console)
    if not can_draw():
        console.print("no learning-curve picture will be drawn: that needs matplotlib (pip install 'eyas[bench]')", markup=False)
    make_directory(out)
    state.save(out)
    resume = (out / training.CHECKPOINT).exists()
    try:
        if not resume:
            write(directory, play, questions, workers, state, out, console)
        examples, data = train.shard_facts([data_folder(play)], settings, training.read_checkpoint(out) if resume else None)
        facts = {**data, **train.facts_of_run(directory, wanted.target_sha256, taps), "command": command(options)}
        target = load_target(directory, "fp32")
        trainer = train.make_trainer(target, config, taps, examples, ShardStates(), settings, out, facts, workers, console)
        if resume:
            trainer.resume()
        train.run_with_progress(trainer, training.Budget(minutes=60 * TRAINING * options.hours), console)
        held_out = questions_of(trainer.held_out, trainer.examples, template)
        del trainer, target
        finish(options, directory, out, held_out, console)
    except KeyboardInterrupt:
        print(f"\nstopped; all of it is kept. Go on with: {command(options)}", file=sys.stderr)
        raise
    state.finished = True
    state.save(out)
    print(f"draft written to {out}; its card is {out / CARD}; try: {use(options, out)}")
    return 0


def dry_run(
    directory: Path,
    template: Template,
    play: SelfPlay,
    questions: list[str],
    settings: TrainSettings,
    out: Path,
    hours: float,
    workers: int,
    console: Console,
) -> int:
    """Say what the run would take and make; nothing is written."""
    console.print("measuring for about a minute ...")
    config = target_config(directory)
    examples = made_up_examples(config)
    trainer = train.make_trainer(
        load_target(directory, "fp32"), config, play.taps, examples, MadeUpStates(config), settings, out, {}, workers, Console(quiet=True)
    )
    writer = Writer(load_target(directory, writing_precision()).prepare(), template, play, questions, SLOTS)
    for line in forecast(writer, trainer, affordable(workers, directory, play)).lines(60 * WRITING * hours, 60 * TRAINING * hours):
        print(line)
    print(f"{free_space(data_folder(play)) / 1e9:.0f} GB are free for the written text, {free_space(out) / 1e9:.0f} GB for the draft")
    return 0


def make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EyasError(f"cannot write {out} ({error.strerror}); choose another --out") from None


def write(directory: Path, play: SelfPlay, questions: list[str], workers: int, state: Run, out: Path, console: Console) -> None:
    """Let the target write for its share of the time; what an earlier run of the same settings wrote is there already."""
    folder, minutes = data_folder(play), 60 * WRITING * state.hours
    started, before = time.monotonic(), state.written_minutes
    with train.progress(console) as bar:
        task = bar.add_task("the target writes", total=minutes)

        def report(written: int) -> None:
            state.written_minutes = before + (time.monotonic() - started) / 60
            state.save(out)
            bar.update(task, completed=state.written_minutes, description=f"the target writes, {written} answer tokens")

        write_own_data(directory, folder, play, questions, sys.maxsize, workers, report, minutes - before)
    state.written_minutes = max(state.written_minutes, minutes)
    state.save(out)
    total = sum(map(answer_tokens, folder.glob("*.safetensors")))
    console.print(f"the target has written {total} answer tokens in {folder}", markup=False, soft_wrap=True)


def questions_of(held_out: list[Example], trained: list[Example], template: Template) -> list[str]:
    """First questions of held-out conversations as text, such as were not trained with other answers; never none."""

    def question(example: Example) -> str:
        tokens = example.tokens[len(template.before) : example.answers.index(0) - len(template.after)]
        return template.tokenizer.decode(tokens).strip()

    seen = set(map(question, trained))
    found = dict.fromkeys(text for example in held_out if (text := question(example)) and text not in seen)
    return list(found)[:MEASURED] or [FALLBACK]


def finish(options: argparse.Namespace, directory: Path, out: Path, questions: list[str], console: Console) -> None:
    """Measure tau with real trees on held-out questions, and write picture and card."""
    engine = load(directory, out, precision=PRECISIONS[0])
    request = Request(seed=0, max_new_tokens=100)
    items = [PromptItem(number, question) for number, question in enumerate(questions, start=1)]
    with train.progress(console) as bar:
        task = bar.add_task("measuring", total=None)

        def tell(done: int, total: int, method: str) -> None:
            bar.update(task, completed=done, total=total, description=f"measuring {method}")

        result = run_bench(engine, items, parse_methods(METHODS), request, tell)
    if not result.get("complete", True):
        raise KeyboardInterrupt
    print_result(result, console)
    told = json.loads((out / "training.json").read_text())
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    if can_draw():
        draw_curve(told["curve"], out / PICTURE)
    (out / CARD).write_text(card(told, result, command(options), use(options, out)))


def command(options: argparse.Namespace) -> str:
    return shlex.join(["eyas", *options.arguments])


def use(options: argparse.Namespace, out: Path) -> str:
    target: list[Any] = ["--target", options.model] if options.model else []
    return shlex.join(["eyas", "generate", "Tell me about hawks.", *target, "--draft", str(out)])
