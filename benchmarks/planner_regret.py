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

import json
import math
import sys
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import KINDS, engine_for, in_turn, options, parsed, save

from eyas.bench.figures import estimate, ratio
from eyas.bench.prompts import read_prompts
from eyas.config import GREEDY, PLAIN, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.sequence import Sequence
from eyas.engine import Engine

NODES, DEPTHS, TOP_KS = (1, 2, 4, 8, 16, 32, 60), range(1, 8), (1, 2, 4, 10)
METHOD = "eagle3+copy"
BEST, BEST_LATER = 5, 2  # fixed trees in the first turn of a race, and in the later ones
TURNS = {1: 1, 2: 2, 4: 4}  # of a batch: how often all its groups of prompts are raced; of larger ones thrice


@dataclass(frozen=True)
class Effort:
    """How long everything is tried."""

    tokens: int = 100  # of a text
    heat: float = 0.7  # seconds of each shape in the first heat
    practice: float = 15.0  # seconds of the planner with each batch before it counts
    practice_prompts: int = 5  # of each kind, from the end
    prompts: int = 24  # of a kind, at least, for more than one sequence
    shapes: int | None = None  # of the grid: all
    turns: int | None = None  # of a race: by batch


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


def throughput(
    engine: Engine, prompts: list[list[int]], batch: int, tree: TreeShape | str, longest: int, seconds: float = math.inf
) -> tuple[int, float]:
    """Tokens and seconds of rounds with `batch` texts of so many tokens: until fewer texts are left, or so long."""
    method = "plain" if tree == PLAIN else METHOD
    decoder = Stream(engine.target, engine.drafter(method), plan=engine.planner(tree, method, GREEDY))
    decoder.full = batch
    for texts in decoder.run(prompts, engine.shape(tree, method), GREEDY, range(len(prompts)), longest, batch=batch):
        if decoder.taken > seconds or sum(not text.finish_reason for text in texts) < batch:
            break
    return decoder.tokens, decoder.taken


Races = dict[str, list[tuple[int, float]]]  # tree: tokens and seconds of each race


def race(engine: Engine, groups: list[list[list[int]]], batch: int, trees: list[TreeShape | str], longest: int, found: Races) -> None:
    """Every group once by each tree, in turn."""
    for group in groups:
        for tree in in_turn(trees, len(found[str(trees[0])])):
            found[str(tree)].append(throughput(engine, group, batch, tree, longest))


def heat(engine: Engine, prompts: list[list[int]], batch: int, shapes: list[TreeShape], effort: Effort) -> list[TreeShape]:
    """The best few of all shapes, each of which answers the prompts for a moment."""
    rates = {str(shape): rate([throughput(engine, prompts, batch, shape, effort.tokens, effort.heat)]) for shape in shapes}
    return sorted(shapes, key=lambda shape: -rates[str(shape)])[:BEST]


def rate(races: list[tuple[int, float]]) -> float:
    """Tokens a second."""
    made, taken = map(sum, zip(*races))
    return made / taken


def over(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> list[float]:
    """How many times as fast, and its 95% interval by bootstrap over races, in each of which both had the same texts."""
    mine, theirs = (ratio(*zip(*races)) for races in (one, other))
    value, interval = estimate(lambda picked: mine(picked) / theirs(picked), len(one))
    return [round(each, 3) for each in (value, *interval)]


def judged(engine: Engine, groups: list[list[list[int]]], batch: int, best: list[TreeShape], effort: Effort) -> dict[str, Any]:
    """The planner, plain decoding and the best shapes on one kind of prompts."""
    rivals, races = list(best), {str(tree): [] for tree in ("auto", PLAIN, *best)}
    for _ in range(effort.turns or TURNS.get(batch, 3)):
        race(engine, groups, batch, ["auto", PLAIN, *rivals], effort.tokens, races)
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


def groups_of(prompts: list[list[int]], batch: int, effort: Effort) -> list[list[list[int]]]:
    """The prompts of each race: small ones, so that turns come round often."""
    size, count = (1, 2 * effort.prompts // 3) if batch == 1 else (2 * batch, max(2, effort.prompts // (2 * batch)))
    return [prompts[first : first + size] for first in range(1, 1 + size * count, size)]


def main(words: Items[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("prompts", type=Path, nargs="?")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--precision", default="bf16")
    given = parsed(parser, words, {"prompts": "prompts"}, batches="2")
    effort = Effort(12, 0.0, 0.1, 2, 4, 3, 1) if given.quick else Effort()
    engine = engine_for(given, given.precision)
    kinds = {kind: [engine.encode(item.prompt) for item in read_prompts(given.prompts / name)[0]] for kind, name in KINDS.items()}
    practice = [prompt for trio in zip(*(prompts[-effort.practice_prompts :] for prompts in kinds.values())) for prompt in trio]
    throughput(engine, practice, 1, "auto", effort.tokens, 1.0)  # times passes, where nobody did
    found: dict[str, Any] = {"precision": given.precision, "threads": torch.get_num_threads(), "method": METHOD, "rows": []}
    shapes = grid()[: effort.shapes]
    print(f"{len(shapes)} shapes", file=sys.stderr)
    for batch in map(int, given.batches.split(",")):
        engine.plans.frozen = False
        throughput(engine, practice * 2, batch, "auto", effort.tokens, effort.practice)
        engine.plans.frozen = True
        mixed = [prompt for trio in zip(*kinds.values()) for prompt in trio][: max(3, batch)]
        best = heat(engine, mixed, batch, shapes, effort)
        for kind, prompts in kinds.items():
            row = {"batch": batch, "kind": kind, **judged(engine, groups_of(prompts, batch, effort), batch, best, effort)}
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            save(found, given.out)


if __name__ == "__main__":
    main()
