"""How large each round's trees should be: as large as the next node is worth its time, down to no tree at all.

A round costs seconds and brings tokens; over many rounds tokens a second are most where each round makes the most of
tokens - rate * seconds, `rate` being what the last rounds brought. So a level of drafting, a branch, a node is taken where what it adds to
that sum is more than nothing: for one sequence or for many that share a pass, whose nodes compete by worth. Where even the first level is
not worth it nothing is drafted, and now and then a round tries whether it would be again.

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
from eyas.decode.tree import Tree

MAX_TREE = TreeShape(64, 7, 4)  # of any one tree
ROUND_WEIGHT = 0.04  # weight of a round in what the last ones brought
PRIOR_ROUNDS, PRIOR_SPEEDUP = 4, 1.2  # so many rounds' worth of belief that drafting brings so many times plain decoding
PRICE_SPAN_ROWS = 4  # rows over which the price of one more is taken: single ones are noise
PROBE_ROUNDS = 48  # rounds in which the draft was not asked, until it is tried again
USUAL_BEST_CHANCE = 0.45  # of a root's best child, where nothing is drafted yet


class Guesses(Protocol):
    """What a tree and its growth have in common."""

    @property
    def parents(self) -> list[int]: ...
    @property
    def depths(self) -> list[int]: ...
    @property
    def scores(self) -> list[float]: ...


class Plan(RoundClock):
    """What a round asks of a plan: its clock, which trees to check, and to learn from what came of it."""

    guesses = True  # whether the round that comes may guess at all
    planner: Planner | None = None  # whom drafters ask before each level, where trees are planned

    def begin(self, batch: int) -> None:
        """A round of so many sequences comes."""
        self.start()

    def cut(self, trees: list[Tree]) -> list[Tree]:
        """What is left of the trees that were drawn up."""
        return trees

    def judge(self, tree: Tree, path: list[int]) -> None:
        """What a walk says of its tree's guesses."""

    def ends(self, rows: int, tokens: int) -> None:
        """The round is over: its pass read so many rows, and it brought so many tokens."""
        if seconds := self.stop():
            self.record(rows, seconds[0], tokens, seconds[1])

    def record(self, rows: int, pass_seconds: float, tokens: int, seconds: float) -> None:
        """Learn from a usual round."""


class FixedPlan(Plan):
    """No plan: every tree is checked as it was asked for and drawn up."""


@dataclass
class RecentRounds:
    """What the last rounds of one number of sequences were like, older ones fading."""

    rows: float  # of their passes
    tokens: float = 0.0
    seconds: float = 0.0


