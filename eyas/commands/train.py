"""`eyas train`: a draft for a target, from text that the target writes itself or from the user's conversations.

Knows options; train/build.py builds the run.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from eyas import launched
from eyas.commands.common import draft_path
from eyas.commands.data import evaluation_prompts, from_conversations, from_self_play, from_text, own_words, reading_target
from eyas.commands.follow import follow
from eyas.commands.next_steps import again, generate_with
from eyas.commands.output import terminal
from eyas.commands.writer import check_writer, from_device, from_writer, say_own_share
from eyas.config import PRODUCTS, SELF_PLAY_TOKENS, TRAIN_MINUTES, DraftConfig, EyasError, TrainSettings
from eyas.engine import DEFAULT
from eyas.files.disk import recover_directory
from eyas.files.eagle3_files import check_fits, config_from_file
from eyas.files.target import check_device, load_target, target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.methods import METHODS, method_named, trained
from eyas.train import trainer as training
from eyas.train.build import TREE, Setup, Studied, build, check_earlier, check_products, earlier_facts, with_trees
from eyas.train.features import Example, ShardStates, StateSource, kept_states
from eyas.train.losses import LOSSES
from eyas.train.parallel import Ranks
from eyas.train.split import check_split, load_split

SHAPE = ("fc_norm", "norm_output", "draft_layers")
EAGLE_3 = ("top_layer_only", "random_head", "induction", *SHAPE)
MOST = {"tokens": 10**12, "steps": 10**12, "minutes": 10**6, "self_play": 10**12, "workers": 1024}
MOST_HEADS = {"medusa": 16, "mtp": 16}  # that their drafts may have, so that they can be read
ONLY_OF = dict.fromkeys(EAGLE_3, "eagle3") | {"token_left_out": "eagle1"}


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    budget = budget_from(options)
    check_writer(options)
    check_device(options.device)
    if options.split_target:
        check_split(
            not options.writer and bool(options.self_play or options.regenerate or not (options.data or options.text or options.shards))
        )
    ranks = Ranks.join(options.device)
    try:
        with ranks.complete():
            status = train(options, settings, budget, ranks)
    except BaseException:
        launched.end_unasked()
        atexit.register(ranks.leave)  # others end when this process has left: by then it has said why it ends
        raise
    ranks.leave()
    return status


def train(options: argparse.Namespace, settings: TrainSettings, budget: training.Budget, ranks: Ranks) -> int:
    out = Path(options.out).expanduser().resolve()
    if ranks.first:
        check_out(out, options.resume)
    begun = begun_with(options)
    directory = target_directory(options.target)
    if begun:
        check_fits(begun, target_config(directory))  # before its taps are looked for in a target that may have fewer layers
    taps = taps_from(options.taps) or (begun and begun.taps)
    studied = Studied.at(directory, taps, options.chat_template_kwargs)
    check_together(options, settings, studied)
    start = draft_path(options.start) if options.start else None
    if start:
        check_earlier(start, studied.config, studied.taps, settings)
    evaluation_prompts(options.apart)  # hours of writing come first: a file that cannot be read is said before
    console = terminal(stderr=True, quiet=not ranks.first)
    before = training.read_checkpoint(out) if options.resume else None
    examples, source, facts = data_of(options, studied, settings, console, ranks, before)
    method, split = method_of(options), bool(options.split_target)
    device = device_of(options.device, ranks)
    setup = Setup(  # the target not before: while workers write, each holds its own
        target=load_split(studied.directory, device, ranks) if split else load_target(studied.directory, "fp32", device),
        taps=studied.taps,
        examples=examples,
        source=source,
        settings=settings,
        out=out,
        facts={**facts, "method": method, **studied.facts(), **earlier_facts(start)},
        method=method,
        workers=options.workers or (1 if device.startswith("cuda") else workers_of(options)),  # who share a card wait for each other
        ranks=ranks,
        start=start,
        split=split,
        # of such text, and on a card, states have no bits that keeping would round away
        keep=split and (bool(options.text or options.writer) or device.startswith("cuda")),
        say=lambda line: console.print(line, soft_wrap=True),
    )
    trainer = build(setup)
    if settings.tree_every and not split:  # rounds need a whole target
        with_trees(trainer, studied.directory, device)
    if before is not None:
        trainer.resume(before)
        if budget.spent(trainer.progress) >= 1:
            done = f"{trainer.progress.steps:,} steps, {trainer.progress.slots:,} tokens, {trainer.progress.minutes:.1f} minutes"
            console.print(f"the budget of {budget.told()} was spent before ({done}): nothing is trained; ask for more", soft_wrap=True)
    try:
        follow(trainer, budget, console)
    except KeyboardInterrupt:
        print(f"\nstopped; the checkpoint is saved. Go on with: {again(options, '--resume')}", file=sys.stderr)
        raise
    if ranks.first:
        if options.data and not options.regenerate and (tau := trainer.own_tau()) is not None:
            told = f"on the target's own answers to held-out questions, in real rounds with trees {TREE}: tau {tau:.2f}"
            console.print(f"{told} (what was measured above was measured on text that it did not write)", soft_wrap=True)
        chat = bool(getattr(load_tokenizer(studied.directory), "chat_template", None))
        print(f"draft written to {out}; try: {generate_with(options, options.target, out, chat)}")
    return 0


def data_of(
    options: argparse.Namespace, studied: Studied, settings: TrainSettings, console: Console, ranks: Ranks, before: dict[str, Any] | None
) -> tuple[list[Example], StateSource | None, dict[str, Any]]:
    """Examples, where their states come from (None: the target reads them beside the training), and what they are."""
    if options.data and not options.regenerate:
        examples, facts = from_conversations(Path(options.data), studied, settings, console, options.apart)
        return examples, None, facts
    words, wanted = own_words(studied, options.seed_prompts, options.data, console), options.self_play or SELF_PLAY_TOKENS
    if options.text:
        files = [Path(path).expanduser().resolve() for path in dict.fromkeys(options.text)]
        examples, facts = from_text(files, words, settings, before, options.apart)
        if options.split_target:
            return examples, None, facts
        return examples, read_here(options, studied, examples, ranks), facts
    if not ranks.first:
        ranks.wait()  # while the first lets the target write; then what it needs is there
    device = device_of(options.device, ranks)
    on_card = device.startswith("cuda") and not options.shards
    if options.writer:
        examples, facts = from_writer(options, words, settings, wanted, before, console)
    elif on_card:
        examples, facts = from_device(options, words, settings, wanted, before, lambda: reading_target(studied, device))
    else:
        examples, facts = from_self_play(options, words, settings, wanted, workers_of(options), before)
    if ranks.first:
        ranks.wait()
    if not (options.writer or on_card):
        return examples, ShardStates(), facts
    if options.split_target:
        return examples, None, facts
    source = read_here(options, studied, examples, ranks)
    if options.writer:
        say_own_share(source, examples, facts, console)
    return examples, source, facts


def read_here(options: argparse.Namespace, studied: Studied, examples: list[Example], ranks: Ranks) -> StateSource:
    """The target reads the examples here, and its states are kept."""
    return kept_states(reading_target(studied, device_of(options.device, ranks)), studied.taps, examples)


# ---- options ----


def check_together(options: argparse.Namespace, settings: TrainSettings, studied: Studied) -> None:
    """Raise `EyasError` for options that do not go together."""
    if settings.draft_vocab_size > studied.config.vocab_size:
        there = f"a draft vocabulary of {settings.draft_vocab_size} is larger than the target's {studied.config.vocab_size}"
        raise EyasError(f"{there}; lower --draft-vocab")
    if options.start is not None and method_of(options) != DEFAULT:
        raise EyasError(f"--from goes on with an {DEFAULT} draft; train {method_of(options)} anew")
    if options.regenerate and not options.data:
        raise EyasError("--regenerate answers anew what a file asks; name it with --data F.jsonl")
    if options.data and not options.regenerate and (options.shards or options.self_play or options.seed_prompts):
        raise EyasError("--data brings conversations, --shards, --self-play and --seed-prompts are about text the target writes; choose")
    if options.text and (options.data or options.shards or options.self_play or options.seed_prompts):
        raise EyasError("--text brings text that the target wrote before, --data, --shards, --self-play and --seed-prompts other; choose")
    if options.writer and (options.text or options.shards or (options.data and not options.regenerate)):
        raise EyasError("--writer lets an engine write the text; --text, --shards and --data without --regenerate bring it; choose")


def workers_of(options: argparse.Namespace) -> int:
    return options.workers or os.cpu_count() or 1


def settings_from(options: argparse.Namespace) -> TrainSettings:
    method = method_of(options)
    usual = METHODS[method].training().SETTINGS
    steps = usual["unroll_steps"] if options.unroll is None else options.unroll
    if steps < 1:
        raise EyasError(f"--unroll must be at least 1, not {steps}")
    if not options.learning_rate > 0:
        raise EyasError(f"--learning-rate must be above 0, not {options.learning_rate}")
    if options.draft_vocab is not None and options.draft_vocab < 1:
        raise EyasError(f"--draft-vocab must be at least 1, not {options.draft_vocab}")
    named = {
        "unroll_steps": steps,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
    }
    if (begun := begun_with(options)) is not None:
        named |= {"draft_vocab_size": begun.draft_vocab_size, **{name: getattr(begun, name) for name in SHAPE}}
    named |= {} if options.draft_vocab is None else {"draft_vocab_size": options.draft_vocab}
    settings = settings_of(method, named | dict(map(setting, options.set)))
    check_products(settings, options.device)
    return settings


def begun_with(options: argparse.Namespace) -> DraftConfig | None:
    """The shape of the draft that training goes on with (--from): it stands where nothing else is asked for. None: it begins a new one."""
    if options.start is None or method_of(options) != DEFAULT:
        return None
    return config_from_file(draft_path(options.start))


def settings_of(method: str, asked: dict[str, Any]) -> TrainSettings:
    """A method's own settings, with those that were asked for changed."""
    for name, value in asked.items():
        if ONLY_OF.get(name, method) != method and value != getattr(TrainSettings(induction=False), name):
            raise EyasError(f"--set {name} is for method {ONLY_OF[name]}, not for {method}")
    settings = TrainSettings(**METHODS[method].training().SETTINGS | asked)
    if settings.unroll_steps > MOST_HEADS.get(method, settings.unroll_steps):
        raise EyasError(f"a {method} draft has at most {MOST_HEADS[method]} heads or modules, not {settings.unroll_steps}; lower --unroll")
    return settings


