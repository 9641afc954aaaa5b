"""`eyas train`: a draft for a target, from text that the target writes itself or from the user's conversations."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import eyas
from eyas.bench.prompts import read_prompts
from eyas.config import SELF_PLAY_TOKENS, TRAIN_MINUTES, EyasError, TargetConfig, TrainSettings, default_taps
from eyas.engine import load_target, load_tokenizer, target_directory
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.linear import capability
from eyas.model.target import Target, check_taps
from eyas.model.vocab import DraftVocab
from eyas.model.weights import directory_hash, target_config
from eyas.train import trainer as training
from eyas.train.conversations import Document, draft_vocabulary, read_conversations, render, truncate
from eyas.train.features import Example, ShardStates, StateSource, TargetStates, document_examples, shard_examples
from eyas.train.selfplay import SelfPlay, Template, answer_tokens, check_shards, data_folder, settings_of_folder, write_own_data


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    budget = budget_from(options)
    out = Path(options.out).expanduser().resolve()
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
    console = Console(stderr=True, highlight=False)
    if options.data:
        if options.shards or options.self_play or options.seed_prompts:
            raise EyasError(
                "--data brings conversations, --shards, --self-play and --seed-prompts are about text the target writes; choose"
            )
        examples, facts = from_conversations(Path(options.data), directory, settings, console)
        source: StateSource | None = None
    else:
        examples, facts = from_self_play(options, directory, config, taps, hash_of_target, workers, settings, console)
        source = ShardStates()
    facts = {**facts, **facts_of_run(directory, hash_of_target, taps)}
    target = load_target(directory, "fp32")  # not before: while workers write, each holds its own
    trainer = make_trainer(target, config, taps, examples, source, settings, out, facts, workers, console)
    if options.resume:
        trainer.resume()
    try:
        run_with_progress(trainer, budget, console)
    except KeyboardInterrupt:
        print(f"\nstopped; the checkpoint is saved. Go on with: eyas train {resume_words(options)}", file=sys.stderr)
        raise
    where = f" --target {shlex.quote(options.target)}" if options.target else ""
    print(f"draft written to {out}; try: eyas generate 'Tell me about hawks.'{where} --draft {shlex.quote(str(out))}")
    return 0


# ---- options ----


def settings_from(options: argparse.Namespace) -> TrainSettings:
    if options.unroll < 1:
        raise EyasError(f"--unroll must be at least 1, not {options.unroll}")
    if not options.learning_rate > 0:
        raise EyasError(f"--learning-rate must be above 0, not {options.learning_rate}")
    if options.draft_vocab < 1:
        raise EyasError(f"--draft-vocab must be at least 1, not {options.draft_vocab}")
    return TrainSettings(
        unroll_steps=options.unroll, draft_vocab_size=options.draft_vocab, learning_rate=options.learning_rate, seed=options.seed
    )


def budget_from(options: argparse.Namespace) -> training.Budget:
    for name in ("tokens", "steps", "minutes", "self_play", "workers"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise EyasError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    unbounded = options.tokens is None and options.steps is None and options.minutes is None
    return training.Budget(options.steps, options.tokens, TRAIN_MINUTES if unbounded else options.minutes)


def taps_from(text: str | None, layers: int) -> tuple[int, int, int]:
    if text is None and not 0 <= default_taps(layers)[0] < default_taps(layers)[1] < default_taps(layers)[2]:
        raise EyasError(f"a target of {layers} layers is too shallow for the default taps; name three with `eyas train --taps L,M,H`")
    if text is None:
        return check_taps(default_taps(layers), layers)
    try:
        return check_taps(tuple(int(part) for part in text.split(",")), layers)
    except ValueError as error:
        raise error if isinstance(error, EyasError) else EyasError(f"--taps must be three layers like 2,15,27, not {text!r}") from None


def check_out(out: Path, resume: bool) -> None:
    """Nothing is overwritten, and an unwritable place is said before hours of work."""
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


# ---- data ----


def from_conversations(path: Path, directory: Path, settings: TrainSettings, console: Console) -> tuple[list[Example], dict[str, Any]]:
    conversations, complaints = read_conversations(path)
    tokenizer = load_tokenizer(directory)
    if not getattr(tokenizer, "chat_template", None):
        raise EyasError(f"{directory} has no chat template, so conversations cannot be put to it; use the target's instruction-tuned form")
    documents: list[Document] = []
    for line, messages in conversations:
        try:
            document = truncate(render(tokenizer, messages), settings.max_length)
        except EyasError as error:
            complaints.append(f"line {line}: {error}")
            continue
        if document:
            documents.append(document)
        else:
            complaints.append(f"line {line}: too little of an answer in its first {settings.max_length} tokens")
    for complaint in complaints[:5]:
        console.print(f"skipped: {complaint}", markup=False, soft_wrap=True)
    if complaints:
        console.print(f"skipped {len(complaints)} of {len(complaints) + len(documents)} conversations")
    if not documents:
        raise EyasError(f"{path} holds no conversation with an answer to learn from; the first was skipped since {complaints[0]}")
    examples, twins = without_twins(document_examples(documents))
    facts = {"kind": "conversations", "file": path.name, "skipped": len(complaints), "duplicates_dropped": twins}
    return examples, {"data": facts}


def without_twins(examples: list[Example]) -> tuple[list[Example], int]:
    """Each text once, and how many were dropped: a twin of a held-out conversation must not train."""
    kept = list({tuple(example.tokens): example for example in examples}.values())
    return kept, len(examples) - len(kept)


def from_self_play(
    options: argparse.Namespace,
    directory: Path,
    config: TargetConfig,
    taps: tuple[int, int, int],
    hash_of_target: str,
    workers: int,
    settings: TrainSettings,
    console: Console,
) -> tuple[list[Example], dict[str, Any]]:
    """Let the target write what is missing, then read all shards of the same settings and those of --shards."""
    template = Template(load_tokenizer(directory), config.eos_token_ids)
    questions, prompts_key = seed_questions(options.seed_prompts, console)
    play = SelfPlay(target=hash_of_target, template=template.text, taps=taps, seed_prompts=prompts_key)
    folders = [Path(folder).expanduser().resolve() for folder in dict.fromkeys(options.shards)]
    for folder in folders:
        check_shards(folder, play)
    if options.self_play or not folders:
        own, wanted = data_folder(play), options.self_play or SELF_PLAY_TOKENS
        with progress(console) as bar:
            task = bar.add_task("the target writes", total=wanted)
            write_own_data(directory, own, play, questions, wanted, workers, lambda written: bar.update(task, completed=written))
        folders = list(dict.fromkeys([*folders, own.resolve()]))
    out = Path(options.out).expanduser()
    return shard_facts(folders, settings, training.read_checkpoint(out) if options.resume else None)


def seed_questions(path: str | None, console: Console) -> tuple[list[str], str]:
    """User turns of a file, and a key that names it and what it holds."""
    if not path:
        return [], ""
    items, complaints = read_prompts(path)
    if complaints:
        console.print(f"skipped {len(complaints)} lines of {path}, the first: {complaints[0]}", markup=False, soft_wrap=True)
    questions = [item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"] for item in items]
    return questions, f"{Path(path).name} {hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:12]}"


def shard_facts(folders: list[Path], settings: TrainSettings, checkpoint: dict[str, Any] | None) -> tuple[list[Example], dict[str, Any]]:
    """Examples of all shards in some folders, and what they are. A resumed run goes on with the shards that it began with."""
    shards = [shard for folder in folders for shard in sorted(folder.glob("*.safetensors"))]
    before = checkpoint["facts"]["data"].get("shards") if checkpoint else None
    if before is not None:
        missing = set(before) - set(map(place_of, shards))
        if missing:
            raise EyasError(f"the run was trained on shards that are gone ({sorted(missing)[0]}, ..); train anew into another --out")
        shards = [shard for shard in shards if place_of(shard) in before]
    examples, twins = without_twins(shard_examples(shards, settings.max_length))
    facts = {
        "kind": "self-written",
        "answer_tokens": sum(map(answer_tokens, shards)),
        "conversations": len(examples),
        "duplicates_dropped": twins,
        "settings": [settings_of_folder(folder) for folder in folders],
        "shards": list(map(place_of, shards)),
    }
    return examples, {"data": facts}


def place_of(shard: Path) -> str:
    """A shard's folder and name: names alone are alike in every folder."""
    return f"{shard.parent.name}/{shard.name}"


