"""How often guesses come true: compares a draft's scores with what the target drew, by depth, so that a score becomes a chance.

Knows depths and chances; knows nothing of drafts or targets. A guess is judged where the walk came to its parent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Any

EDGES = (0.03, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # guesses whose chance lies between two of these are judged together
DEPTHS = 6  # deeper guesses are judged with those of this depth
PRIOR_GUESSES = 10  # the belief that a score is right as it is weighs as much as this many guesses
RECENT_NODES = 48  # the last nodes of a depth that are remembered: their children say what the next node's will be like
COUNTED_CHILDREN = 4  # the best children of each of these nodes that count
USUAL_CHANCES = (0.4, 0.1, 0.05, 0.03)  # the chances of these children, until some were seen


class Calibration:
    def __init__(self, counts: dict[str, Any] | None = None, frozen: bool = False) -> None:
        """`counts`: what `as_dict` gave, or None to begin anew; `frozen`: learn nothing, as in a measurement."""
        known = counts if counts and shape(counts) == shape(Calibration.nothing()) else Calibration.nothing()
        self.guessed, self.right, self.tried = known["guessed"], known["right"], known["tried"]
        self.children, self.frozen = known["children"], frozen
        self.ordered = [sorted(chance for each in nodes for chance in each) for nodes in self.children]
        self.seen = [0] * DEPTHS  # nodes seen at each depth; the latest are kept

    @staticmethod
    def nothing() -> dict[str, Any]:
        counts = {name: [[0.0] * (len(EDGES) + 1) for _ in range(DEPTHS)] for name in ("guessed", "right", "tried")}
        return {**counts, "children": [[list(USUAL_CHANCES) for _ in range(RECENT_NODES)] for _ in range(DEPTHS)]}

    def chance(self, depth: int, guess: float) -> float:
        """The chance that a child at `depth` (1: a child of the root) is drawn once its parent was, where the draft's own chance is
        `guess`."""
        at, of = min(depth, DEPTHS) - 1, bisect_right(EDGES, guess)
        belief = PRIOR_GUESSES * guess
        return min(1.0, guess * (self.right[at][of] + belief) / (self.guessed[at][of] + belief)) if belief else 0.0

    def worth(self, depth: int, parent: float, row: float) -> float:
        """How many tokens the children of one node are expected to bring, each less the price of its row. `depth`: the children's;
        `parent`: the node's chance; `row`: the price of a row, in tokens."""
        ordered = self.ordered[min(depth, DEPTHS) - 1]
        worthwhile = ordered[bisect_right(ordered, row / parent) :] if parent > 0 else ()
        return (parent * sum(worthwhile) - row * len(worthwhile)) / RECENT_NODES

    def judge(self, depth: int, guesses: Sequence[float], drawn: int | None) -> None:
        """Learn from a node that the walk came to: `guesses` are the draft's chances of its children at `depth`, `drawn` the index of the
        child that the walk went on to, or None."""
        if self.frozen:
            return
        at = min(depth, DEPTHS) - 1
        for child, guess in enumerate(guesses):
            of = bisect_right(EDGES, guess)
            self.tried[at][of] += 1
            self.guessed[at][of] += guess
            self.right[at][of] += child == drawn

    def expanded(self, depth: int, chances: Sequence[float]) -> None:
        """Remember that a node got children at `depth` with these chances."""
        at = min(depth, DEPTHS) - 1
        best = sorted(chances, reverse=True)[:COUNTED_CHILDREN]
        best += [0.0] * (COUNTED_CHILDREN - len(best))
        nodes, ordered = self.children[at], self.ordered[at]
        for old, new in zip(nodes[self.seen[at] % RECENT_NODES], best, strict=True):
            del ordered[bisect_left(ordered, old)]
            insort(ordered, new)
        nodes[self.seen[at] % RECENT_NODES] = best
        self.seen[at] += 1

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("guessed", "right", "tried")}
        return {**counts, "children": [[[round(chance, 4) for chance in each] for each in nodes] for nodes in self.children]}


def shape(value: Any) -> Any:
    """The names, lengths and kinds of a value of JSON, without its numbers: a file whose `shape` differs is not used."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else isinstance(value, (int, float))
