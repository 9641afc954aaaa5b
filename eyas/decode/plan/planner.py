"""How large each round's trees should be: a tree grows while its next node is worth its time, which may be not at all.

A round costs seconds and brings tokens. Over many rounds, tokens per second are highest where each round maximises
tokens - rate * seconds, where `rate` is the tokens per second of the last rounds. So a level, a branch or a node is taken where it adds to
that sum. This holds for one sequence, and for many that share a pass, whose nodes then compete. Where not even the first level is worth
its time nothing is drafted, and now and then a round tries whether drafting would pay again.

Knows trees, prices and calibrated chances; knows no models. Drafters that grow level by level ask it before each level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eyas.config import TreeShape
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.clock import RoundClock
from eyas.decode.plan.pauses import Pauses
from eyas.decode.plan.prices import Prices
from eyas.decode.plan.shapes import Shapes
from eyas.decode.tree import Tree

MAX_TREE = TreeShape(64, 7, 4)  # the largest tree that is planned
ROUND_WEIGHT = 0.04  # weight of a new round in the mean over the last rounds
PRIOR_ROUNDS, PRIOR_SPEEDUP = 4, 1.2  # the belief that drafting is PRIOR_SPEEDUP times as fast as plain decoding weighs this many rounds
PRICE_SPAN_ROWS = 4  # the price of one more row is the mean over this many: differences of a single row are noise
USUAL_BEST_CHANCE = 0.45  # chance of a root's best child, assumed where nothing is drafted yet


class Guesses(Protocol):
    """What a tree and its growth have in common."""

    @property
    def parents(self) -> list[int]: ...
    @property
    def depths(self) -> list[int]: ...
    @property
    def scores(self) -> list[float]: ...


class Plan(RoundClock):
    """What a round asks of a plan: to be its clock, to say which nodes the target reads, and to learn from the outcome."""

    guesses = True  # whether the next round may guess at all
    planner: Planner | None = None  # the planner that drafters ask before each level; None: trees grow to their shape

    def begin(self, batch: int) -> None:
        """A round of `batch` sequences begins."""
        self.start()

    def cut(self, trees: list[Tree]) -> list[Tree]:
        """The parts of the drafted trees that the target shall read."""
        return trees

    def whole(self, most: TreeShape) -> TreeShape | None:
        """The shape of a tree, at most this one, for a round that may run as one graph, in which nobody is asked. None: the round shall not
        be a graph."""
        return None

    def judge(self, tree: Tree, path: list[int]) -> None:
        """Learn which of a tree's guesses were right from the path of its walk."""

    def judge_whole(self, ranks: list[list[int]]) -> None:
        """The same of a round that ran as one graph, from each sequence's ranks by score of its path's nodes. None at all: no draft made
        guesses in it, or it was no graph after all."""

    def ends(self, rows: int, tokens: int) -> None:
        """The round is over: its pass read `rows` rows, and it committed `tokens` tokens."""
        if seconds := self.stop():
            self.record(rows, seconds[0], tokens, seconds[1])

    def record(self, rows: int, pass_seconds: float, tokens: int, seconds: float) -> None:
        """Learn from a round that captured no graph; arguments as in `ends`, with the seconds of its pass and of all of it."""


class FixedPlan(Plan):
    """No plan: the target reads every tree as it was drafted."""

    def whole(self, most: TreeShape) -> TreeShape | None:
        return most


@dataclass
class RecentRounds:
    """Means over the last rounds with one number of sequences, older rounds fading."""

    rows: float  # rows of a round's pass
    tokens: float = 0.0  # tokens that a round committed
    seconds: float = 0.0  # of a round


