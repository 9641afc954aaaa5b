"""When to guess nothing at all: where rounds with guesses lately brought less than plain ones would have, some rounds are plain.

A planner weighs each node by what it should bring and cost; this asks what all of them together did bring, the work around them counted
too. A pause that did no good to end is followed by one twice as long. Few sequences and many are judged apart, since a row more is
cheap for few and dear for many. Knows tokens and seconds; knows no trees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRIAL = 200  # rounds of one sequence, or so much fewer of many, until what guessing brings is believed; as many are remembered
FEWEST = 10  # rounds at least
SHORTEST, LONGEST = 48, 768  # rounds of a pause


@dataclass
class Pauses:
    """Of all sizes of a batch, those within a factor of two together; one object serves many calls."""

    sizes: dict[int, Pause] = field(default_factory=dict)
    now: Pause | None = None

    def anew(self) -> None:
        """A call begins: its text may be another, so guessing is tried again, if not for long where it lost lately."""
        for each in self.sizes.values():
            each.left = 0

    def begin(self, batch: int, price: float) -> bool:
        """Whether the round that comes, with this price of a plain pass in seconds, shall guess nothing."""
        self.now = self.sizes.setdefault(batch.bit_length(), Pause())
        return self.now.begin(batch, price)

    def served(self, guessing: bool, tokens: int, seconds: float) -> None:
        """The round is over; `guessing`: as `begin` had it."""
        if self.now:
            self.now.served(guessing, tokens, seconds)


@dataclass
class Pause:
    """Of one size of batch."""

    brought: float = 0.0  # by the last rounds with guesses: tokens a sequence, older rounds fading
    took: float = 0.0  # by the same: seconds over a plain round's
    plain: float = 1.0  # seconds of a plain round over the price of its pass
    tried: int = 0  # rounds since the last pause
    left: int = 0  # rounds of the pause that is on
    length: int = SHORTEST  # of the next one
    batch: int = 0
    price: float = 0.0

    @property
    def window(self) -> int:
        """Rounds."""
        return max(FEWEST, TRIAL // self.batch)

    def begin(self, batch: int, price: float) -> bool:
        self.batch, self.price = batch, price
        if self.left:
            self.left -= 1
            return True
        if self.tried >= (self.window if self.length == SHORTEST else max(FEWEST, self.window // 4)):
            if self.brought < self.took:
                self.left, self.length = self.length - 1, min(2 * self.length, LONGEST)
                self.tried, self.brought, self.took = 0, 0.0, 0.0
                return True
            self.length = SHORTEST
        self.tried += 1
        return False

    def served(self, guessing: bool, tokens: int, seconds: float) -> None:
        if guessing:
            self.brought += (tokens / self.batch - self.brought) / self.window
            self.took += (seconds / (self.price * self.plain) - self.took) / self.window
        else:
            self.plain += (seconds / self.price - self.plain) / self.window
