"""`eyas lesson ttt`: training-time test in minutes, on two drafts that learn from one small text with one unroll step and with seven."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eyas.commands.ablate import base_settings, setup_of
from eyas.commands.data import from_self_play, from_text, own_words, reading_target
from eyas.commands.follow import with_bar
from eyas.commands.output import picture_file, progress, terminal
from eyas.commands.train import budget_from, taps_from, workers_of
from eyas.config import EyasError, TrainSettings
from eyas.files.target import target_config, target_directory
from eyas.train.ablate import Trained, Variant, trained
from eyas.train.build import Studied, hold_out
from eyas.train.features import Example, ShardStates, StateSource, kept_states
from eyas.train.questions import SelfPlay
from eyas.train.texts import check_text
from eyas.train.trainer import Budget
from eyas.view.pictures import draw_steps

TOKENS = 60_000  # answer tokens that each draft reads: the text that lies here, twice
SELF_PLAY = 20_000  # answer tokens that a target without a text of its own here writes
TEXT = Path(__file__).parents[1] / "lessons" / "smollm2-135m.safetensors"  # what the embedded target wrote, 30 thousand answer tokens
DRAFTS = {"one unroll step": 1, "seven": 7}
BAR = 30  # columns of a bar that stands for always
TITLE = "how often a guess is right, of those whose guesses before were right, on text that was held out"
WHY = (
    "Step 1 reads g, the target's own feature. From step 2 on the draft reads its own output in the place of g, for the target has not "
    "read that far. Trained with one unroll step it has never met that output; trained with seven it has (docs/how-it-works.md)."
)


def run(options: argparse.Namespace) -> int:
    budget, picture = budget_of(options), picture_file("--plot", options.plot)
    directory = target_directory(options.target)
    settings = base_settings(options, target_config(directory).vocab_size)
    studied = Studied.at(directory, taps_from(options.taps), None)
    console = terminal(stderr=True)
    examples, source = text_of(options, studied, settings, console)
    kept, held_out = hold_out(examples, settings)
    told = f"{len(kept)} conversations train, {len(held_out)} measure; {budget.told()} for each draft"
    console.print(told, soft_wrap=True)
    found: dict[str, Trained] = {}
    for name, steps in DRAFTS.items():
        console.print(f"training with {name}", soft_wrap=True)
        setup = setup_of(options, studied, settings, kept, held_out, source, studied.taps)
        variant = Variant(name, {"unroll_steps": steps})
        found[name] = trained(setup, variant, budget, 1, lambda trainer, budget: with_bar(trainer, budget, console))
    right = {name: each.simulations[0].acceptance() for name, each in found.items()}
    show(found, right, terminal())
    if picture:
        try:
            draw_steps(right, picture)
        except OSError as error:
            raise EyasError(f"--plot {picture} could not be written ({error.strerror})") from None
    return 0


def budget_of(options: argparse.Namespace) -> Budget:
    """What each draft is trained for. Where nothing is asked for both read the same tokens: the unroll steps are all they differ in."""
    if options.tokens is None and options.steps is None and options.minutes is None:
        options.tokens = TOKENS
    return budget_from(options)


def text_of(options: argparse.Namespace, studied: Studied, settings: TrainSettings, console: Console) -> tuple[list[Example], StateSource]:
    """The lesson's text and where the target's states for it come from: the text that lies here, where this target wrote it and no other
    is asked for; else the target writes one."""
    words = own_words(studied, None, None, console)
    if options.self_play is None and wrote(words.play):
        examples, _ = from_text([TEXT], words, settings, None, [])
        source = kept_states(reading_target(studied, options.device), studied.taps, examples)
        with progress(console) as bar:  # now: else the first draft would spend its minutes on it
            task = bar.add_task("the target reads a text that it wrote before", total=len(examples), unit="conversations")
            for number, example in enumerate(examples, start=1):
                source.states([example])
                bar.update(task, completed=number)
        return examples, source
    examples, _ = from_self_play(options, words, settings, options.self_play or SELF_PLAY, workers_of(options), None)
    return examples, ShardStates()


def wrote(play: SelfPlay) -> bool:
    """Whether the text that lies here was written by the target that plays so."""
    try:
        check_text(TEXT, play)
    except EyasError:
        return False
    return True


def show(found: dict[str, Trained], right: dict[str, list[float]], console: Console) -> None:
    table = Table(
        title="how often a guess is right, of those whose guesses before were right, on text that was held out", title_justify="left"
    )
    table.add_column("step")
    for name in found:
        table.add_column(f"trained with {name}", no_wrap=True)
    for step, shares in enumerate(zip(*right.values(), strict=True), start=1):
        table.add_row(str(step), *(f"{share:.2f} {'█' * round(BAR * share)}" for share in shares))
    table.add_section()
    table.add_row("tau", *(f"{each.simulations[0].tau():.2f} tokens a round, in a chain of seven" for each in found.values()))
    table.add_row("trained", *(f"{each.anchors:,} answer tokens in {each.minutes:.1f} min" for each in found.values()))
    console.print(table)
    console.print(WHY, soft_wrap=True)
