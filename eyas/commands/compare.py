"""`eyas compare`: every method of the line that leads to EAGLE-3, trained on the same self-written text, decoding in the same rounds.

Each row's draft and each row's measurements are kept as they are done, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.console import Console
from rich.table import Table

import eyas
from eyas.bench.family import (
    BUDGETS,
    COLUMNS,
    ROWS,
    TRAINED_COLUMNS,
    Row,
    cells,
    chosen_rows,
    save_picture,
    titled,
    training_rows,
    trees_of,
    with_copying,
)
from eyas.bench.prompts import PromptItem, read_prompts
from eyas.bench.report import machine
from eyas.bench.speed import parse_methods, run_bench
from eyas.commands.bench import complain
from eyas.commands.data import OwnWords, disk_limit, own_words, shard_facts
from eyas.commands.follow import follow
from eyas.commands.new_draft import fits, questions_of
from eyas.commands.output import progress, result_file, terminal, write_result
from eyas.config import PRECISIONS, EyasError, Request, Sampling, TrainSettings, cache_dir
from eyas.decode.drafter import Drafter
from eyas.decode.plan import store
from eyas.drafters.copying import CopyingDrafter
from eyas.engine import Engine, load
from eyas.files.disk import replace_text
from eyas.files.target import load_target, target_directory
from eyas.files.tensors import read_tensors
from eyas.methods import COPY, METHODS
from eyas.model.cache import KVCache
from eyas.train import trainer as training
from eyas.train.build import Setup, Studied, build, hold_out
from eyas.train.features import Example, ShardStates
from eyas.train.writers import Limit
from eyas.view.pictures import can_draw


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    written: int  # answer tokens that the target writes
    trained: int  # answer tokens that each draft is trained on, over and over
    prompts: int
    new_tokens: int
    same_time: bool  # whether drafts are trained for the same time too


HELD_OUT = 0.05  # share of the conversations that is held out: enough to ask and to measure with
QUICK, FULL = Scale(40_000, 140_000, 6, 64, False), Scale(400_000, 600_000, 20, 100, True)


class Timed:
    """A drafter and the seconds that its proposing took."""

    def __init__(self, drafter: Drafter, seconds: list[float]) -> None:
        self.drafter, self.seconds = drafter, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self, requests: Sequence[Any]) -> list[Any]:
        started = time.perf_counter()
        trees = self.drafter.propose(requests)
        self.seconds.append(time.perf_counter() - started)
        return trees


@dataclass(frozen=True)
class Family:
    """One comparison: its target, its text, and where its parts are kept."""

    studied: Studied
    words: OwnWords
    folder: Path
    scale: Scale
    prompts: str | None  # the file of prompts; None: questions of held-out conversations
    asked: list[PromptItem]  # the file's prompts
    console: Console

    @property
    def directory(self) -> Path:
        return self.studied.directory

    @property
    def workers(self) -> int:
        return os.cpu_count() or 1


def run(options: argparse.Namespace) -> int:
    rows, out = chosen_rows(options.rows, options.quick), result_file(options.out)
    rows = with_copying(rows) if options.copy else [row for row in rows if options.copy is None or not row.copy]
    scale = QUICK if options.quick else FULL
    studied = Studied.at(target_directory(options.target), None, options.chat_template_kwargs)
    console = terminal(stderr=True)
    words = own_words(studied, None, None, console)
    asked, complaints = read_prompts(options.prompts, scale.prompts) if options.prompts else ([], [])
    complain(options.prompts, complaints)
    trained = [(row.name, row.method, row.trains, dict(row.settings)) for row in ROWS]
    made_by = [asdict(scale), asked, asdict(words.play), asdict(TrainSettings()), trained, eyas.__version__, store.machine()]
    key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
    family = Family(studied, words, cache_dir() / "compare" / key, scale, options.prompts, asked, console)
    family.folder.mkdir(parents=True, exist_ok=True)
    console.print(f"drafts and measurements are kept in {family.folder}; without it all begins anew", markup=False, soft_wrap=True)
    try:
        result = compared(family, rows, options)
    except KeyboardInterrupt:
        print("\nstopped; what was done is kept, and the same command goes on", file=sys.stderr)
        raise
    show(result, terminal())
    if out:
        write_result(out, result)
        if can_draw():
            save_picture(result["methods"], out.with_suffix(".png"))
    return 0


def compared(family: Family, rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    text = written(family, disk_limit(options.disk, family.words.folder))
    items = family.asked or held_out_questions(family, text)
    drafts = {row.name: trained_draft(family, text, row, row.name) for row in rows if row.trains}
    methods = {row.name: measured(family, row, drafts.get(row.like or row.name), items, row.name) for row in rows}
    result = {"conditions": conditions(family, methods), "methods": methods}
    if family.scale.same_time:
        result["same_time"] = same_time(family, text, rows, drafts, methods, items)
    return result


def conditions(family: Family, methods: dict[str, Any]) -> dict[str, Any]:
    asked = min(each["prompt_count"] for each in methods.values())
    told = {"target": family.directory.name, "precision": PRECISIONS[0], "prompt_count": asked, **asdict(family.scale)}
    told |= {"chat_template_kwargs": variables} if (variables := family.studied.chat_template_kwargs) else {}
    return {**told, "prompt_file": Path(family.prompts).name if family.prompts else "held-out questions"}


# ---- text ----


class Text(NamedTuple):
    """What the target wrote, for all drafts the same."""

    examples: list[Example]
    facts: dict[str, Any]


def written(family: Family, most_bytes: float) -> Text:
    """Let the target write what is missing."""
    with progress(family.console) as bar:
        task = bar.add_task("the target writes", total=family.scale.written)
        limit = Limit(tokens=family.scale.written, bytes=most_bytes)
        shards = family.words.write(limit, family.workers, lambda count: bar.update(task, completed=count))
    return Text(*shard_facts(shards, [family.words.folder], TrainSettings(), None, family.words.template))


def held_out_questions(family: Family, text: Text) -> list[PromptItem]:
    """The prompts to measure with where no file is given: questions of held-out conversations."""
    kept, held_out = hold_out(text.examples, TrainSettings(held_out=HELD_OUT))
    questions = questions_of(held_out, kept, family.words.template)
    return [PromptItem(number, question) for number, question in enumerate(questions[: family.scale.prompts], start=1)]


# ---- training ----


def trained_draft(family: Family, text: Text, row: Row, name: str, minutes: float | None = None) -> Path:
    """The directory of a row's draft. A draft that is not there yet is trained, for a number of tokens or of minutes."""
    out, scale = family.folder / slug(name), family.scale
    assert row.trains is not None  # one without a draft has none to train
    if (out / "done").exists():
        return out
    vocab = min(TrainSettings.draft_vocab_size, family.studied.config.vocab_size)
    usual = {"draft_vocab_size": vocab, "held_out": HELD_OUT, "tree_every": 0, "patience": 0}
    settings = TrainSettings(**METHODS[row.trains].training().SETTINGS | usual | dict(row.settings))
    before = training.read_checkpoint(out) if (out / training.CHECKPOINT).exists() else None
    family.console.print(f"training {name}", markup=False)
    setup = Setup(
        target=load_target(family.directory, "fp32"),
        taps=family.studied.taps,
        examples=text.examples,
        source=ShardStates(),
        settings=settings,
        out=out,
        facts={**text.facts, "method": row.trains, **family.studied.facts()},
        method=row.trains,
        workers=family.workers,
    )
    trainer = build(setup)
    if before is not None:
        trainer.resume(before)
    budget = training.Budget(minutes=minutes) if minutes is not None else training.Budget(tokens=scale.trained)
    follow(trainer, budget, family.console)
    (out / "done").touch()
    return out


