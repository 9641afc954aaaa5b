"""Verifiers at equal budget in whole trees: how many tokens a round commits by each rule of which guesses stay.

    python benchmarks/verifiers.py PROMPTS.jsonl [--method eagle3] [--nodes 16] [--temperatures 0.5,1,1.5] [--limit 20] [--out F.json]

Shared noise, EAGLE's rule, rejection of children that were drawn without replacement, and so on, with the same draft, target, prompts and
number of rows. A verifier that divides by q needs a shape fixed beforehand, so each gets the static tree that is best for how often it
takes children of each rank (measured on `dev_prompts.jsonl`); those that may have chosen trees get them too, grown by score as ever.
Intervals are bootstrapped over prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import DEV, KINDS, engine_for, options, parsed, save

from eyas.bench.figures import estimate, ratio
from eyas.bench.prompts import read_prompts
from eyas.config import LOSSY, VERIFIERS, Sampling, TreeShape
from eyas.decode.plan.static_tree import RankChances, best_static
from eyas.decode.sampling import derived_seed
from eyas.decode.verifiers import VERIFY
from eyas.engine import Engine

CHILDREN, LEVELS = 8, 7
PROBE = TreeShape.static([CHILDREN] + ([CHILDREN] + [0] * (CHILDREN - 1)) * (LEVELS - 1))  # a spine of first children, each with siblings
CHOSEN = {16: "16x4x4", 60: "60x7x10"}  # grown by score
OF_TREES = [verifier for verifier in VERIFIERS if verifier != "block" and verifier not in LOSSY]  # block reads chains


def best_shape(engine: Engine, settings: dict[str, Any], dev: Sequence[Any], nodes: int) -> TreeShape:
    """The fixed tree that is best for how often children of each rank are taken with these settings, texts half as long."""
    chances = RankChances()
    engine.watch = lambda record: chances.judge(record.tree, record.accepted.path)
    settings = settings | {"max_new_tokens": settings["max_new_tokens"] // 2}
    for number, prompt in enumerate(dev):
        engine.generate(prompt, tree=PROBE, seed=number, **settings)
    engine.watch = None
    return best_static(chances.table(), nodes)


def tau_of(engine: Engine, settings: dict[str, Any], prompts: Sequence[Any], shape: TreeShape) -> dict[str, Any]:
    results = [engine.generate(prompt, tree=shape, seed=derived_seed(0, number), **settings) for number, prompt in enumerate(prompts)]
    committed = [sum(length * times for length, times in result.accepted_lengths.items()) for result in results]
    value, interval = estimate(ratio(committed, [result.rounds for result in results]), len(results))
    return {"tau": round(value, 3), "interval": [round(each, 3) for each in interval]}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("prompts", type=Path, nargs="?")
    parser.add_argument("--method", default="eagle3", help="or draft-model: the target's own first third")
    parser.add_argument("--nodes", type=int, choices=sorted(CHOSEN), default=16)
    parser.add_argument("--temperatures", default="0.5,1,1.5")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, temperatures="1", limit=2, max_new_tokens=16)
    engine = engine_for(given)
    prompts = [item.prompt for item in read_prompts(given.prompts)[0][: given.limit]]
    dev = prompts if given.quick else [item.prompt for item in read_prompts(DEV)[0]]
    rows: list[dict[str, Any]] = []
    for temperature in map(float, given.temperatures.split(",")):
        for verifier in OF_TREES:
            settings = {"method": given.method, "copy": False, "verifier": verifier, "sampling": Sampling(temperature)}
            settings["max_new_tokens"] = given.max_new_tokens
            static = best_shape(engine, settings, dev, given.nodes)
            shapes = [static] if VERIFY[verifier].draws else [TreeShape.parse(CHOSEN[given.nodes]), static]
            for shape in shapes:
                row = {"temperature": temperature, "verifier": verifier, "tree": str(shape), "nodes": shape.nodes}
                rows.append(row | {"chosen": shape != static, **tau_of(engine, settings, prompts, shape)})
                print(json.dumps(rows[-1]), flush=True)
                save({"method": given.method, "prompts": len(prompts), "rows": rows}, given.out)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
