"""When to guess nothing at all: where rounds with guesses lately brought less than plain rounds would have, some rounds are plain.

A planner weighs each node by what it should bring and cost. This asks what all nodes together did bring, and counts the work around them
too. Where guessing does not pay after a pause either, the next pause is twice as long. Few sequences and many are judged apart, since one
more row is cheap for few and dear for many. Knows tokens and seconds; knows no trees.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIAL_ROUNDS = 200  # rounds until what guessing brings is believed, and rounds remembered; for n sequences an n-th of them
FEWEST_ROUNDS = 10  # the least that this comes to for many sequences
SHORTEST_PAUSE, LONGEST_PAUSE = 48, 768  # rounds of a pause; and rounds in which no draft was worth asking, until it is asked all the same


@dataclass
class Gain:
    """What guessing brought, for numbers of sequences within a factor of two; calls share it."""

    brought: float = 0.0  # tokens for each sequence that the last rounds with guesses brought, older rounds fading
    took: float = 0.0  # seconds of the same rounds divided by a plain round's
    plain: float = 1.0  # seconds of a plain round divided by the price of its pass
    tried: int = 0  # rounds since the last pause
    length: int = SHORTEST_PAUSE  # rounds of the next pause
    silent: int = 0  # rounds since the draft was last asked
    patience: int = SHORTEST_PAUSE  # after so many it is asked although it is not worth that


class Pauses:
    """One call's pauses. `gains`, by size of batch, holds what was learned; calls may share it, and each has pauses of its own."""

    def __init__(self, gains: dict[int, Gain] | None = None) -> None:
        self.gains = {} if gains is None else gains
        self.left: dict[int, int] = {}  # rounds left of the pause under way, by size of batch
        self.gain, self.batch, self.price = Gain(), 1, 1.0  # those of the round under way

    @property
    def window(self) -> int:
        """How many rounds are remembered."""
        return max(FEWEST_ROUNDS, TRIAL_ROUNDS // self.batch)

    def begin(self, batch: int, price: float) -> bool:
        """Whether the next round shall guess nothing. `batch`: its sequences; `price`: the seconds of a plain pass of them."""
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

    def overdue(self, asked: bool) -> bool:
        """Whether a draft that is not worth asking (`asked`) shall be tried all the same. A trial costs more than a round: the draft first
        reads all text since the last. So the next one waits twice as long, until the draft is worth asking by itself."""
        gain = self.gain
        if asked:
            gain.silent, gain.patience = 0, SHORTEST_PAUSE
            return False
        gain.silent += 1
        if gain.silent < gain.patience:
            return False
        gain.silent, gain.patience = 0, min(2 * gain.patience, LONGEST_PAUSE)
        return True

    def record(self, guessing: bool, tokens: int, seconds: float) -> None:
        """Learn from the round that is over. `guessing`: whether it was allowed to guess, the opposite of what `begin` said."""
        gain = self.gain
        if guessing:
            gain.brought += (tokens / self.batch - gain.brought) / self.window
            gain.took += (seconds / (self.price * gain.plain) - gain.took) / self.window
        else:
            gain.plain += (seconds / self.price - gain.plain) / self.window
