"""The paper's two claims, measured again: training-time test and fused layers each raise acceptance, and acceptance rises with data.

    python benchmarks/claims.py --shards DIR --out DIR [--passes 2] [--parts 8] [--runs all] [--ablate-at 2] [--dev F.jsonl]

Scaling: drafts from scratch on an eighth, a quarter, a half and all of the conversations, each seen `--passes` times. Ablation: on a
quarter (beside the run `2x`; --ablate-at 8 is beside `8x`), the same conversations and steps, one thing changed. All are measured on the
same held-out conversations: tau of a chain of 7 simulated from the target's states, with 95% intervals by bootstrap over conversations,
acceptance by step, accuracy under teacher forcing; with --dev also on the target's greedy answers to those prompts. --runs: all, scaling,
ablation, or names. A run that is in `out/results.json` is not made again. The draft vocabulary and the head's first weights come from each
run's own conversations.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eyas.bench.prompts import read_prompts
from eyas.config import PLAIN, Sampling, TargetConfig, TrainSettings, default_taps
from eyas.decode.generate import Decoder
from eyas.engine import load
from eyas.files.target import load_target, target_config, target_directory
from eyas.model.draft import DraftNetwork
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab
from eyas.train.acceptance import Simulation, simulate
from eyas.train.build import Setup, build
from eyas.train.conversations import Document
from eyas.train.features import Example, ShardStates, StateSource, TargetStates, document_examples, shard_examples
from eyas.train.shards import PATTERN
from eyas.train.trainer import Budget, Trainer

CHAIN = 7
HELD_OUT = 64
ABLATIONS: dict[str, dict[str, Any]] = {
    "no training-time test": {"unroll_steps": 1},
    "top layer only": {"top_layer_only": True},
    "neither": {"unroll_steps": 1, "top_layer_only": True},
    "LK lambda": {"loss": "lk-lambda"},
    "LK alpha for the last 30%": {"loss": "lk-alpha", "loss_from": 0.7},
    "LK lambda for the last 30%": {"loss": "lk-lambda", "loss_from": 0.7},
    "EAGLE-3.1: fc_norm and norm_output": {"fc_norm": True, "norm_output": True},
    "steps weigh 0.8^i": {"step_decay": 0.8},
    "draft vocabulary 4096": {"draft_vocab_size": 4096},
    "draft vocabulary 16384": {"draft_vocab_size": 16384},
    "draft vocabulary 49152": {"draft_vocab_size": 49152},
    "every slot at every step": {"step_keep": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--passes", type=float, default=2)
    parser.add_argument("--parts", type=int, default=8, help="the smallest run's share of the data is one of so many")
    parser.add_argument("--runs", default="all", help="all, scaling, ablation, or names of runs")
    parser.add_argument("--ablate-at", type=int, default=2, help="the ablation's data, in parts")
    parser.add_argument("--dev", help="prompts to measure on too")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    directory = target_directory(None)
    config, settings = target_config(directory), TrainSettings()
    examples = shard_examples([path for folder in options.shards for path in sorted(folder.glob(PATTERN))], settings.max_length)
    greedy, kept = hold_out_greedy(examples)
    dev = dev_examples(options.dev) if options.dev else []
    for name, share, changes in planned(options.runs, options.parts, options.ablate_at):
        results = json.loads(path.read_text()) if (path := options.out / "results.json").exists() else {}
        if name in results:
            continue
        started = time.monotonic()
        own = kept[: max(2, round(len(kept) * share))]
        trainer = from_scratch(load_target(directory, "fp32"), config, own, replace(settings, **changes), options.out, options.workers)
        trainer.run(Budget(tokens=round(options.passes * answer_tokens(own))), lambda *_: None)
        found = measured(trainer.network, trainer.vocab, greedy, ShardStates())
        told = {"share": share, "conversations": len(own), "answer_tokens": answer_tokens(own), "steps": trainer.progress.steps}
        told |= {
            "slots": trainer.progress.slots,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "changes": changes,
            "held_out": found,
        }
        if dev:
            target = load_target(directory, "fp32").prepare()
            told["dev"] = measured(trainer.network, trainer.vocab, dev, TargetStates(target, default_taps(config.num_hidden_layers)))
        results[name] = told
        path.write_text(json.dumps(results, indent=1))
        print(f"{name}: tau {found['tau']:.3f} {found['interval']} after {told['slots']} slots, {told['minutes']} min", flush=True)
    results = json.loads((options.out / "results.json").read_text())
    print(json.dumps(fit(results)))
    print(table(results))
    draw(results, options.out / "claims.png")


def planned(runs: str, parts: int, ablate_at: int) -> list[tuple[str, float, dict[str, Any]]]:
    """(name, share of the conversations, changed settings), the smallest first."""
    scaling = [(f"{2**i}x", 2**i / parts, {}) for i in range(int(math.log2(parts)) + 1)]
    ablation = [(f"{name} on {ablate_at}x", ablate_at / parts, changes) for name, changes in ABLATIONS.items()]
    if runs in ("all", "scaling", "ablation"):
        return (scaling if runs != "ablation" else []) + (ablation if runs != "scaling" else [])
    named = {run[0]: run for run in scaling} | dict(zip(ABLATIONS, ablation))
    return [named[name] for name in runs.split(",")]


def scaled(results: dict[str, Any]) -> dict[str, Any]:
    """The runs that differ in their data alone."""
    return {name: told for name, told in results.items() if not told["changes"]}


def hold_out_greedy(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The first greedy conversations, which measure, and all others, which train."""
    greedy = [example for example in examples if example.greedy][:HELD_OUT]
    chosen = {id(example) for example in greedy}
    return greedy, [example for example in examples if id(example) not in chosen]


