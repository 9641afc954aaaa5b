"""The planner against every fixed tree in hindsight: its throughput over the best shape's, for each batch and kind of prompt.

    python benchmarks/planner_regret.py DIRECTORY_OF_PROMPTS [--batches 1,2,4,8,16] [--precision bf16] [--out F.json]

The grid is nodes 1, 2, 4, 8, 16, 32, 60 by depth 1 to 7 by top-k 1, 2, 4, 10; shapes that grow the same trees count once (nodes 1 is plain
decoding). Every shape answers a few prompts in a first heat; the best few of each batch answer all prompts of a kind, interleaved with the
planner and with plain decoding. Throughput is tokens a second behind the prompts' own passes. What the planner learned before counts (it
practises on prompts of its own first), what these prompts teach does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import eyas
from eyas.bench.peers import PRACTICE
from eyas.bench.prompts import read_prompts
from eyas.config import PLAIN, TreeShape
from eyas.engine import Engine

KINDS = {"chat": "mt_bench.jsonl", "code": "humaneval.jsonl", "math": "gsm8k.jsonl"}
NODES, DEPTHS, TOP_KS = (1, 2, 4, 8, 16, 32, 60), range(1, 8), (1, 2, 4, 10)
METHOD = "eagle3-lookup"
HEAT_TOKENS, TOKENS, BEST = 32, 100, 5


def grid() -> list[TreeShape]:
    """One shape for all that grow the same trees: none has more nodes than its levels hold, nor levels or children than it has nodes."""
    found: dict[tuple[int, int, int], TreeShape] = {}
    for nodes in NODES[1:]:
        for levels in DEPTHS:
            for top_k in TOP_KS:
                most = 1 + top_k + (levels - 1) * top_k**2
                found.setdefault((min(nodes, most), min(levels, nodes - 1), min(top_k, nodes - 1)), TreeShape(nodes, levels - 1, top_k))
    return list(found.values())


def throughput(engine: Engine, prompts: list[Any], tree: TreeShape | str, tokens: int) -> tuple[int, float]:
    """Tokens and seconds behind the prompts' own passes."""
    method = "plain" if tree == PLAIN else METHOD
    results = engine.generate(prompts, method=method, tree=tree, max_new_tokens=tokens, seed=0)
    started = max(result.prefill_seconds for result in results)
    return sum(len(result.tokens) - 1 for result in results), max(result.seconds for result in results) - started


def race(engine: Engine, groups: list[list[Any]], trees: list[TreeShape | str], tokens: int) -> dict[str, list[float]]:
    """Tokens a second of each tree for each group, all trees in a rotating order."""
    found: dict[str, list[float]] = {str(tree): [] for tree in trees}
    for number, group in enumerate(groups):
        first = number % len(trees)
        for tree in trees[first:] + trees[:first]:
            made, seconds = throughput(engine, group, tree, tokens)
            found[str(tree)].append(made / seconds)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("prompts", type=Path)
    options.add_argument("--batches", default="1,2,4,8,16")
    options.add_argument("--precision", default="bf16")
    options.add_argument("--groups", type=int, default=6, help="of each kind, fewer for large batches")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    engine = eyas.load(precision=given.precision)
    kinds = {kind: [item.prompt for item in read_prompts(given.prompts / name)[0]] for kind, name in KINDS.items()}
    for size in (1, 2, 4, 8, 16):  # prices of every batch, and calibration
        for practice in PRACTICE if size == 1 else [PRACTICE[0]]:
            engine.generate([practice] * size, method=METHOD, max_new_tokens=100)
    engine.memory.frozen = True
    found: dict[str, Any] = {"precision": given.precision, "threads": torch.get_num_threads(), "method": METHOD, "rows": []}
    shapes = grid()
    print(f"{len(shapes)} shapes", file=sys.stderr)
    for batch in map(int, given.batches.split(",")):
        mixed = [prompt for trio in zip(*kinds.values()) for prompt in trio][:batch] if batch > 1 else []
        heats = [mixed] if mixed else [[prompts[0]] for prompts in kinds.values()]
        heat = race(engine, heats, list(shapes), HEAT_TOKENS)
        best = sorted(shapes, key=lambda shape: -statistics.harmonic_mean(heat[str(shape)]))[:BEST]
        for kind, prompts in kinds.items():
            count = max(1, given.groups if batch == 1 else min(given.groups, 16 // batch))
            groups = [prompts[1 + i * batch : 1 + (i + 1) * batch] for i in range(count)]
            rates = {tree: statistics.harmonic_mean(each) for tree, each in race(engine, groups, ["auto", PLAIN, *best], TOKENS).items()}
            plan, plain = rates.pop("auto"), rates[str(PLAIN)]
            winner = max(rates, key=rates.__getitem__)
            row = {"batch": batch, "kind": kind, "prompts": count * batch, "best_fixed": "plain" if winner == str(PLAIN) else winner}
            row |= {"planner_over_best": round(plan / rates[winner], 3), "planner_over_plain": round(plan / plain, 3)}
            row |= {"best_over_plain": round(rates[winner] / plain, 3), "plain_tokens_per_second": round(plain, 1)}
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
