"""What the slots of a decoder still hold of texts that are over or under way, so that a prompt that begins alike need not be read again.

A prompt of P tokens that shares its first c with a slot's text takes r = min(c, P) - 1 rows of that slot: row r is read again, and gives
the one feature that the draft's next row needs, for the draft's rows 0 .. r - 1 hang on tokens 0 .. r alone. Where a row does not depend on
the pass that read it, no bit of the text changes. Knows slots, tokens and the caches' copying; knows nothing of prompts or of clients.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eyas.decode.drafter import Drafter, share_prefix
from eyas.model.cache import Cache

if TYPE_CHECKING:
    from eyas.decode.sequence import Sequence

LEAST = 16  # rows that are worth taking
IN_PLACE = 0.5  # share of an idle slot's rows from which on it is taken as it stands; else they are copied, and it stays for others


@dataclass
class Held:
    """What a slot holds."""

    tokens: list[int] = field(default_factory=list)  # those whose rows the target's cache has
    owner: str = ""  # nobody else's prompts take them
    used: int = 0  # when, by count
    sequence: Sequence | None = None  # whose text still grows


class Prefixes:
    """The slots of one decoder."""

    def __init__(self, slots: int) -> None:
        self.slots = [Held() for _ in range(slots)]
        self.count = 0

    def tokens_of(self, slot: int, cache: Cache) -> list[int]:
        """The tokens whose rows a slot has."""
        held = self.slots[slot]
        return held.tokens if held.sequence is None else held.sequence.tokens[: cache.lengths[slot]]

    def best(self, sequence: Sequence, cache: Cache) -> tuple[int, int]:
        """The slot with the longest beginning in common, and how many of its rows serve; (-1, 0) where none has enough."""
        best, rows = -1, LEAST - 1
        for slot, held in enumerate(self.slots):
            if held.owner == sequence.owner:
                found = min(common(self.tokens_of(slot, cache), sequence.tokens), sequence.prompt_length) - 1
                if found > rows:
                    best, rows = slot, found
        return (best, rows) if best >= 0 else (-1, 0)

    def worth_waiting(self, sequence: Sequence, cache: Cache) -> bool:
        """Whether a prompt that is being read will soon hold clearly more of this one than any slot does now."""
        _, now = self.best(sequence, cache)
        coming = 0
        for held in self.slots:
            other = held.sequence
            if other is not None and held.owner == sequence.owner and other.read < other.prompt_length:
                coming = max(coming, common(other.tokens[: other.prompt_length], sequence.tokens[: sequence.prompt_length]))
        return coming - 1 > now + LEAST

    def seat(self, sequence: Sequence, free: list[int], cache: Cache, drafter: Drafter) -> int:
        """Take a slot for a sequence out of those that are free; its caches then hold the rows that it need not read, `sequence.read` of
        them."""
        donor, rows = self.best(sequence, cache) if sequence.reuses else (-1, 0)
        slot = (
            donor
            if donor in free and rows >= IN_PLACE * len(self.slots[donor].tokens)
            else min(free, key=lambda each: self.slots[each].used)
        )
        free.remove(slot)
        if donor >= 0:
            rows = share_prefix(drafter, donor, slot, sequence.tokens[: rows + 1])
        if rows >= LEAST:
            if donor == slot:
                cache.cut(slot, rows)
            else:
                cache.copy_prefix(cache, donor, slot, rows)
            sequence.read = sequence.reused = rows
        else:
            cache.clear(slot)
            drafter.forget(slot)
        self.count += 1
        self.slots[slot] = Held(owner=sequence.owner, used=self.count, sequence=sequence)
        return slot

    def leave(self, sequence: Sequence, cache: Cache) -> None:
        """A sequence is over; its rows stay until somebody needs the slot."""
        held = self.slots[sequence.slot]
        held.tokens, held.sequence = sequence.tokens[: cache.lengths[sequence.slot]], None
        cache.cut(sequence.slot, len(held.tokens))  # rows of tokens that a stop cut off are nobody's
        self.count += 1
        held.used = self.count


def common(one: Items[int], other: Items[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # one[:low] == other[:low]; they differ before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
