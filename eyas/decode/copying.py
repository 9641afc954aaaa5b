"""The copy law: what followed the same tokens earlier in the text, as a law of the next token, at every node of a tree.

A node's context is the text and the path down to it. What followed the longest suffix of it that stood in the text before is right the more
often the longer the suffix is; how often, is counted in the text itself, beginning with what is usual. A drafter's own law q and the copy
law c meet as (1 - l) q + l c, with l the chance of c. Knows token ids; knows nothing of drafters, trees or the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PATTERNS = (4, 2, 1)  # lengths of the suffixes that are indexed; a match is then followed back through the context
USUAL = {1: 0.15, 2: 0.35, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.78, 7: 0.82, 8: 0.88, 12: 0.92}  # tokens that matched -> the usual chance of c
WEIGHT = 8  # the usual chance weighs as much as this many places
LONGEST = max(USUAL)  # a longer match is not told from one of this length
OCCURRENCES = 4  # the latest places of a pattern that are kept, so a much repeated one stays cheap; the latest weighs most: 8 4 2 1


class CopyLaw(NamedTuple):
    """What followed a context's longest known suffix."""

    chance: float  # l: that the next token is one of these
    following: Mapping[int, float]  # c, by token: sums to 1
    matched: int  # tokens of the suffix


@dataclass
class CopiedText:
    """One sequence's text, where its patterns ended, and how often what followed them followed again."""

    text: list[int] = field(default_factory=list)  # the tokens that are indexed
    unread: list[int] = field(default_factory=list)  # the tokens after them
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # pattern -> positions just after it, latest last
    right: dict[int, float] = field(default_factory=lambda: {length: share * WEIGHT for length, share in USUAL.items()})
    tried: dict[int, float] = field(default_factory=lambda: dict.fromkeys(USUAL, WEIGHT))

    def chance(self, matched: int) -> float:
        """The chance that the law of a match of this many tokens is right."""
        length = class_of(matched)
        return self.right[length] / self.tried[length]

    def read(self) -> None:
        """Index the tokens that are not indexed yet; of each note first how right the law before it was."""
        for token in self.unread:
            if (law := self.law(())) is not None:
                length = class_of(law.matched)
                self.tried[length] += 1
                self.right[length] += law.following.get(token, 0.0)
            self.text.append(token)
            for length in PATTERNS:
                if len(self.text) >= length:
                    held = self.places.setdefault(tuple(self.text[-length:]), [])
                    held.append(len(self.text))
                    del held[: -OCCURRENCES - 1]  # the text's own end is one, until more is read
        self.unread = []

    def law(self, path: Sequence[int]) -> CopyLaw | None:
        """The law behind the text that was read and a path of tokens; None where no suffix stood in the text before."""
        end = [*self.text[-LONGEST:], *path][-LONGEST:]
        for length in PATTERNS:
            if length <= len(end) and (found := self.followed(end, length)):
                return found
        return None

    def followed(self, end: list[int], length: int) -> CopyLaw | None:
        """The law from the places of the context's last `length` tokens, of those where most tokens match; `end` is the context's."""
        text, longest, best = self.text, 0, list[int]()
        for place in self.places.get(tuple(end[-length:]), ()):
            if place == len(text):
                continue  # nothing has followed there yet
            count, most = length, min(len(end), place)
            while count < most and text[place - 1 - count] == end[-1 - count]:
                count += 1
            if count > longest:
                longest, best = count, [place]
            elif count == longest:
                best.append(place)
        if not best:
            return None
        following: dict[int, float] = {}
        for rank, place in enumerate(best[-OCCURRENCES:]):
            following[text[place]] = following.get(text[place], 0.0) + 2.0**rank
        whole = 2.0 ** min(len(best), OCCURRENCES) - 1
        return CopyLaw(self.chance(longest), {token: weight / whole for token, weight in following.items()}, longest)


def class_of(matched: int) -> int:
    """The key of USUAL under which a match of this many tokens is counted."""
    return matched if matched <= 8 else max(length for length in USUAL if length <= matched)


def mixed(law: CopyLaw, scores: Mapping[int, float], whole: float, noise: Mapping[int, float], count: int) -> list[tuple[int, float]]:
    """The `count` best of a node's children by (1 - l) q + l c: tokens and log scores, best first; of equals the lower id.

    `scores`: of the drafter's best tokens, and of all tokens of c that it knows, its own log scores: log of q e^noise less `whole`, the log
    of the sum of q e^noise over its vocabulary. `noise`: of c's tokens; 0 where there is none. Without noise `whole` is 0.
    """
    of_draft, of_law = math.log1p(-law.chance) + whole, math.log(law.chance)
    weights = {token: of_draft + score for token, score in scores.items()}
    parts = [of_draft]
    for token, share in law.following.items():
        more = of_law + math.log(share) + noise[token]
        weights[token] = added(weights.get(token, -math.inf), more)
        parts.append(more)
    total = -math.inf
    for part in parts:
        total = added(total, part)
    best = sorted(weights.items(), key=lambda each: (-each[1], each[0]))[:count]
    return [(token, min(0.0, weight - total)) for token, weight in best]


def added(a: float, b: float) -> float:
    """log(e^a + e^b)"""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