# ---- the run ----


def make_trainer(
    target: Target,
    config: TargetConfig,
    taps: tuple[int, int, int],
    examples: list[Example],
    source: StateSource | None,
    settings: TrainSettings,
    out: Path,
    facts: dict[str, Any],
    workers: int,
    console: Console,
) -> training.Trainer:
    kept, held_out = hold_out(examples, settings)
    documents = [Document(example.tokens, example.answers) for example in kept]
    ids = draft_vocabulary(documents, settings.draft_vocab_size, config.vocab_size, always=config.eos_token_ids)
    vocab = DraftVocab(ids, config.vocab_size)
    slots = sum(number >= 0 for example in kept for number in example.answers)
    told = f"{len(kept)} conversations, {slots} answer tokens; {len(held_out)} held out"
    console.print(f"{told}; the draft vocabulary covers {coverage(held_out, vocab):.1%} of their answers")
    network = DraftNetwork(
        draft_config(config, len(vocab), taps, fc_norm=settings.fc_norm, norm_output=settings.norm_output),
        target.model.embed_tokens.weight.detach(),
    )
    training.initialise(network, target, vocab, settings.seed)
    teacher = training.Teacher.of(target.lm_head.weight.detach().clone(), vocab, torch.float32)
    source = source or TargetStates(target.prepare(), taps)
    return training.Trainer(network, vocab, teacher, kept, held_out, source, settings, out, facts, config.num_hidden_layers, workers)


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


def facts_of_run(directory: Path, hash_of_target: str, taps: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "target": directory.name,
        "target_sha256": hash_of_target,
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


def curve_line(point: dict[str, float]) -> str:
    steps = " ".join(f"{value:.2f}" for name, value in point.items() if name.startswith("accept_"))
    return f"{point['minutes']:.1f} min, {point['slots']} tokens: held-out simulated tau {point['tau']:.3f}, acceptance by step {steps}"


def resume_words(options: argparse.Namespace) -> str:
    return shlex.join([*(part for part in options.arguments[1:] if part != "--resume"), "--resume"])


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), console=console
    )