class Planner(Plan):
    """One call's plan; calls may share prices, calibration and what pauses learned."""

    def __init__(
        self, passes: Prices, steps: Prices, calibration: Calibration, pauses: Pauses | None = None, shapes: Shapes | None = None
    ) -> None:
        """`passes`: prices of the target's passes, by rows; `steps`: prices of the draft's passes, by rows of a level; `shapes`: what is
        known of rounds that run as one graph."""
        self.passes, self.steps, self.calibration = passes, steps, calibration
        self.pauses, self.shapes = pauses or Pauses(), shapes or Shapes()
        self.chosen: TreeShape | None = None  # of the round under way, where it may be a graph
        self.sizes: dict[int, RecentRounds] = {}  # by number of sequences, so that nothing is forgotten when one joins or leaves
        self.recent, self.batch, self.rate = RecentRounds(0.0), 0, 0.0  # those of the round under way; rate in tokens per second
        self.grown: dict[int, tuple[Guesses, list[float]]] = {}  # by identity: growths of this round and their `chances`, level by level

    @property
    def planner(self) -> Planner:
        return self

    # ---- before and while drafting ----

    def begin(self, batch: int) -> None:
        """A round of `batch` sequences begins. The rate it has to beat is that of the last rounds with as many sequences: at first a little
        above plain decoding's, and never below it."""
        super().begin(batch)
        self.grown, self.chosen = {}, None
        self.batch, self.recent = batch, self.sizes.setdefault(batch, RecentRounds(3.0 * batch))
        alone = self.passes.of(batch)
        plain, some = batch / alone, PRIOR_ROUNDS * ROUND_WEIGHT * alone
        self.rate = max(plain, (self.recent.tokens + PRIOR_SPEEDUP * plain * some) / (self.recent.seconds + some))
        self.guesses = not self.pauses.begin(batch, alone)

    def whole(self, most: TreeShape) -> TreeShape | None:
        if not self.guesses:
            return None
        self.chosen = self.shapes.of(self.batch).choose(most)
        self.guesses = self.chosen.nodes > 1
        return self.chosen

    def row(self) -> float:
        """The price of one more row of a pass, in tokens: what the row has to bring."""
        rows = max(self.batch, round(self.recent.rows))
        return max(0.0, self.rate * (self.passes.of(rows + PRICE_SPAN_ROWS) - self.passes.of(rows)) / PRICE_SPAN_ROWS)

    def worth_drafting(self, covered: Sequence[float]) -> list[bool]:
        """For each sequence, whether the draft's first level is worth its time. `covered`: for each, the chance that another drafter's
        guess at the root's child is right."""
        asked = self.worth_each(covered)
        if self.pauses.overdue(any(asked)):
            asked[0] = True
        return asked

    def worth_each(self, covered: Sequence[float]) -> list[bool]:
        """`worth_drafting` without the occasional trial."""
        row, bare = self.row(), [1 - chance for chance in covered]
        step = self.rate * self.steps.of(len(bare)) / max(1, len(bare))
        worth = self.calibration.worth
        return [worth(1, share, row) + worth(2, USUAL_BEST_CHANCE * share, row) > step for share in bare]

    def frontiers(self, growths: Sequence[Guesses], candidates: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each sequence, the `candidates` of its newest level that are worth expanding; none at all where together they are not worth
        the draft's pass."""
        row, gains, kept = self.row(), 0.0, []
        for growth, nodes in zip(growths, candidates, strict=True):
            _, chances = self.grown.get(id(growth), (growth, []))
            chances = chances if len(chances) == len(growth.parents) else self.chances(growth)
            worth = [self.calibration.worth(growth.depths[node] + 1, chances[node], row) for node in nodes]
            kept.append([node for node, each in zip(nodes, worth, strict=True) if each > 0])
            gains += sum(worth)
        return kept if gains > self.rate * self.steps.of(sum(map(len, kept))) else [[] for _ in kept]

    def record_level(self, growth: Guesses, frontier: Sequence[int], before: int) -> None:
        """Learn from a drafted level: the nodes from `before` on are the children of `frontier`."""
        chances: dict[int, list[float]] = {node: [] for node in frontier}
        for node in range(before, len(growth.parents)):
            chances[growth.parents[node]].append(self.calibration.chance(growth.depths[node], guess(growth, node)))
        _, reached = self.grown.setdefault(id(growth), (growth, [1.0]))
        followed = len(reached) == before  # every level so far
        for node, each in chances.items():
            self.calibration.expanded(growth.depths[node] + 1, each)
            if followed:
                share = reached[node] / max(1.0, sum(each))
                reached += [chance * share for chance in each]

    def record_step(self, rows: int, seconds: float) -> None:
        """Learn from a pass of the draft that read a level of `rows` rows in `seconds`."""
        self.steps.record(rows, seconds)

    # ---- between drafting and checking ----

    def chances(self, guesses: Guesses) -> list[float]:
        """For each node, the calibrated chance that the walk comes to it. The chances of siblings never add up to more than their
        parent's."""
        own: list[float] = [1.0]
        together: dict[int, float] = {}
        for node in range(1, len(guesses.parents)):
            own.append(self.calibration.chance(guesses.depths[node], guess(guesses, node)))
            together[guesses.parents[node]] = together.get(guesses.parents[node], 0.0) + own[-1]
        for node, parent in enumerate(guesses.parents[1:], 1):
            own[node] *= own[parent] / max(1.0, together[parent])
        return own

    def cut(self, trees: list[Tree]) -> list[Tree]:
        """The trees, each cut to the nodes that are worth their rows in the pass that all trees share."""
        ranked = sorted(
            ((chance, -row, place) for place, tree in enumerate(trees) for row, chance in enumerate(self.chances(tree)) if row),
            reverse=True,
        )
        if not ranked:
            return list(trees)
        best, most, tokens, plain = 0, 0.0, 0.0, self.passes.of(len(trees))
        for count, (chance, _, _) in enumerate(ranked, 1):
            tokens += chance
            if (gain := tokens - self.rate * (self.passes.of(len(trees) + count) - plain)) > most:
                best, most = count, gain
        kept: list[list[int]] = [[0] for _ in trees]
        for _, row, place in ranked[:best]:
            kept[place].append(-row)
        return [tree if len(rows) == len(tree) else tree.keep(rows) for tree, rows in zip(trees, kept, strict=True)]

    # ---- after it ----

    def judge(self, tree: Tree, path: list[int]) -> None:
        for place, row in enumerate(path):
            children = list(tree.children[row].values())
            if children:
                taken = children.index(path[place + 1]) if place + 1 < len(path) else None
                self.calibration.judge(tree.depths[row] + 1, [guess(tree, child) for child in children], taken)

    def judge_whole(self, ranks: list[list[int]]) -> None:
        assert self.chosen is not None, "a shape was chosen"
        for each in ranks:
            self.shapes.of(self.batch).judge(self.chosen, each)
        if not ranks and self.chosen.nodes > 1:  # not one of its rounds
            self.chosen = None

    def record(self, rows: int, pass_seconds: float, tokens: int, seconds: float) -> None:
        """Learn from a round that captured no graph: its pass's rows and seconds, the tokens it committed and its own seconds."""
        if self.chosen is not None:
            shapes = self.shapes.of(self.batch)
            shapes.record(self.chosen, seconds)
            if self.chosen.nodes == 1:
                shapes.learn(1, tokens / self.batch)
            return
        self.passes.record(rows, pass_seconds)
        self.pauses.record(self.guesses, tokens, seconds)
        recent = self.recent
        recent.rows += ROUND_WEIGHT * (rows - recent.rows)
        recent.tokens += ROUND_WEIGHT * (tokens - recent.tokens)
        recent.seconds += ROUND_WEIGHT * (seconds - recent.seconds)


def guess(guesses: Guesses, node: int) -> float:
    """The drafter's own chance of a node, given its parent."""
    return min(1.0, math.exp(guesses.scores[node] - guesses.scores[guesses.parents[node]]))
