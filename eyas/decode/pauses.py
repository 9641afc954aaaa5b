"""When to guess nothing at all: where rounds with guesses lately brought less than plain ones would have, some rounds are plain.

A planner weighs each node by what it should bring and cost; this asks what all of them together did bring, the work around them counted
too. A pause that did no good to end is followed by one twice as long. Knows tokens and seconds; knows no trees.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIAL = 200  # rounds of one sequence, or so much fewer of many, until what guessing brings is believed; as many are remembered
FEWEST = 10  # rounds at least
SHORTEST, LONGEST = 48, 768  # rounds of a pause


@dataclass
class Pauses:
    brought: float = 0.0  # by the last rounds with guesses: tokens a sequence, older rounds fading
    took: float = 0.0  # by the same: seconds over a plain round's
    plain: float = 1.0  # seconds of a plain round over the price of its pass
    tried: int = 0  # rounds since the last pause
    left: int = 0  # rounds of the pause that is on
    length: int = SHORTEST  # of the next one
    since: int = 0  # the batch for which the pause was made
    batch: int = 0
    price: float = 0.0

    @property
    def window(self) -> int:
        """Rounds."""
        return max(FEWEST, TRIAL // self.batch)

    def begin(self, batch: int, price: float) -> bool:
        """Whether the round that comes, with this price of a plain pass in seconds, shall guess nothing."""
        self.batch, self.price = batch, price
        if self.left and 2 * batch <= self.since:  # what was too dear for many may pay for few
            self.left, self.length = 0, SHORTEST
        if self.left:
            self.left -= 1
            return True
        if self.tried >= (self.window if self.length == SHORTEST else max(FEWEST, self.window // 4)):
            if self.brought < self.took:
                self.left, self.since, self.length = self.length - 1, batch, min(2 * self.length, LONGEST)
                self.tried, self.brought, self.took = 0, 0.0, 0.0
                return True
            self.length = SHORTEST
        self.tried += 1
        return False

    def served(self, guessing: bool, tokens: int, seconds: float) -> None:
        """The round is over; `guessing`: as `begin` had it."""
        if guessing:
            self.brought += (tokens / self.batch - self.brought) / self.window
            self.took += (seconds / (self.price * self.plain) - self.took) / self.window
        else:
            self.plain += (seconds / self.price - self.plain) / self.window
