"""Which of a handful of trees a round shall grow that runs as one graph: the one that brings most tokens a second.

Such a round's tree is settled before anything is guessed, so no node can be weighed by itself. What a shape costs is timed over whole
rounds. What it brings is counted in its own rounds and in those of larger shapes, whose nodes have ranks: of a tree of 32 nodes the 8 best
are about the tree of 8. Now and then the largest is tried, as smaller ones do not tell what it would bring. Knows shapes, ranks and
seconds; knows nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eyas.config import PLAIN, TreeShape
from eyas.decode.plan.prices import LARGEST_NEWS

# a graph each, and each window of keys has its own
SHAPES = (PLAIN, *map(TreeShape.parse, ("4x2x2", "8x3x2", "16x4x3", "32x5x4", "60x7x4")))
TRIALS = 3  # rounds of a shape before its price is believed
WEIGHT = 0.04  # of a new round in what a shape brings and costs
MOST_TOKENS = 64  # of a round
KNOWN = 25  # rounds that a file's numbers weigh
TRIED_AGAIN = 48  # rounds until the largest shape is tried again


class Shapes:
    """What rounds of each shape cost and brought."""

    def __init__(self, known: Any = None) -> None:
        """`known`: what `table` gave."""
        self.seconds, self.tokens = dict[int, float](), dict[int, float]()  # by nodes, as everything here
        self.timed, self.judged = dict[int, int](), dict[int, int]()  # rounds that told these
        for nodes, (seconds, tokens) in checked(known).items():
            self.seconds[nodes], self.tokens[nodes] = seconds, tokens
            self.timed[nodes] = self.judged[nodes] = KNOWN
        self.rounds = 0  # since the largest was tried

    def choose(self, most: TreeShape) -> TreeShape:
        """The shape of the next round, at most as large as `most`. Shapes without a price come first, the largest of them at once: it tells
        what the others bring."""
        able = [shape for shape in SHAPES if shape.nodes <= most.nodes]
        unknown = [shape for shape in able if self.timed.get(shape.nodes, 0) < TRIALS]
        if unknown:
            return unknown[-1].cut(most.levels)
        self.rounds += 1
        if self.rounds >= TRIED_AGAIN:
            self.rounds = 0
            return able[-1].cut(most.levels)
        return max(able, key=lambda shape: self.tokens.get(shape.nodes, 1.0) / self.seconds[shape.nodes]).cut(most.levels)

    def judge(self, shape: TreeShape, ranks: Sequence[int]) -> None:
        """Learn what a round of this shape brought. `ranks`: of the nodes on its path below the root, by score among its nodes, 1 for the
        best; 0 for one that was given, whatever the shape."""
        for each in SHAPES:
            if each.nodes <= shape.nodes:
                left = (depth for depth, rank in enumerate(ranks) if rank and (rank >= each.nodes or depth >= each.levels))
                came = next(left, len(ranks))
                judged = self.judged[each.nodes] = self.judged.get(each.nodes, 0) + 1
                before = self.tokens.get(each.nodes, 0.0)
                self.tokens[each.nodes] = before + max(WEIGHT, 1 / judged) * (came + 1 - before)

    def record(self, shape: TreeShape, seconds: float) -> None:
        """Learn what a round of this shape took, one that captured nothing."""
        nodes = shape.nodes
        timed = self.timed[nodes] = self.timed.get(nodes, 0) + 1
        before = self.seconds.get(nodes, seconds)
        if timed <= TRIALS:  # what is used first is not warm yet: the quickest counts
            self.seconds[nodes] = min(before, seconds)
            return
        # half of the change is the machine's or the text's length, and moves all prices
        half = min(max(seconds / before, 1 / LARGEST_NEWS), LARGEST_NEWS) ** (WEIGHT / 2)
        self.seconds = {each: price * half for each, price in self.seconds.items()}
        self.seconds[nodes] *= half

    def table(self) -> dict[str, list[float]]:
        """For a file: of each shape that is known, seconds and tokens of a round."""
        return {str(nodes): [self.seconds[nodes], self.tokens[nodes]] for nodes in self.seconds if nodes in self.tokens}


def checked(known: Any) -> dict[int, tuple[float, float]]:
    """The part of a value of a file that is such a table."""
    found: dict[int, tuple[float, float]] = {}
    try:
        for shape in SHAPES:
            if str(shape.nodes) not in known:
                continue
            seconds, tokens = map(float, known[str(shape.nodes)])
            if 0 < seconds < 1e4 and 1 <= tokens <= MOST_TOKENS:
                found[shape.nodes] = seconds, tokens
    except (KeyError, TypeError, ValueError):
        return {}
    return found
