"""`eyas train`: a draft for a target, from text that the target writes itself or from the user's conversations."""

from __future__ import annotations

import argparse
import os
import platform
import random
import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import eyas
from eyas.commands.data import from_conversations, from_self_play, own_words, progress
from eyas.config import (
    PRECISIONS,
    SELF_PLAY_TOKENS,
    TRAIN_MINUTES,
    EyasError,
    TargetConfig,
    TrainSettings,
    TreeShape,
    check_taps,
    default_taps,
)
from eyas.engine import DEFAULT
from eyas.files.disk import directory_hash, read_json, recover_directory
from eyas.files.eagle3_files import check_fits, config_from_file, load_draft
from eyas.files.target import check_device, load_target, target_config, target_directory
from eyas.files.tokenizer import chat_template_hash
from eyas.kernels.linear import capability
from eyas.methods import METHODS, method_named, trained
from eyas.model.adapter import AdaptedTarget
from eyas.model.draft import DraftNetwork
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab
from eyas.train import trainer as training
from eyas.train.acceptance import TreeTau
from eyas.train.conversations import Document, draft_vocabulary
from eyas.train.features import Example, ShardStates, StateSource, TargetStates
from eyas.train.losses import LOSSES
from eyas.train.parallel import Peers
from eyas.train.teacher import Teacher

TREE, TREE_PROMPTS, TREE_TOKENS = "60x7x10", 6, 64  # of the measurements with trees while training
ONLY_OF = dict.fromkeys(("top_layer_only", "random_head", "fc_norm", "norm_output"), "eagle3") | {"token_left_out": "eagle1"}


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    budget = budget_from(options)
    check_device(options.device)
    peers = Peers.join(options.device)
    try:
        return run_with(options, settings, budget, peers)
    finally:
        peers.leave()


def run_with(options: argparse.Namespace, settings: TrainSettings, budget: training.Budget, peers: Peers) -> int:
    out = Path(options.out).expanduser().resolve()
    if peers.first:
        check_out(out, options.resume)
    directory = target_directory(options.target)
    config = target_config(directory)
    taps = taps_from(options.taps, config.num_hidden_layers)
    if settings.draft_vocab_size > config.vocab_size:
        raise EyasError(
            f"a draft vocabulary of {settings.draft_vocab_size} is larger than the target's {config.vocab_size}; lower --draft-vocab"
        )
    workers = options.workers or os.cpu_count() or 1
    hash_of_target = directory_hash(directory)
    console = Console(stderr=True, highlight=False, quiet=not peers.first)
    if options.start is not None and method_of(options) != DEFAULT:
        raise EyasError(f"--from goes on with an {DEFAULT} draft; train {method_of(options)} anew")
    if options.regenerate and not options.data:
        raise EyasError("--regenerate answers anew what a file asks; name it with --data F.jsonl")
    before = training.read_checkpoint(out) if options.resume else None
    if options.data and not options.regenerate:
        if options.shards or options.self_play or options.seed_prompts:
            raise EyasError(
                "--data brings conversations, --shards, --self-play and --seed-prompts are about text the target writes; choose"
            )
        examples, facts = from_conversations(Path(options.data), directory, settings, console, options.apart)
        source: StateSource | None = None
    else:
        words = own_words(directory, config, taps, hash_of_target, options.seed_prompts, options.data, console)
        if not peers.first:
            peers.wait()  # while the first lets the target write; then what it needs is there
        examples, facts = from_self_play(options, words, settings, options.self_play or SELF_PLAY_TOKENS, workers, before)
        if peers.first:
            peers.wait()
        source = ShardStates()
    method = method_of(options)
    facts = {**facts, "method": method, **facts_of_run(directory, hash_of_target, taps), **earlier_facts(options.start)}
    target = load_target(directory, "fp32", device_of(options.device, peers))  # not before: while workers write, each holds its own
    trainer = make_trainer(target, config, taps, examples, source, settings, out, facts, workers, console, peers, options.start, method)
    if settings.tree_every:
        with_trees(trainer, directory, device_of(options.device, peers))
    if before is not None:
        trainer.resume(before)
    try:
        run_with_progress(trainer, budget, console)
    except KeyboardInterrupt:
        print(f"\nstopped; the checkpoint is saved. Go on with: eyas train {resume_words(options)}", file=sys.stderr)
        raise
    if not peers.first:
        return 0
    where = f" --target {shlex.quote(options.target)}" if options.target else ""
    print(f"draft written to {out}; try: eyas generate 'Tell me about hawks.'{where} --draft {shlex.quote(str(out))}")
    return 0


