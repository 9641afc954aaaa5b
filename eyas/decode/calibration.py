"""How often guesses come true: a draft's scores against what the target drew, by depth, so that a score means a chance.

Knows depths and chances; knows nothing of drafts or targets. A guess is judged where the walk came to its parent.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

EDGES = (0.03, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # guesses between two of these are judged together
DEPTHS = 6  # deeper guesses are judged with those of this depth
WEIGHT = 10  # guesses' worth of belief that a score is right as it is
USUAL = 0.6  # chance that one of a node's children is drawn, until it is known


class Calibration:
    def __init__(self, counts: dict[str, Any] | None = None, frozen: bool = False) -> None:
        """`counts`: what `as_dict` gave; `frozen`: nothing is learned, as in a measurement."""
        size = len(EDGES) + 1
        fresh = {name: [[0.0] * size for _ in range(DEPTHS)] for name in ("guessed", "right", "tried")}
        fresh |= {"children": [0.0] * DEPTHS, "parents": [0.0] * DEPTHS}
        known = (
            counts if counts and {key: shape(value) for key, value in counts.items()} == {k: shape(v) for k, v in fresh.items()} else fresh
        )
        self.guessed, self.right, self.tried = known["guessed"], known["right"], known["tried"]
        self.children, self.parents, self.frozen = known["children"], known["parents"], frozen

    def chance(self, depth: int, guess: float) -> float:
        """The chance that a child at `depth` (1: of the root) is drawn once its parent was, where the draft says `guess`."""
        at, of = min(depth, DEPTHS) - 1, bisect_right(EDGES, guess)
        return min(1.0, guess * (self.right[at][of] + WEIGHT * guess) / (self.guessed[at][of] + WEIGHT * guess)) if guess > 0 else 0.0

    def followed(self, depth: int) -> float:
        """The chance that any of the children made at `depth` is drawn once their parent was."""
        at = min(depth, DEPTHS) - 1
        return (self.children[at] + WEIGHT * USUAL) / (self.parents[at] + WEIGHT)

    def judge(self, depth: int, guesses: Sequence[float], drawn: int | None) -> None:
        """The children of a node that the walk came to, and which of them it went on to."""
        if self.frozen:
            return
        at = min(depth, DEPTHS) - 1
        for child, guess in enumerate(guesses):
            of = bisect_right(EDGES, guess)
            self.tried[at][of] += 1
            self.guessed[at][of] += guess
            self.right[at][of] += child == drawn

    def expanded(self, depth: int, chance: float) -> None:
        """A node got children at `depth`, of this chance together."""
        if not self.frozen:
            at = min(depth, DEPTHS) - 1
            self.parents[at] += 1
            self.children[at] += min(1.0, chance)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("guessed", "right", "tried", "children", "parents")}


def shape(value: Any) -> Any:
    return [shape(each) for each in value] if isinstance(value, list) else isinstance(value, (int, float))
