"""Verifiers at equal budget in whole trees: how many tokens a round commits by shared noise, by EAGLE's rule, and by rejection of children
that were drawn without replacement, with the same draft, target, prompts and number of rows.

    python benchmarks/verifiers.py PROMPTS.jsonl [--method eagle3] [--nodes 16] [--temperatures 0.5,1,1.5] [--limit 20] [--out F.json]

A verifier that divides by q needs a shape fixed beforehand, so each gets the static tree that is best for how often it takes children of
each rank (measured on `dev_prompts.jsonl`); those that may have chosen trees get them too, grown by score as ever. Intervals are
bootstrapped over prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import eyas
from eyas.bench.figures import estimate, ratio
from eyas.bench.prompts import read_prompts
from eyas.config import LOSSY, VERIFIERS, Sampling, TreeShape
from eyas.decode.generate import DRAWS
from eyas.decode.plan.static_tree import RankChances, best_static
from eyas.decode.sampling import derived_seed
from eyas.engine import Engine

DEV = Path(__file__).parent / "dev_prompts.jsonl"
CHILDREN, LEVELS = 8, 7
PROBE = TreeShape.static([CHILDREN] + ([CHILDREN] + [0] * (CHILDREN - 1)) * (LEVELS - 1))  # a spine of first children, each with siblings
CHOSEN = {16: "16x4x4", 60: "60x7x10"}  # grown by score
TOKENS = 200
OF_TREES = [verifier for verifier in VERIFIERS if verifier != "block" and verifier not in LOSSY]  # block reads chains


def best_shape(engine: Engine, method: str, verifier: str, sampling: Sampling, nodes: int) -> TreeShape:
    chances = RankChances()
    engine.watch = lambda record: chances.judge(record.tree, record.accepted.path)
    for number, item in enumerate(read_prompts(DEV)[0]):
        settings = {"method": method, "tree": PROBE, "verifier": verifier, "sampling": sampling}
        engine.generate(item.prompt, max_new_tokens=100, seed=number, **settings)
    engine.watch = None
    return best_static(chances.table(), nodes)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("prompts", type=Path)
    options.add_argument("--method", default="eagle3", help="or draft-model: the target's own first third")
    options.add_argument("--nodes", type=int, choices=sorted(CHOSEN), default=16)
    options.add_argument("--temperatures", default="0.5,1,1.5")
    options.add_argument("--limit", type=int, default=20)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    engine = eyas.load()
    prompts = [item.prompt for item in read_prompts(given.prompts)[0][: given.limit]]
    rows: list[dict[str, Any]] = []
    for temperature in map(float, given.temperatures.split(",")):
        sampling = Sampling(temperature)
        for verifier in OF_TREES:
            static = best_shape(engine, given.method, verifier, sampling, given.nodes)
            shapes = [static] if verifier in DRAWS else [TreeShape.parse(CHOSEN[given.nodes]), static]
            for shape in shapes:
                row = {"temperature": temperature, "verifier": verifier, "tree": str(shape), "nodes": shape.nodes}
                row |= {"chosen": shape != static, **tau_of(engine, given.method, prompts, shape, verifier, sampling)}
                rows.append(row)
                print(json.dumps(row), flush=True)
                if given.out:
                    given.out.write_text(json.dumps({"method": given.method, "prompts": len(prompts), "rows": rows}, indent=1) + "\n")


def tau_of(engine: Engine, method: str, prompts: list[str], shape: TreeShape, verifier: str, sampling: Sampling) -> dict[str, Any]:
    settings = {"method": method, "tree": shape, "verifier": verifier, "sampling": sampling, "max_new_tokens": TOKENS}
    results = [engine.generate(prompt, seed=derived_seed(0, number), **settings) for number, prompt in enumerate(prompts)]
    committed = [sum(length * times for length, times in result.accepted_lengths.items()) for result in results]
    value, interval = estimate(ratio(committed, [result.rounds for result in results]), len(results))
    return {"tau": round(value, 3), "interval": [round(each, 3) for each in interval]}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