# ---- options ----


def settings_from(options: argparse.Namespace) -> TrainSettings:
    method = method_of(options)
    usual = METHODS[method].training().SETTINGS
    steps = usual["unroll_steps"] if options.unroll is None else options.unroll
    if steps < 1:
        raise EyasError(f"--unroll must be at least 1, not {steps}")
    if not options.learning_rate > 0:
        raise EyasError(f"--learning-rate must be above 0, not {options.learning_rate}")
    if options.draft_vocab < 1:
        raise EyasError(f"--draft-vocab must be at least 1, not {options.draft_vocab}")
    named = {
        "unroll_steps": steps,
        "draft_vocab_size": options.draft_vocab,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "autocast": options.device.startswith("cuda"),
    }
    asked = dict(map(setting, options.set))
    for name, value in asked.items():
        if ONLY_OF.get(name, method) != method and value != getattr(TrainSettings(), name):
            raise EyasError(f"--set {name} is for method {ONLY_OF[name]}, not for {method}")
    return TrainSettings(**usual | named | asked)


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
    if name == "loss" and found not in LOSSES:
        raise EyasError(f"--set {text}: loss must be one of {', '.join(LOSSES)}")
    return name, found


def device_of(device: str, peers: Peers) -> str:
    """Each process of torchrun has a CUDA device of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" and peers.count > 1 else device


def budget_from(options: argparse.Namespace) -> training.Budget:
    for name in ("tokens", "steps", "minutes", "self_play", "workers"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise EyasError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    unbounded = options.tokens is None and options.steps is None and options.minutes is None
    return training.Budget(options.steps, options.tokens, TRAIN_MINUTES if unbounded else options.minutes)


def taps_from(text: str | None, layers: int) -> tuple[int, ...]:
    if text is None and not 0 <= default_taps(layers)[0] < default_taps(layers)[1] < default_taps(layers)[2]:
        raise EyasError(f"a target of {layers} layers is too shallow for the default taps; name others with `eyas train --taps L,M,H`")
    if text is None:
        return check_taps(default_taps(layers), layers)
    try:
        return check_taps(tuple(int(part) for part in text.split(",")), layers)
    except ValueError as error:
        raise error if isinstance(error, EyasError) else EyasError(f"--taps must be layers like 2,15,27, not {text!r}") from None


def check_out(out: Path, resume: bool) -> None:
    """Nothing is overwritten, and an unwritable place is said before hours of work."""
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


# ---- the run ----


def make_trainer(
    target: Target | AdaptedTarget,
    config: TargetConfig,
    taps: tuple[int, ...],
    examples: list[Example],
    source: StateSource | None,
    settings: TrainSettings,
    out: Path,
    facts: dict[str, Any],
    workers: int,
    console: Console,
    peers: Peers | None = None,
    start: str | None = None,
    method: str = DEFAULT,
) -> training.Trainer:
    kept, held_out = hold_out(examples, settings)
    network, vocab = (
        new_draft(target, config, taps, kept, settings, method)
        if start is None
        else earlier_draft(Path(start).expanduser(), target, taps, settings)
    )
    network.to(target.device)
    different = len({token for example in kept for token, number in zip(example.tokens, example.answers) if number >= 0})
    if different < len(vocab):
        console.print(
            f"the answers use {different} different tokens; the draft vocabulary of {len(vocab)} is filled up with unused ones",
            soft_wrap=True,
        )
    slots = sum(number >= 0 for example in kept for number in example.answers)
    told = f"{len(kept)} conversations, {slots} answer tokens; {len(held_out)} held out"
    console.print(f"{told}; the draft vocabulary covers {coverage(held_out, vocab):.1%} of their answers")
    teacher = Teacher.of(target, vocab, torch.float32)
    source = source or TargetStates(target.prepare(), taps)
    layers = config.num_hidden_layers
    return training.Trainer(network, vocab, teacher, kept, held_out, source, settings, out, facts, layers, workers, peers, method=method)


def new_draft(
    target: Target | AdaptedTarget,
    config: TargetConfig,
    taps: tuple[int, ...],
    kept: list[Example],
    settings: TrainSettings,
    method: str,
) -> tuple[nn.Module, DraftVocab]:
    """A draft for these conversations' tokens that begins with what the target knows."""
    documents = [Document(example.tokens, example.answers) for example in kept]
    vocab = DraftVocab(
        draft_vocabulary(documents, settings.draft_vocab_size, config.vocab_size, always=config.eos_token_ids), config.vocab_size
    )
    return METHODS[method].training().new_network(target, taps, vocab, settings), vocab


