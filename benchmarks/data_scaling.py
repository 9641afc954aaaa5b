"""The paper's claim that acceptance rises with data, measured again: drafts from scratch on growing parts of the same conversations.

    python benchmarks/data_scaling.py --shards DIR --out F.json [--passes 2] [--parts 8] [--dev F.jsonl]

Drafts on an eighth, a quarter, a half and all of the conversations, each seen `--passes` times. All are measured on the same held-out
greedy conversations: tau of a chain of 7 simulated from the target's states, with 95% intervals by bootstrap over conversations,
acceptance by step, accuracy under teacher forcing; with --dev also on the target's greedy answers to those prompts. A run that is in the
results is not made again. The draft vocabulary and the head's first weights come from each run's own conversations. What training-time test
and fused layers bring is a row each of `eyas compare`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import engine_for, examples_of, new_trainer, options, parsed, save, target_for, training_for

from eyas.bench.prompts import read_prompts
from eyas.config import PLAIN, Sampling, TrainSettings, default_taps
from eyas.decode.generate import Decoder
from eyas.engine import Engine
from eyas.files.target import load_target, target_config
from eyas.train.acceptance import simulate
from eyas.train.conversations import Document
from eyas.train.features import Example, ShardStates, StateSource, TargetStates, document_examples
from eyas.train.trainer import Budget, Trainer

CHAIN = 7
HELD_OUT = 64


def hold_out_greedy(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """The first greedy conversations, which measure, and all others, which train."""
    greedy = [example for example in examples if example.greedy][:count]
    chosen = {id(example) for example in greedy}
    return greedy, [example for example in examples if id(example) not in chosen]


def from_scratch(directory: Path, own: list[Example], settings: TrainSettings, workers: int) -> Trainer:
    """A trainer of a new draft that saves and measures nothing."""
    settings = replace(settings, held_out=0.0, measure_steps=10**9, checkpoint_minutes=1e6, tree_every=0)
    trainer = new_trainer(directory, own, settings, workers)
    trainer.save = trainer.measure = lambda: None
    return trainer


def answer_tokens(examples: list[Example]) -> int:
    return sum(number >= 0 for example in examples for number in example.answers)


def measured(trainer: Trainer, examples: list[Example], source: StateSource) -> dict[str, Any]:
    found = simulate(trainer.network, trainer.vocab, examples, source, CHAIN)
    return {
        "tau": round(found.tau(), 4),
        "interval": [round(end, 3) for end in found.interval()],
        "acceptance": [round(value, 3) for value in found.acceptance()],
        "teacher_forced": [round(value, 3) for value in found.accuracy()],
        "conversations": len(examples),
    }


def dev_examples(engine: Engine, path: str) -> list[Example]:
    """The target's greedy answers to prompts."""
    prompts = [engine.encode(item.prompt) for item in read_prompts(path)[0]]
    *_, texts = Decoder(engine.target).run(prompts, PLAIN, Sampling(), [0] * len(prompts), 200)
    pairs = [(prompt, text.tokens) for prompt, text in zip(prompts, texts)]
    return document_examples([Document(tokens, [-1] * len(prompt) + [0] * (len(tokens) - len(prompt))) for prompt, tokens in pairs])


def table(results: dict[str, Any]) -> str:
    """A Markdown table of all runs."""
    rows = [
        "| run | answer tokens | slots | tau, held out | tau, dev prompts | acceptance by step | under teacher forcing |",
        "|" + "---|" * 7,
    ]
    for name, told in results.items():
        held, dev = told["held_out"], told.get("dev")
        steps, forced = (" ".join(f"{value:.2f}" for value in held[key]) for key in ("acceptance", "teacher_forced"))
        figures = [f"{one['tau']:.2f} [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]" if one else "-" for one in (held, dev)]
        rows.append(f"| {name} | {told['answer_tokens']:,} | {told['slots']:,} | {figures[0]} | {figures[1]} | {steps} | {forced} |")
    return "\n".join(rows)


def fit(results: dict[str, Any]) -> dict[str, float]:
    """tau = a + b log2(answer tokens), by least squares over the runs: what a doubling brings, and ten times more would."""
    points = [(math.log2(told["answer_tokens"]), told["held_out"]["tau"]) for told in results.values()]
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return {"tau_for_each_doubling": round(slope, 4), "ten_times_more": round(max(y.tolist()) + slope * math.log2(10), 3)}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--shards", type=Path, nargs="+")
    parser.add_argument("--passes", type=float, default=2)
    parser.add_argument("--parts", type=int, default=8, help="the smallest run's share of the data is one of so many")
    parser.add_argument("--dev", help="prompts to measure on too")
    parser.add_argument("--workers", type=int, default=2)
    given = parsed(parser, words, {"shards": "shards"}, passes=1, parts=2, workers=1)
    directory, settings = target_for(given), training_for(given)
    greedy, kept = hold_out_greedy(examples_of(given.shards, settings.max_length), 2 if given.quick else HELD_OUT)
    dev = dev_examples(engine_for(given, "fp32"), given.dev) if given.dev else []
    results = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for power in range(int(math.log2(given.parts)) + 1):
        if (name := f"{2**power}x") in results:
            continue
        started, share = time.monotonic(), 2**power / given.parts
        own = kept[: max(2, round(len(kept) * share))]
        trainer = from_scratch(directory, own, settings, given.workers)
        trainer.run(Budget(tokens=round(given.passes * answer_tokens(own))), lambda *_: None)
        told = {"share": share, "conversations": len(own), "answer_tokens": answer_tokens(own), "steps": trainer.progress.steps}
        told |= {"slots": trainer.progress.slots, "minutes": round((time.monotonic() - started) / 60, 1)}
        told["held_out"] = measured(trainer, greedy, ShardStates())
        if dev:
            taps = default_taps(target_config(directory).num_hidden_layers)
            told["dev"] = measured(trainer, dev, TargetStates(load_target(directory, "fp32").prepare(), taps))
        results[name] = told
        save(results, given.out)
        print(f"{name}: tau {told['held_out']['tau']:.3f} after {told['slots']} slots, {told['minutes']} min", flush=True)
    print(f"{table(results)}\n{fit(results)}")


if __name__ == "__main__":
    main()
