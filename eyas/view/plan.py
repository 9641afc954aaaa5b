"""What a planner would do: its prices, and for each number of sequences the tree that pays most if nodes are as they lately were.

A plan here is for a typical round; each real round is planned from its own scores. Knows a planner's prices and calibration; runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eyas.decode.plan.calibration import DEPTHS, EDGES, RECENT_NODES, Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.view import pictures

SHOWN, FEWEST = (1, 2, 3), 20  # depths in the picture; guesses without which a share says nothing


class Typical(NamedTuple):
    """A round of `batch` sequences; seconds are those of the draft's steps and the target's pass."""

    batch: int
    levels: int
    nodes: int  # of each sequence's tree, with the root
    tokens: float  # each sequence's
    seconds: float
    plain_seconds: float

    @property
    def gain(self) -> float:
        """Throughput, as a multiple of plain decoding's."""
        return self.tokens / self.seconds * self.plain_seconds


def typical_rounds(planner: Planner, batches: Sequence[int]) -> list[Typical]:
    return [max(choices(planner, batch), key=lambda each: each.gain) for batch in batches]


def choices(planner: Planner, batch: int) -> list[Typical]:
    """For each number of levels the best number of nodes; no level is plain decoding."""
    plain = planner.passes.of(batch)
    found = [Typical(batch, 0, 1, 1.0, plain, plain)]
    chances: list[float] = []
    newest, drafting = [1.0], 0.0
    for level in range(1, MAX_TREE.levels + 1):
        drafting += planner.steps.of(batch * len(newest))
        children = [sum(ranked) / RECENT_NODES for ranked in zip(*planner.calibration.children[min(level, DEPTHS) - 1], strict=True)]
        made = [parent * chance for parent in newest for chance in children]
        chances = sorted(chances + made, reverse=True)
        newest = sorted(made, reverse=True)[: MAX_TREE.top_k]
        for nodes in range(1, min(len(chances), MAX_TREE.nodes - 1) + 1):
            seconds = drafting + planner.passes.of(batch * (1 + nodes))
            found.append(Typical(batch, level, 1 + nodes, 1 + sum(chances[:nodes]), seconds, plain))
    return found


class Reliability(NamedTuple):
    """Guesses of similar chance: the draft's mean chance of them, the share that came true, and how many there were."""

    least: float
    guessed: float
    right: float
    tried: int


def reliability(calibration: Calibration, depths: Sequence[int] = tuple(range(1, DEPTHS + 1))) -> list[Reliability]:
    """What a draft said against what came true, for guesses at some depths together. Where there were no guesses the shares are NaN."""
    found = []
    for at, edge in enumerate((0.0, *EDGES)):
        counts = (calibration.tried, calibration.guessed, calibration.right)
        tried, guessed, right = (sum(count[depth - 1][at] for depth in depths) for count in counts)
        nothing = float("nan")
        found.append(Reliability(edge, guessed / tried if tried else nothing, right / tried if tried else nothing, round(tried)))
    return found


def save_picture(planner: Planner, rounds: Sequence[Typical], path: Path) -> None:
    """Prices of passes, gains by batch, and how reliable the draft's scores are at each depth. Needs matplotlib."""
    pyplot = pictures.pyplot()
    figure, (left, right, last) = pyplot.subplots(1, 3, figsize=(13, 3.4))
    prices = planner.passes.table()
    left.plot(list(prices), [1e3 * seconds for seconds in prices.values()], marker="o", markersize=3, color="#c8553d")
    left.set(xlabel="rows of a pass", ylabel="milliseconds", ylim=(0, None), title="what a pass costs")
    right.bar([str(each.batch) for each in rounds], [each.gain for each in rounds], color="#8fa3ad")
    for place, each in enumerate(rounds):
        right.annotate(f"{each.nodes} nodes" if each.levels else "none", (place, each.gain), ha="center", va="bottom", fontsize=8)
    right.axhline(1, color="#555555", linewidth=0.8)
    right.set(xlabel="sequences in a pass", ylabel="times plain decoding", title="what trees would bring")
    last.plot([0, 1], [0, 1], color="#555555", linewidth=0.8)
    for depth, colour in zip(SHOWN, ("#c8553d", "#588b8b", "#8fa3ad"), strict=True):
        enough = [each for each in reliability(planner.calibration, (depth,)) if each.tried >= FEWEST]
        sizes = [4 + 4 * math.log10(each.tried) for each in enough]
        last.plot([each.guessed for each in enough], [each.right for each in enough], color=colour, linewidth=0.8, label=f"depth {depth}")
        last.scatter([each.guessed for each in enough], [each.right for each in enough], s=sizes, color=colour)
    last.set(xlabel="the draft's score", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1), title="what a score is worth")
    last.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