def from_scratch(target: Target, config: TargetConfig, own: list[Example], settings: TrainSettings, out: Path, workers: int) -> Trainer:
    """A trainer of a new draft on these conversations, yet to run; it saves and measures nothing."""
    settings = replace(settings, held_out=0.0, measure_steps=10**9, checkpoint_minutes=1e9, tree_every=0)
    taps = default_taps(config.num_hidden_layers)
    trainer = build(Setup(target, taps, own, ShardStates(), settings, out / "unsaved", workers=workers))
    trainer.save = trainer.measure = lambda: None
    return trainer


def answer_tokens(examples: list[Example]) -> int:
    return sum(number >= 0 for example in examples for number in example.answers)


def measured(network: DraftNetwork, vocab: DraftVocab, examples: list[Example], source: StateSource) -> dict[str, Any]:
    found: Simulation = simulate(network, vocab, examples, source, CHAIN)
    return {
        "tau": round(found.tau(), 4),
        "interval": [round(end, 3) for end in found.interval()],
        "acceptance": [round(value, 3) for value in found.acceptance()],
        "teacher_forced": [round(value, 3) for value in found.accuracy()],
        "conversations": len(examples),
    }


def dev_examples(path: str) -> list[Example]:
    """The target's greedy answers to prompts."""
    engine = load(precision="fp32")
    items, _ = read_prompts(path)
    prompts = [engine.encode(item.prompt) for item in items]
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


def draw(results: dict[str, Any], path: Path) -> None:
    """Tau against data on the left; on the right what each change does to it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scaling = list(scaled(results).values())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 1))
    for key, label in (("held_out", "held-out conversations"), ("dev", "other prompts")):
        points = [(told["answer_tokens"] / 1000, told[key]) for told in scaling if key in told]
        if points:
            x, found = zip(*points)
            error = [[one["tau"] - one["interval"][0] for one in found], [one["interval"][1] - one["tau"] for one in found]]
            left.errorbar(x, [one["tau"] for one in found], yerr=error, marker="o", markersize=4, capsize=3, label=label)
    left.set(xscale="log", xlabel="answer tokens, thousands", ylabel="tau of a chain of 7", title="more data")
    ticks = [told["answer_tokens"] / 1000 for told in scaling]
    left.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    left.set_xticks([], minor=True)
    left.legend(loc="lower right", fontsize="small")
    left.grid(alpha=0.3)
    for whole, told in scaled(results).items():
        changed = {name: one for name, one in results.items() if one["changes"] and one["share"] == told["share"]}
        if changed:
            rows = {f"as it is on {whole}": told, **changed}
            right.barh(list(rows), [one["held_out"]["tau"] - 1 for one in rows.values()], left=1.0, height=0.6)
    right.invert_yaxis()
    right.set(xlabel="tau of a chain of 7, held out", title="one thing changed")
    right.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def fit(results: dict[str, Any]) -> dict[str, float]:
    """tau = a + b log2(answer tokens), by least squares over the scaling runs: what ten times more would bring."""
    points = [(math.log2(told["answer_tokens"]), told["held_out"]["tau"]) for told in scaled(results).values()]
    if len(points) < 2:
        return {}
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return {"tau_for_each_doubling": round(slope, 4), "ten_times_more": round(max(y.tolist()) + slope * math.log2(10), 3)}


if __name__ == "__main__":
    main()