def training_of(draft: Path) -> dict[str, Any]:
    told = json.loads((draft / "training.json").read_text())
    best = max(point["tau"] for point in told["curve"])
    return {
        "tokens": told["slots"],
        "unrolled_slots": told["unrolled"],
        "minutes": round(told["minutes"], 2),
        "simulated_tau": best,
        "settings": told["settings"],
    }


# ---- measuring ----


def measured(family: Family, row: Row, draft: Path | None, items: list[PromptItem], name: str) -> dict[str, Any]:
    """A row's figures at both budgets, greedy and at temperature 1; read back where they were measured before."""
    kept = family.folder / f"{slug(name)}{COPY * (row.copy and not name.endswith(COPY))}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    family.console.print(f"measuring {name}", markup=False)
    engine = load(family.directory, draft)
    items = [item for item in items if fits(engine, item.prompt, request_of(family))]
    if not items:
        raise EyasError("no prompt leaves room for an answer in the target's context; give shorter ones with --prompts")
    trees, at = trees_of(row, engine.network), {}
    for temperature in (0.0, 1.0):
        found = bench(engine, row, items, trees, Sampling(temperature), family)
        if not found.get("complete", True):
            raise KeyboardInterrupt
        for nodes, written in zip(BUDGETS, names_of(row, trees), strict=True):
            at[f"{nodes}, T={temperature:g}"] = {key: value for key, value in found["methods"][written].items() if key != "prompts"}
    told = {
        **at[f"{BUDGETS[0]}, T=0"],
        "method": row.method,
        "copy": row.copy,
        "at": at,
        "teaches": row.teaches,
        "prompt_count": len(items),
    }
    own = parameters(draft) if draft else 0
    told |= {"draft_ms": draft_ms(engine, row, items, trees, family), "parameters": own, "memory_mb": memory_mb(engine, row, own)}
    told |= {"machine": machine(engine)} | ({"training": training_of(draft), "draft_of": row.like or row.name} if draft else {})
    replace_text(kept, json.dumps(told, indent=1))
    return told


