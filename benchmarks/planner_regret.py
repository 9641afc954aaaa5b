"""The planner against every fixed tree in hindsight: its throughput over the best shape's, for each batch and kind of prompt.

    python benchmarks/planner_regret.py DIRECTORY_OF_PROMPTS [--batches 1,2,4,8,16] [--precision bf16] [--out F.json]

The grid is nodes 1, 2, 4, 8, 16, 32, 60 by depth 1 to 7 by top-k 1, 2, 4, 10; shapes that grow the same trees count once (nodes 1 is plain
decoding). Every shape answers prompts of all kinds for a moment in a first heat; the best few of each batch answer prompts of one kind,
interleaved with the planner and with plain decoding, the best two of them once more or oftener; intervals are 95% by bootstrap over races.
A finished text's slot goes to the next prompt at once, and what counts is tokens a second of the rounds in which the batch was full; the
prompts' own passes are the same for all and left out. What the planner learned before counts (it practises with that batch on the last
prompts of each kind), what these prompts teach does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import eyas
from eyas.bench.figures import estimate, ratio
from eyas.bench.prompts import read_prompts
from eyas.config import GREEDY, PLAIN, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.sequence import Sequence
from eyas.engine import Engine

KINDS = {"chat": "mt_bench.jsonl", "code": "humaneval.jsonl", "math": "gsm8k.jsonl"}
NODES, DEPTHS, TOP_KS = (1, 2, 4, 8, 16, 32, 60), range(1, 8), (1, 2, 4, 10)
METHOD = "eagle3-lookup"
HEAT_SECONDS, TOKENS, PRACTICE = 0.7, 100, 5
BEST, BEST_LATER = 5, 2  # fixed trees in the first turn of a race, and in the later ones
TURNS = {1: 1, 2: 2, 4: 4}  # of a batch: how often all its groups of prompts are raced; of larger ones thrice


def grid() -> list[TreeShape]:
    """One shape for all that grow the same trees: none has more nodes than its levels hold, nor levels or children than it has nodes."""
    found: dict[tuple[int, int, int], TreeShape] = {}
    for nodes in NODES[1:]:
        for levels in DEPTHS:
            for top_k in TOP_KS:
                most = 1 + top_k + (levels - 1) * top_k**2
                found.setdefault((min(nodes, most), min(levels, nodes - 1), min(top_k, nodes - 1)), TreeShape(nodes, levels - 1, top_k))
    return list(found.values())


class Stream(Decoder):
    """A decoder that counts what rounds of a full batch bring and take."""

    tokens, taken, full = 0, 0.0, 0

    def round(self, sequences: list[Sequence]) -> None:
        before, started = sum(len(each.tokens) for each in sequences), time.perf_counter()
        super().round(sequences)
        if len(sequences) == self.full:
            self.taken += time.perf_counter() - started
            self.tokens += sum(len(each.tokens) for each in sequences) - before


def throughput(engine: Engine, prompts: list[list[int]], batch: int, tree: TreeShape | str, seconds: float) -> tuple[int, float]:
    """Tokens and seconds of rounds with `batch` texts: until fewer are left, or so long."""
    method = "plain" if tree == PLAIN else METHOD
    decoder = Stream(engine.target, engine.drafter(method), plan=engine.planner(tree, method, GREEDY))
    decoder.full = batch
    for texts in decoder.run(prompts, engine.shape(tree, method), GREEDY, range(len(prompts)), TOKENS, batch=batch):
        if decoder.taken > seconds or sum(not text.finish_reason for text in texts) < batch:
            break
    return decoder.tokens, decoder.taken


Races = dict[str, list[tuple[int, float]]]  # tree: tokens and seconds of each race


def race(engine: Engine, groups: list[list[list[int]]], batch: int, trees: list[TreeShape | str], seconds: float, found: Races) -> None:
    """Every group once by each tree, the trees in a rotating order."""
    for group in groups:
        first = len(found[str(trees[0])]) % len(trees)
        for tree in trees[first:] + trees[:first]:
            found[str(tree)].append(throughput(engine, group, batch, tree, seconds))


def rate(races: list[tuple[int, float]]) -> float:
    """Tokens a second."""
    made, taken = map(sum, zip(*races))
    return made / taken


def over(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> list[float]:
    """How many times as fast, and its 95% interval by bootstrap over races, in each of which both had the same texts."""
    mine, theirs = (ratio(*zip(*races)) for races in (one, other))
    value, interval = estimate(lambda picked: mine(picked) / theirs(picked), len(one))
    return [round(each, 3) for each in (value, *interval)]


def judged(engine: Engine, groups: list[list[list[int]]], batch: int, best: list[TreeShape]) -> dict[str, Any]:
    """The planner, plain decoding and the best shapes on one kind of prompts."""
    rivals, races = list(best), {str(tree): [] for tree in ("auto", PLAIN, *best)}
    for _ in range(TURNS.get(batch, 3)):
        race(engine, groups, batch, ["auto", PLAIN, *rivals], float("inf"), races)
        rivals = sorted(rivals, key=lambda shape: -rate(races[str(shape)]))[:BEST_LATER]
    plan, plain = races["auto"], races[str(PLAIN)]
    winner = max((PLAIN, *rivals), key=lambda tree: rate(races[str(tree)]))
    fixed = races[str(winner)]
    return {
        "prompts": sum(map(len, groups)),
        "races": len(plan),
        "best_fixed": "plain" if winner == PLAIN else str(winner),
        "planner_over_best": over(plan, fixed),
        "planner_over_plain": over(plan, plain),
        "best_over_plain": over(fixed, plain),
        "plain_tokens_per_second": round(rate(plain), 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("prompts", type=Path)
    options.add_argument("--batches", default="1,2,4,8,16")
    options.add_argument("--precision", default="bf16")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    engine = eyas.load(precision=given.precision)
    kinds = {kind: [engine.encode(item.prompt) for item in read_prompts(given.prompts / name)[0]] for kind, name in KINDS.items()}
    practice = [prompt for trio in zip(*(prompts[-PRACTICE:] for prompts in kinds.values())) for prompt in trio]
    throughput(engine, practice, 1, "auto", 1.0)  # times passes, where nobody did
    found: dict[str, Any] = {"precision": given.precision, "threads": torch.get_num_threads(), "method": METHOD, "rows": []}
    shapes = grid()
    print(f"{len(shapes)} shapes", file=sys.stderr)
    for batch in map(int, given.batches.split(",")):
        engine.plans.frozen = False
        throughput(engine, practice * 2, batch, "auto", 15.0)
        engine.plans.frozen = True
        mixed = [prompt for trio in zip(*kinds.values()) for prompt in trio][: max(3, batch)]
        heat: Races = {str(shape): [] for shape in shapes}
        race(engine, [mixed], batch, list(shapes), HEAT_SECONDS, heat)
        best = sorted(shapes, key=lambda shape: -rate(heat[str(shape)]))[:BEST]
        for kind, prompts in kinds.items():
            size, count = (1, 16) if batch == 1 else (2 * batch, max(2, 12 // batch))  # small ones, so that turns come round often
            groups = [prompts[first : first + size] for first in range(1, 1 + size * count, size)]
            row = {"batch": batch, "kind": kind, **judged(engine, groups, batch, best)}
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
