"""What a planner would do: its prices, and for each number of sequences the tree that pays most, from what their nodes lately were like.

Knows a planner's prices and calibration; runs no model. A plan here is for a typical round; each real one is planned from its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eyas import pictures
from eyas.decode.calibration import DEPTHS, LATELY
from eyas.decode.planner import MOST, Planner


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
        """Times plain decoding's throughput."""
        return self.tokens / self.seconds * self.plain_seconds


def typical_rounds(planner: Planner, batches: Sequence[int]) -> list[Typical]:
    return [max(choices(planner, batch), key=lambda each: each.gain) for batch in batches]


def choices(planner: Planner, batch: int) -> list[Typical]:
    """For each number of levels the best number of nodes; no level is plain decoding."""
    plain = planner.passes.of(batch)
    found = [Typical(batch, 0, 1, 1.0, plain, plain)]
    chances: list[float] = []
    newest, drafting = [1.0], 0.0
    for level in range(1, MOST.levels + 1):
        drafting += planner.steps.of(batch * len(newest))
        children = [sum(ranked) / LATELY for ranked in zip(*planner.calibration.children[min(level, DEPTHS) - 1])]
        made = [parent * chance for parent in newest for chance in children]
        chances = sorted(chances + made, reverse=True)
        newest = sorted(made, reverse=True)[: MOST.top_k]
        for nodes in range(1, min(len(chances), MOST.nodes - 1) + 1):
            seconds = drafting + planner.passes.of(batch * (1 + nodes))
            found.append(Typical(batch, level, 1 + nodes, 1 + sum(chances[:nodes]), seconds, plain))
    return found


def save_picture(planner: Planner, rounds: Sequence[Typical], path: Path) -> None:
    """Prices of passes, and gains by batch. Needs matplotlib."""
    pyplot = pictures.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    prices = planner.passes.table()
    left.plot(list(prices), [1e3 * seconds for seconds in prices.values()], marker="o", markersize=3, color="#c8553d")
    left.set(xlabel="rows of a pass", ylabel="milliseconds", ylim=(0, None), title="what a pass costs")
    right.bar([str(each.batch) for each in rounds], [each.gain for each in rounds], color="#8fa3ad")
    for place, each in enumerate(rounds):
        right.annotate(f"{each.nodes} nodes" if each.levels else "none", (place, each.gain), ha="center", va="bottom", fontsize=8)
    right.axhline(1, color="#555555", linewidth=0.8)
    right.set(xlabel="sequences in a pass", ylabel="times plain decoding", title="what trees would bring")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
