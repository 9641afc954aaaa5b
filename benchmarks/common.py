"""What the scripts share: options, an engine, a trainer, turns, results as JSON, and a tiny world of models and data for `--quick`.

A script run with `--quick` ends in seconds, on random models made on the spot: whether it still runs, not what it finds. That needs a
checkout, since the tiny models are those of the tests. Knows no question that a script asks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import eyas
from eyas.config import PRECISIONS, TrainSettings, default_taps
from eyas.engine import Engine
from eyas.files.target import load_target, target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.train.build import Setup, build
from eyas.train.features import Example, ShardStates, shard_examples
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Writer
from eyas.train.shards import PATTERN, save_shard
from eyas.train.template import Template
from eyas.train.trainer import Trainer

HERE = Path(__file__).parent
DEV = HERE / "dev_prompts.jsonl"  # for choosing settings; what is measured on is elsewhere
KINDS = {"chat": "mt_bench.jsonl", "code": "humaneval.jsonl", "math": "gsm8k.jsonl"}  # of prompts, and their files
T = TypeVar("T")


# ---- options and results ----


def options(text: str) -> argparse.ArgumentParser:
    """A command line that says what the script is for, and has what all of them have."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON of what is found")
    parser.add_argument("--quick", action="store_true", help="in seconds, on tiny random models: whether the script still runs")
    return parser


def parsed(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, needed: Mapping[str, str] = {}, **small: Any
) -> argparse.Namespace:
    """The options. `needed` must be given, but for --quick, which takes these files of the tiny world, and has `small` as defaults."""
    words = sys.argv[1:] if words is None else words
    if "--quick" in words:
        parser.set_defaults(**{name: tiny().root / file for name, file in needed.items()}, **small)
    given = parser.parse_args(words)
    if missing := [name for name in needed if getattr(given, name) is None]:
        parser.error(f"give {', '.join(missing)}, or --quick")
    return given


def save(found: Any, out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


def tell(found: Any, out: Path | None) -> None:
    """Print what was found, and keep it where that is wanted."""
    print(json.dumps(found, indent=1), flush=True)
    save(found, out)


def rounded(values: Mapping[str, Any], digits: int = 3) -> dict[str, Any]:
    return {name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()}


def in_turn(items: Sequence[T], number: int) -> list[T]:
    """The items in an order that begins one later each time: what is timed first is not always the same."""
    start = number % len(items)
    return [*items[start:], *items[:start]]


# ---- what is measured ----


def engine_for(given: argparse.Namespace, precision: str = PRECISIONS[0], draft: str | None = None, **more: Any) -> Engine:
    """The embedded target with the bundled draft, or another; under --quick the tiny ones. `more`: what else `eyas.load` takes."""
    models = {"target": tiny().target, "draft": tiny().draft} if given.quick else {"draft": draft}
    return eyas.load(**models, precision=precision, **more)


def target_for(given: argparse.Namespace) -> Path:
    return tiny().target if given.quick else target_directory(getattr(given, "target", None))


def training_for(given: argparse.Namespace, **changes: Any) -> TrainSettings:
    """The usual settings; under --quick such as the tiny target can have."""
    return TrainSettings(**({"draft_vocab_size": 200, "unroll_steps": 3} if given.quick else {}) | changes)


def examples_of(folders: Path | Sequence[Path], max_length: int = TrainSettings.max_length) -> list[Example]:
    """The conversations of some folders of shards."""
    folders = [folders] if isinstance(folders, Path) else folders
    return shard_examples([path for folder in folders for path in sorted(folder.expanduser().glob(PATTERN))], max_length)


def new_trainer(directory: Path, examples: list[Example], settings: TrainSettings, workers: int) -> Trainer:
    """A trainer of a new draft for a target on its self-written conversations, yet to run, and with nowhere to save."""
    target = load_target(directory, "fp32")
    taps = default_taps(target.config.num_hidden_layers)
    return build(Setup(target, taps, examples, ShardStates(), settings, workers=workers))


# ---- the tiny world ----


class Tiny(NamedTuple):
    """Folders: a target and a draft of it, prompts of every kind, and conversations that the target wrote."""

    root: Path

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def draft(self) -> Path:
        return self.root / "draft"


@cache
def tiny() -> Tiny:
    """Made on first use; gone when the process ends."""
    sys.path.insert(0, str(HERE.parent))
    from tests.tiny import save_tiny_draft, save_tiny_target

    folder = tempfile.TemporaryDirectory(prefix="eyas-quick-")
    kept.append(folder)
    world = Tiny(Path(folder.name))
    save_tiny_target(world.target, num_hidden_layers=8, intermediate_size=64, max_position_embeddings=1024)
    save_tiny_draft(world.draft, world.target, taps=None)
    prompts = [f"What do {bird} eat in {month}?" for month in ("May", "June") for bird in ("hawks", "owls", "rooks", "jays", "terns")]
    (world.root / "prompts").mkdir()
    for file in KINDS.values():
        (world.root / "prompts" / file).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    write_shard(world.target, world.root / "shards", prompts)
    return world


kept: list[tempfile.TemporaryDirectory[str]] = []  # each is deleted with its last reference


@torch.inference_mode()
def write_shard(directory: Path, folder: Path, questions: Sequence[str]) -> None:
    """A shard of twelve short conversations."""
    config = target_config(directory)
    template = Template(load_tokenizer(directory), config.eos_token_ids)
    play = SelfPlay("tiny", template.text, default_taps(config.num_hidden_layers), seeded_share=1.0, longest_answer=30, turns=(1,))
    writer = Writer(load_target(directory, "fp32").prepare(), template, play, [Asked((question,)) for question in questions], 6)
    finished = (each for _, each in writer.write(itertools.count()) if each is not None)
    folder.mkdir()
    save_shard(folder / "00000000.safetensors", list(itertools.islice(finished, 12)), config.hidden_size)
