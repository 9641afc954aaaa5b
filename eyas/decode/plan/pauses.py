"""When to guess nothing at all: where rounds with guesses lately brought less than plain ones would have, some rounds are plain.

A planner weighs each node by what it should bring and cost; this asks what all of them together did bring, the work around them counted
too. A pause that did no good to end is followed by one twice as long. Few sequences and many are judged apart, since a row more is
cheap for few and dear for many. Knows tokens and seconds; knows no trees.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIAL_ROUNDS = 200  # rounds of one sequence, or so much fewer of many, until what guessing brings is believed; as many are remembered
FEWEST_ROUNDS = 10  # rounds at least
SHORTEST_PAUSE, LONGEST_PAUSE = 48, 768  # rounds of a pause


@dataclass
class Gain:
    """What guessing brought, for numbers of sequences within a factor of two; calls share it."""

    brought: float = 0.0  # by the last rounds with guesses: tokens a sequence, older rounds fading
    took: float = 0.0  # by the same: seconds over a plain round's
    plain: float = 1.0  # seconds of a plain round over the price of its pass
    tried: int = 0  # rounds since the last pause
    length: int = SHORTEST_PAUSE  # rounds of the next pause


class Pauses:
    """One call's pauses. `gains`, by size of batch, is what was learned: it may be another call's too, whose pauses are its own."""

    def __init__(self, gains: dict[int, Gain] | None = None) -> None:
        self.gains = {} if gains is None else gains
        self.left: dict[int, int] = {}  # rounds of the pause that is on, by size of batch
        self.gain, self.batch, self.price = Gain(), 1, 1.0  # of the round under way

    @property
    def window(self) -> int:
        """Rounds that are remembered."""
        return max(FEWEST_ROUNDS, TRIAL_ROUNDS // self.batch)

    def begin(self, batch: int, price: float) -> bool:
        """Whether the round that comes, with this price of a plain pass in seconds, shall guess nothing."""
        size = batch.bit_length()
        gain = self.gain = self.gains.setdefault(size, Gain())
        self.batch, self.price = batch, price
        if self.left.get(size):
            self.left[size] -= 1
            return True
        if gain.tried >= (self.window if gain.length == SHORTEST_PAUSE else max(FEWEST_ROUNDS, self.window // 4)):
            if gain.brought < gain.took:
                self.left[size], gain.length = gain.length - 1, min(2 * gain.length, LONGEST_PAUSE)
                gain.tried, gain.brought, gain.took = 0, 0.0, 0.0
                return True
            gain.length = SHORTEST_PAUSE
        gain.tried += 1
        return False

    def record(self, guessing: bool, tokens: int, seconds: float) -> None:
        """The round is over; `guessing`: as `begin` had it."""
        gain = self.gain
        if guessing:
            gain.brought += (tokens / self.batch - gain.brought) / self.window
            gain.took += (seconds / (self.price * gain.plain) - gain.took) / self.window
        else:
            gain.plain += (seconds / self.price - gain.plain) / self.window
