"""`eyas ablate`: what a change of training brings, in minutes. Drafts are trained on one text and differ only in what a variant changes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eyas.commands.data import from_conversations, from_self_play, own_words
from eyas.commands.follow import with_bar
from eyas.commands.output import result_file, terminal, write_result
from eyas.commands.train import budget_from, method_of, setting, settings_of, taps_from, workers_of
from eyas.config import EyasError, TrainSettings
from eyas.files.target import check_device, load_target, target_config, target_directory
from eyas.train.ablate import BASE, Trained, Variant, told, trained
from eyas.train.build import Setup, Studied, check_products, hold_out, usual_taps
from eyas.train.features import Example, ShardStates, StateSource, TapsOf, TargetStates
from eyas.train.shards import settings_of_folder

HELD_OUT = 0.1  # share of the conversations that is held out, 64 at most
MINUTES = 3.0  # for each draft where no budget is given
SELF_PLAY = 100_000  # answer tokens that the target writes where no number is given


def run(options: argparse.Namespace) -> int:
    variants, budget, out = variants_from(options), budget_from(options, MINUTES), result_file(options.out)
    check_device(options.device)
    directory = target_directory(options.target)
    config = target_config(directory)
    taps = taps_from(options.taps) or usual_taps(config.num_hidden_layers)
    base = base_settings(options, config.vocab_size)
    check_variants(options, variants, base, config.vocab_size)
    studied = Studied.at(directory, held_taps(options, taps, variants), options.chat_template_kwargs)
    console = terminal(stderr=True)
    examples, source = data_of(options, studied, base, console)
    kept, held_out = hold_out(examples, base)
    drafts = f"{len(variants)} variants, {options.seeds} of each, {budget.told()} for each draft"
    console.print(f"{len(kept)} conversations train, {len(held_out)} measure; {drafts}", soft_wrap=True)
    found: dict[str, Trained] = {}
    result: dict[str, Any] = {"conditions": conditions(options, studied, kept, held_out), "variants": {}}
    try:
        for variant in variants:
            console.print(f"training {variant.name}", markup=False, soft_wrap=True)
            setup = setup_of(options, studied, base, kept, held_out, source, variant.taps or taps)
            found[variant.name] = trained(setup, variant, budget, options.seeds, lambda trainer, budget: with_bar(trainer, budget, console))
            result["variants"][variant.name] = told(variant, found[variant.name], found[BASE])
            if out:
                write_result(out, result)
    finally:
        show(result, terminal())
    return 0


# ---- options ----


def variants_from(options: argparse.Namespace) -> list[Variant]:
    """The base, then a variant for each --set, with one setting, and each --variant, with several divided by spaces."""
    texts = [[text] for text in options.set] + [text.split() for text in options.variant]
    found = [Variant(BASE)]
    for parts in texts:
        name = " ".join(parts)
        taps = [taps_from(part.removeprefix("taps=")) for part in parts if part.startswith("taps=")]
        settings = dict(setting(part) for part in parts if not part.startswith("taps="))
        if "seed" in settings:
            raise EyasError("--set seed=..: every variant is trained with the same seeds; say how many with --seeds")
        if name in {each.name for each in found}:
            raise EyasError(f"variant {name!r} is asked for twice")
        found.append(Variant(name, settings, taps[-1] if taps else None))
    if len(found) == 1:
        raise EyasError("nothing to compare; name what a variant changes with --set NAME=VALUE or --variant 'NAME=VALUE NAME=VALUE'")
    if options.seeds < 1:
        raise EyasError(f"--seeds must be at least 1, not {options.seeds}")
    return found


def base_settings(options: argparse.Namespace, vocab_size: int) -> TrainSettings:
    usual = {"held_out": HELD_OUT, "products": "bf16" if options.device.startswith("cuda") else "fp32"}  # the same for every variant
    usual["draft_vocab_size"] = min(TrainSettings.draft_vocab_size, vocab_size)
    return settings_of(method_of(options), usual | dict(map(setting, options.common)))


def check_variants(options: argparse.Namespace, variants: list[Variant], base: TrainSettings, vocab_size: int) -> None:
    """Raise `EyasError`, before anything is trained, for settings that do not go together."""
    for variant in variants:
        settings = settings_of(method_of(options), {**vars(base), **variant.settings})
        check_products(settings, options.device)
        if settings.draft_vocab_size > vocab_size:
            raise EyasError(f"a draft vocabulary of {settings.draft_vocab_size} is larger than the target's {vocab_size}; ask for less")


def held_taps(options: argparse.Namespace, taps: tuple[int, ...], variants: list[Variant]) -> tuple[int, ...]:
    """The layers whose inputs are kept with the text: those that any variant reads, or those that given shards have."""
    wanted = sorted({*taps, *(tap for variant in variants for tap in variant.taps or ())})
    if not options.shards:
        return tuple(wanted)
    held = settings_of_folder(Path(options.shards[0]).expanduser()).get("taps", [])
    if missing := sorted(set(wanted) - set(held)):
        there = ", ".join(map(str, held))
        raise EyasError(f"{options.shards[0]} holds features of layers {there}, not of {missing[0]}; leave --shards out")
    return tuple(held)


def data_of(options: argparse.Namespace, studied: Studied, base: TrainSettings, console: Console) -> tuple[list[Example], StateSource]:
    if options.data:
        if options.shards or options.self_play:
            raise EyasError("--data brings conversations, --shards and --self-play are about text the target writes; choose")
        examples, _ = from_conversations(Path(options.data), studied, base, console, [])
        return examples, TargetStates(load_target(studied.directory, "fp32", options.device).prepare(), studied.taps)
    words = own_words(studied, None, None, console)
    wanted = options.self_play or SELF_PLAY
    examples, _ = from_self_play(options, words, base, wanted, workers_of(options), None)
    return examples, ShardStates()


def setup_of(
    options: argparse.Namespace,
    studied: Studied,
    base: TrainSettings,
    kept: list[Example],
    held_out: list[Example],
    source: StateSource,
    taps: tuple[int, ...],
) -> Setup:
    """What a draft is trained from. `source` holds the states that enter the layers of `studied`; the draft reads those of `taps`."""
    return Setup(
        target=load_target(studied.directory, "fp32", options.device),
        taps=taps,
        examples=kept,
        held_out=held_out,
        source=TapsOf(source, studied.taps, taps),
        settings=base,
        method=method_of(options),
        workers=workers_of(options),
    )


# ---- telling ----


def conditions(options: argparse.Namespace, studied: Studied, kept: list[Example], held_out: list[Example]) -> dict[str, Any]:
    counted = {"conversations": len(kept), "held_out": len(held_out), "seeds": options.seeds, "common": options.common}
    return {**studied.facts(), "method": method_of(options), **counted}


def show(result: dict[str, Any], console: Console) -> None:
    if not result["variants"]:
        return
    table = Table()
    for title in ("variant", "held-out tau", "more", "95%", "acceptance by step", "steps", "tokens"):
        table.add_column(title, no_wrap=title == "variant")
    for name, figures in result["variants"].items():
        low, high = figures.get("interval", (None, None))
        more = ("", "") if low is None else (f"{figures['more_than_base']:+.3f}", f"{low:+.3f} .. {high:+.3f}")
        taus = f"{figures['tau']:.3f}" + (
            f" ({min(figures['by_seed']):.3f} .. {max(figures['by_seed']):.3f})" if len(figures["by_seed"]) > 1 else ""
        )
        steps = " ".join(f"{value:.2f}" for value in figures["acceptance"])
        table.add_row(name, taus, *more, steps, str(figures["steps"]), f"{figures['slots']:,}")
    console.print(table)
    held_out = result["conditions"]["held_out"]
    luck = "" if result["conditions"]["seeds"] > 1 else "; what luck of training does they do not say: --seeds 3 does"
    console.print(f"more: than the base; intervals are paired, over {held_out} held-out conversations{luck}", soft_wrap=True)