class Planner(Plan):
    """One call's plan; prices, calibration and what pauses learned may be shared with others'."""

    def __init__(self, passes: Prices, steps: Prices, calibration: Calibration, pauses: Pauses | None = None) -> None:
        """`passes`: prices of the target's, by rows; `steps`: of the draft's, by rows of a level."""
        self.passes, self.steps, self.calibration = passes, steps, calibration
        self.pauses = pauses or Pauses()
        self.sizes: dict[int, RecentRounds] = {}  # by number of sequences: one that joins or leaves makes nothing forgotten
        self.recent, self.batch, self.rate = RecentRounds(0.0), 0, 0.0  # of the round under way; rate in tokens a second
        self.silent = 0  # rounds since the draft was asked

    @property
    def planner(self) -> Planner:
        return self

    # ---- before and while drafting ----

    def begin(self, batch: int) -> None:
        """A round of so many sequences comes. What it has to beat is what the last rounds of as many brought, at first a little more than
        plain decoding, and never less than that."""
        super().begin(batch)
        self.batch, self.recent = batch, self.sizes.setdefault(batch, RecentRounds(3.0 * batch))
        alone = self.passes.of(batch)
        plain, some = batch / alone, PRIOR_ROUNDS * ROUND_WEIGHT * alone
        self.rate = max(plain, (self.recent.tokens + PRIOR_SPEEDUP * plain * some) / (self.recent.seconds + some))
        self.guesses = not self.pauses.begin(batch, alone)

    def row(self) -> float:
        """What one row more of a pass has to bring, in tokens."""
        rows = max(self.batch, round(self.recent.rows))
        return max(0.0, self.rate * (self.passes.of(rows + PRICE_SPAN_ROWS) - self.passes.of(rows)) / PRICE_SPAN_ROWS)

    def worth_drafting(self, covered: Sequence[float]) -> list[bool]:
        """For which sequences a draft's first level is worth its time; `covered`: chance that another drafter's guess there is right."""
        asked = self.worth_each(covered)
        self.silent = 0 if any(asked) else self.silent + 1
        if self.silent == PROBE_ROUNDS:
            self.silent, asked[0] = 0, True
        return asked

    def worth_each(self, covered: Sequence[float]) -> list[bool]:
        row, bare = self.row(), [1 - chance for chance in covered]
        step = self.rate * self.steps.of(len(bare)) / max(1, len(bare))
        worth = self.calibration.worth
        return [worth(1, share, row) + worth(2, USUAL_BEST_CHANCE * share, row) > step for share in bare]

    def frontiers(self, growths: Sequence[Guesses], candidates: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of each sequence's newest level the nodes whose children are worth the next step; none where they are not together."""
        row, gains, kept = self.row(), 0.0, []
        for growth, nodes in zip(growths, candidates, strict=True):
            chances = self.chances(growth)
            worth = [self.calibration.worth(growth.depths[node] + 1, chances[node], row) for node in nodes]
            kept.append([node for node, each in zip(nodes, worth, strict=True) if each > 0])
            gains += sum(worth)
        return kept if gains > self.rate * self.steps.of(sum(map(len, kept))) else [[] for _ in kept]

    def record_level(self, growth: Guesses, frontier: Sequence[int], before: int) -> None:
        """A level was drafted: `frontier` got the nodes from `before` on as children."""
        chances: dict[int, list[float]] = {node: [] for node in frontier}
        for node in range(before, len(growth.parents)):
            chances[growth.parents[node]].append(self.calibration.chance(growth.depths[node], guess(growth, node)))
        for node, each in chances.items():
            self.calibration.expanded(growth.depths[node] + 1, each)

    def record_step(self, rows: int, seconds: float) -> None:
        """A level of so many rows took the draft so long."""
        self.steps.record(rows, seconds)

    # ---- between drafting and checking ----

    def chances(self, guesses: Guesses) -> list[float]:
        """The chance of each node that the walk comes to it: calibrated, and siblings' never above their parent's together."""
        own: list[float] = [1.0]
        together: dict[int, float] = {}
        for node in range(1, len(guesses.parents)):
            own.append(self.calibration.chance(guesses.depths[node], guess(guesses, node)))
            together[guesses.parents[node]] = together.get(guesses.parents[node], 0.0) + own[-1]
        for node, parent in enumerate(guesses.parents[1:], 1):
            own[node] *= own[parent] / max(1.0, together[parent])
        return own

    def cut(self, trees: list[Tree]) -> list[Tree]:
        """Of all trees the nodes that are worth their rows of the pass they share."""
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

    def record(self, rows: int, pass_seconds: float, tokens: int, seconds: float) -> None:
        """A usual round is over: its pass's rows and seconds, the tokens it brought and its own seconds."""
        self.passes.record(rows, pass_seconds)
        self.pauses.record(self.guesses, tokens, seconds)
        recent = self.recent
        recent.rows += ROUND_WEIGHT * (rows - recent.rows)
        recent.tokens += ROUND_WEIGHT * (tokens - recent.tokens)
        recent.seconds += ROUND_WEIGHT * (seconds - recent.seconds)


def guess(guesses: Guesses, node: int) -> float:
    """The drafter's chance of a node given its parent."""
    return min(1.0, math.exp(guesses.scores[node] - guesses.scores[guesses.parents[node]]))