def names_of(row: Row, trees: dict[int, str]) -> list[str]:
    return ["plain"] * len(BUDGETS) if row.method == "plain" else [f"{row.method}{COPY * row.copy}@{trees[nodes]}" for nodes in BUDGETS]


def bench(engine: Engine, row: Row, items: list[PromptItem], trees: dict[int, str], sampling: Sampling, family: Family) -> dict[str, Any]:
    text = ",".join(dict.fromkeys(["plain", *names_of(row, trees)]))
    return run_bench(engine, items, parse_methods(text), replace(request_of(family), sampling=sampling))


def request_of(family: Family) -> Request:
    variables = family.studied.chat_template_kwargs
    return Request(seed=0, max_new_tokens=family.scale.new_tokens, raw=not family.words.template.chat, chat_template_kwargs=variables)


def draft_ms(engine: Engine, row: Row, items: list[PromptItem], trees: dict[int, str], family: Family) -> float:
    """Milliseconds of drafting in a round of the smaller budget: the median over rounds of a few prompts, greedy."""
    seconds: list[float] = []
    make: Callable[[], Drafter] = engine.makers[row.method]

    def timed() -> Drafter:
        drafter = CopyingDrafter(make()) if row.copy else make()
        return cast("Drafter", Timed(drafter, seconds))  # whose other members are the drafter's

    engine.makers[row.method] = timed
    request = replace(request_of(family), method=row.method, tree=trees[BUDGETS[0]], copy=False)
    for item in items[:4]:
        engine.generate(item.prompt, request)
    engine.makers[row.method] = make
    return round(1e3 * sorted(seconds)[len(seconds) // 2], 3) if seconds else 0.0


def memory_mb(engine: Engine, row: Row, own: int) -> float:
    """The megabytes of the draft's own weights in bfloat16, and of its caches for a thousand tokens."""
    drafter: Any = engine.drafter(row.method)  # its caches are no part of what a drafter has to have
    drafter.reserve(1, 1000)
    alone: KVCache | None = getattr(drafter, "cache", None)
    caches: list[KVCache] = getattr(drafter, "caches", [alone] if alone else [])
    return round((2 * own + sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)) / 1e6, 2)


def parameters(draft: Path) -> int:
    return sum(tensor.numel() for name, tensor in read_tensors(draft).items() if name not in ("d2t", "t2d"))


def same_time(
    family: Family, text: Text, rows: Sequence[Row], drafts: dict[str, Path], methods: dict[str, Any], items: list[PromptItem]
) -> dict[str, Any]:
    """The figures of the methods themselves once more, each draft trained for as long as EAGLE-3's was."""
    if "eagle3" not in drafts:
        return {}
    minutes = methods["eagle3"]["training"]["minutes"]
    own = [row for row in rows if row.trains and not row.also]
    retrained = {
        row.name: drafts["eagle3"] if row.name == "eagle3" else trained_draft(family, text, row, f"{row.name} in time", minutes)
        for row in own
    }
    found = {}
    for row in rows:
        source = row.like or row.name
        if source in retrained and not row.also and source != "eagle3":
            found[row.name] = measured(family, row, retrained[source], items, f"{row.name} in time")
        elif source == "eagle3" and not row.also:
            found[row.name] = methods[row.name]
    return found


# ---- telling ----


def show(result: dict[str, Any], console: Console) -> None:
    for title, methods in titled(result):
        table = Table(*COLUMNS, title=title)
        for name, told in methods.items():
            table.add_row(*cells(name, told))
        console.print(table)
        trained = Table(*TRAINED_COLUMNS)
        for row in training_rows(methods):
            trained.add_row(*row)
        console.print(trained)
    told = result["conditions"]
    console.print(
        f"target {told['target']} · {told['prompt_count']} prompts of {told['prompt_file']} · up to {told['new_tokens']} tokens · "
        f"{told['written']:,} answer tokens written, {told['trained']:,} trained on",
        markup=False,
        soft_wrap=True,
    )


def slug(name: str) -> str:
    return name.replace(" ", "-").replace("'", "").replace(".", "")
