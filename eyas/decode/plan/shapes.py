"""Which of a handful of trees a round shall grow that runs as one graph: the one that brings most tokens a second.

Such a round's tree is settled before anything is guessed, so no node can be weighed by itself. What a shape costs is timed over whole
rounds. What it brings is counted in its own rounds and in those of larger shapes, whose nodes have ranks: of a tree of 32 nodes the 8 best
are about the tree of 8. Now and then the largest is tried, as smaller ones do not tell what it would bring. Rounds of several sequences are
counted apart, by the number of rows that their graph has for them. Knows shapes, ranks and seconds; knows nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eyas.config import PLAIN, TreeShape
from eyas.decode.plan.prices import LARGEST_NEWS
from eyas.kernels.captured import BATCHES, MOST_ROWS

# a graph each, and each window of keys has its own
SHAPES = (PLAIN, *map(TreeShape.parse, ("4x2x2", "8x3x2", "16x4x3", "32x5x4", "60x7x4")))
TRIALS = 3  # rounds of a shape before its price is believed
WEIGHT = 0.04  # of a new round in what a shape brings and costs
MOST_TOKENS = 64  # of a round
KNOWN = 25  # rounds that a file's numbers weigh
TRIED_AGAIN = 48  # rounds until the largest shape is tried again
BATCHED = "batches"  # where a table has those of several sequences, by their number


class Shapes:
    """What rounds of each shape cost and brought."""

    def __init__(self, known: Any = None, sequences: int = 1) -> None:
        """`known`: what `table` gave; `sequences`: of a round."""
        self.seconds, self.tokens = dict[int, float](), dict[int, float]()  # by nodes, as everything here; tokens of one sequence
        self.timed, self.judged = dict[int, int](), dict[int, int]()  # rounds that told these
        for nodes, (seconds, tokens) in checked(known).items():
            self.seconds[nodes], self.tokens[nodes] = seconds, tokens
            self.timed[nodes] = self.judged[nodes] = KNOWN
        self.rounds = 0  # since the largest was tried
        self.sequences, self.others = sequences, dict[int, Shapes]()  # by sequences
        if sequences == 1 and isinstance(known, dict) and isinstance(batches := known.get(BATCHED), dict):
            self.others = {size: Shapes(batches.get(str(size)), size) for size in BATCHES[1:] if str(size) in batches}

    def of(self, batch: int) -> Shapes:
        """The same of rounds of so many sequences, or of as many as a graph for them has room for."""
        if batch == 1:
            return self
        size = next((size for size in BATCHES if size >= batch), batch)
        return self.others.setdefault(size, Shapes(sequences=size))

    def choose(self, most: TreeShape) -> TreeShape:
        """The shape of the next round, at most as large as `most`. Shapes without a price come first, the largest of them at once: it tells
        what the others bring."""
        rows = most.nodes if self.sequences == 1 else min(most.nodes, MOST_ROWS // self.sequences)
        able = [shape for shape in SHAPES if shape.nodes <= max(rows, 1)]
        unknown = [shape for shape in able if self.timed.get(shape.nodes, 0) < TRIALS]
        if unknown:
            return unknown[-1].cut(most.levels)
        self.rounds += 1
        if self.rounds >= TRIED_AGAIN:
            self.rounds = 0
            return able[-1].cut(most.levels)
        return max(able, key=lambda shape: self.tokens.get(shape.nodes, 1.0) / self.seconds[shape.nodes]).cut(most.levels)

    def judge(self, shape: TreeShape, ranks: Sequence[int]) -> None:
        """Learn what a round of this shape brought a sequence. `ranks`: of the nodes on its path below the root, by score among its nodes,
        1 for the best; 0 for one that was given, whatever the shape."""
        for each in SHAPES:
            if each.nodes <= shape.nodes:
                left = (depth for depth, rank in enumerate(ranks) if rank and (rank >= each.nodes or depth >= each.levels))
                self.learn(each.nodes, 1 + next(left, len(ranks)))

    def learn(self, nodes: int, tokens: float) -> None:
        """A round of this shape brought a sequence so many tokens."""
        judged = self.judged[nodes] = self.judged.get(nodes, 0) + 1
        before = self.tokens.get(nodes, 0.0)
        self.tokens[nodes] = before + max(WEIGHT, 1 / judged) * (tokens - before)

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

    def rows(self) -> dict[int, tuple[float, float]]:
        """Of each shape that is known, by nodes, seconds and tokens of a round."""
        return {nodes: (self.seconds[nodes], self.tokens[nodes]) for nodes in self.seconds if nodes in self.tokens}

    def table(self) -> dict[str, Any]:
        """The same for a file, with that of rounds of several sequences."""
        batches = {str(size): table for size, shapes in self.others.items() if (table := shapes.table())}
        return {str(nodes): [*row] for nodes, row in self.rows().items()} | ({BATCHED: batches} if batches else {})


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