def method_of(options: argparse.Namespace) -> str:
    """The method whose draft is trained."""
    name = getattr(options, "method", None) or DEFAULT
    if name not in trained():
        method_named(name)
        raise EyasError(f"method {name} has no draft to train; choose {', '.join(trained())}")
    return name


def setting(text: str) -> tuple[str, Any]:
    """`name=value` of --set, the value in the setting's own kind."""
    name, _, value = text.partition("=")
    kinds = {known: type(default) for known, default in asdict(TrainSettings()).items()}
    if name not in kinds:
        raise EyasError(f"--set {text}: there is no setting {name!r}; there are {', '.join(kinds)}")
    try:
        if kinds[name] is bool:
            return name, {"true": True, "false": False}[value.lower()]
        if kinds[name] is tuple:
            return name, tuple(map(float, value.split(",")))
        found = kinds[name](value)
    except (ValueError, KeyError):
        raise EyasError(
            f"--set {text}: {name} is {TrainSettings.__dataclass_fields__[name].default!r} by default; give one like it"
        ) from None
    if name in (choices := {"loss": tuple(LOSSES), "products": PRODUCTS}) and found not in choices[name]:
        raise EyasError(f"--set {text}: {name} must be one of {', '.join(choices[name])}")
    return name, found


def device_of(device: str, ranks: Ranks) -> str:
    """The device of this process: under torchrun each process has a CUDA device of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" and ranks.count > 1 else device


def budget_from(options: argparse.Namespace, usual: float = TRAIN_MINUTES) -> training.Budget:
    for name in ("tokens", "steps", "minutes", "self_play", "workers"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= MOST[name]:
            least = "above 0" if not value > 0 else f"at most {MOST[name]:,}"
            raise EyasError(f"--{name.replace('_', '-')} must be {least}, not {value}")
    unbounded = options.tokens is None and options.steps is None and options.minutes is None
    return training.Budget(options.steps, options.tokens, usual if unbounded else options.minutes)


def taps_from(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise EyasError(f"--taps must be layers like 2,15,27, not {text!r}") from None


def check_out(out: Path, resume: bool) -> None:
    """Check the directory to write into, before hours of work: nothing in it is overwritten, and it can be written."""
    recover_directory(out)
    if resume and not (out / training.CHECKPOINT).exists():
        raise EyasError(f"{out} holds no checkpoint to resume from; train without --resume")
    if not resume and (out / "config.json").exists():
        raise EyasError(f"{out} holds a draft already; go on with --resume, or choose another --out")
    if out.is_mount() or (out.exists() and not resume and not (out.is_dir() and not any(out.iterdir()))):
        raise EyasError(f"{out} exists and is not an empty directory; choose a new one as --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.parent / f".{out.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EyasError(f"cannot write {out} ({error.strerror}); choose another --out") from None