def earlier_draft(
    directory: Path, target: Target | AdaptedTarget, taps: tuple[int, ...], settings: TrainSettings
) -> tuple[DraftNetwork, DraftVocab]:
    """The weights of a draft to train further, with its own vocabulary; its shape must be what the settings ask for."""
    config = config_from_file(directory)
    check_fits(config, target.config)
    network, vocab = load_draft(directory, target.embedding.detach(), torch.float32)
    pairs = (
        ("taps", config.taps, taps),
        ("draft vocabulary", len(vocab), settings.draft_vocab_size),
        ("fc_norm", config.fc_norm, settings.fc_norm),
        ("norm_output", config.norm_output, settings.norm_output),
    )
    told = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    if told:
        raise EyasError(f"{directory} is of another shape ({'; '.join(told)}); ask for the same")
    return network, vocab


def earlier_facts(start: str | None) -> dict[str, Any]:
    """What training.json says of the draft that a run begins with: its lineage is part of what it was trained on."""
    if start is None:
        return {}
    path = Path(start).expanduser() / "training.json"
    return {"from": {name: value for name, value in read_json(path).items() if name != "curve"} if path.exists() else {}}


def with_trees(trainer: training.Trainer, directory: Path, device: str) -> training.Trainer:
    """Let a trainer measure, now and then, tau of real rounds with trees on its first held-out prompts."""
    prompts = [prompt for example in trainer.held_out[:TREE_PROMPTS] if (prompt := example.tokens[: max(example.answers.index(0), 8)])]
    target = load_target(directory, PRECISIONS[0], device).prepare()
    trainer.tree_tau = TreeTau(target, trainer.vocab, prompts, TreeShape.parse(TREE), TREE_TOKENS, trainer.method)
    return trainer


def hold_out(examples: list[Example], settings: TrainSettings) -> tuple[list[Example], list[Example]]:
    """A seeded split; at least one document measures and one trains. Tau is defined on the target's greedy answers: where there are
    such, they measure."""
    if len(examples) < 2:
        raise EyasError("one conversation is too little to train on and measure with; give at least two")
    order = random.Random(settings.seed).sample(examples, len(examples))
    order.sort(key=lambda example: not example.greedy)  # stable: the greedy ones first, each kind in its drawn order
    count = min(max(1, round(len(order) * settings.held_out)), 64)
    return order[count:], order[:count]


def coverage(examples: list[Example], vocab: DraftVocab) -> float:
    member = vocab.member()
    tokens = [token for example in examples for token, number in zip(example.tokens, example.answers) if number >= 0]
    return float(member[torch.tensor(tokens)].float().mean())


def facts_of_run(directory: Path, hash_of_target: str, taps: tuple[int, ...]) -> dict[str, Any]:
    return {
        "target": directory.name,
        "target_sha256": hash_of_target,
        "chat_template_sha256": chat_template_hash(directory),
        "taps_are_inputs_of_layers": list(taps),
        "date": date.today().isoformat(),
        "versions": {"eyas": eyas.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {capability()}",
    }


def run_with_progress(trainer: training.Trainer, budget: training.Budget, console: Console) -> None:
    told = len(trainer.progress.curve)
    with progress(console) as bar:
        task = bar.add_task("training", total=1000)

        def report(progress_: training.Progress, losses: list[float], spent: float) -> None:
            nonlocal told
            bar.update(task, completed=1000 * spent, description=f"step {progress_.steps}, {progress_.slots} tokens, loss {losses[0]:.2f}")
            for point in progress_.curve[told:]:
                console.print(curve_line(point))
            told = len(progress_.curve)

        trainer.run(budget, report)
    console.print(curve_line(trainer.progress.curve[-1]))
    if trainer.progress.overfits(trainer.settings.patience):
        console.print("stopped early: held-out acceptance has fallen for good while the loss went on; the best weights are kept")


def curve_line(point: dict[str, float]) -> str:
    trees = f", with {TREE} trees {point['tree_tau']:.2f}" if "tree_tau" in point else ""
    steps = " ".join(f"{value:.2f}" for name, value in point.items() if name.startswith("accept_"))
    return (
        f"{point['minutes']:.1f} min, {point['slots']} tokens: held-out simulated tau {point['tau']:.3f}{trees}, acceptance by step {steps}"
    )


def resume_words(options: argparse.Namespace) -> str:
    return shlex.join([*(part for part in options.arguments[1:] if part != "--resume"), "--resume"])
