"""The copy law: what followed the same tokens earlier in the text, as a law of the next token, at every node of a tree.

A node's context is the text and the path down to it. What followed the longest suffix of it that stood in the text before is right the more
often the longer the suffix is; how often, is counted in the text itself, beginning with what is usual. A drafter's own law q and the copy
law c meet as (1 - l) q + l c, with l the chance of c. Knows token ids; knows nothing of drafters, trees or the model.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PATTERNS = (4, 2, 1)  # lengths of the suffixes that are indexed; a match is then followed back through the context
USUAL = {1: 0.15, 2: 0.35, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.78, 7: 0.82, 8: 0.88, 12: 0.92}  # tokens that matched -> the usual chance of c
SURE = 0.8  # where the copy law has this chance or more the draft is not used
WEIGHT = 8  # the usual chance weighs as much as this many places
LONGEST = max(USUAL)  # a longer match is not told from one of this length
OCCURRENCES = 4  # the latest places of a pattern that are kept, so a much repeated one stays cheap; the latest weighs most: 8 4 2 1


class CopyLaw(NamedTuple):
    """What followed a context's longest known suffix."""

    chance: float  # l: that the next token is one of these
    following: Mapping[int, float]  # c, by token: sums to 1
    matched: int  # tokens of the suffix
    places: Sequence[int] = ()  # of the text where it stood before: positions just after it, latest last


@dataclass
class CopiedText:
    """One sequence's text, where its patterns ended, and how often what followed them followed again."""

    text: list[int] = field(default_factory=list)  # the tokens that are indexed
    unread: list[int] = field(default_factory=list)  # the tokens after them
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # pattern -> positions just after it, latest last
    right: dict[int, float] = field(default_factory=lambda: {length: share * WEIGHT for length, share in USUAL.items()})
    tried: dict[int, float] = field(default_factory=lambda: dict.fromkeys(USUAL, WEIGHT))
    laws: dict[tuple[int, ...], CopyLaw | None] = field(default_factory=dict)  # path -> the law behind it, until more is read

    def chance(self, matched: int) -> float:
        """The chance that the law of a match of this many tokens is right."""
        length = class_of(matched)
        return self.right[length] / self.tried[length]

    def read(self) -> None:
        """Index the tokens that are not indexed yet; of each note first how right the law before it was."""
        for token in self.unread:
            law = self.law(())
            if law is not None:
                length = class_of(law.matched)
                self.tried[length] += 1
                self.right[length] += law.following.get(token, 0.0)
            self.text.append(token)
            for length in PATTERNS:
                if len(self.text) >= length:
                    held = self.places.setdefault(tuple(self.text[-length:]), [])
                    held.append(len(self.text))
                    del held[: -OCCURRENCES - 1]  # the text's own end is one, until more is read
            longer = self.longer(law, token)
            self.laws = {(): longer} if longer else {}
        self.unread = []

    def law(self, path: Sequence[int]) -> CopyLaw | None:
        """The law behind the text that was read and a path of tokens; None where no suffix stood in the text before."""
        path = tuple(path)
        if path not in self.laws:
            longer = self.longer(self.laws.get(path[:-1]), path[-1]) if path else None
            self.laws[path] = longer or self.looked_up(path)
        return self.laws[path]

    def longer(self, law: CopyLaw | None, token: int) -> CopyLaw | None:
        """The law behind one token more, where that goes on with places of the law before it: no other place can match as long."""
        text = self.text
        places = [place + 1 for place in law.places if text[place] == token and place + 1 < len(text)] if law else []
        return self.law_of(min(law.matched + 1, LONGEST), places) if law and places else None

    def looked_up(self, path: Sequence[int]) -> CopyLaw | None:
        end = (*self.text[-LONGEST:], *path)[-LONGEST:]
        for length in PATTERNS:
            places = self.places.get(end[-length:])
            if places and length <= len(end) and (found := self.followed(end, length, places)):
                return found
        return None

    def followed(self, end: Sequence[int], length: int, places: Sequence[int]) -> CopyLaw | None:
        """The law from those of the places of the context's last `length` tokens where most tokens match; `end` is the context's."""
        text, longest, best = self.text, 0, list[int]()
        for place in places:
            if place == len(text):
                continue  # nothing has followed there yet
            count, most = length, min(len(end), place)
            while count < most and text[place - 1 - count] == end[-1 - count]:
                count += 1
            if count > longest:
                longest, best = count, [place]
            elif count == longest:
                best.append(place)
        return self.law_of(longest, best) if best else None

    def law_of(self, matched: int, places: list[int]) -> CopyLaw:
        """The law of places where so many tokens match, latest last."""
        following: dict[int, float] = {}
        share = 1.0 / ((1 << min(len(places), OCCURRENCES)) - 1)
        for place in places[-OCCURRENCES:]:
            token = self.text[place]
            following[token] = following.get(token, 0.0) + share
            share *= 2
        return CopyLaw(self.chance(matched), following, matched, places)


def is_sure(law: CopyLaw | None) -> bool:
    """Whether a law is so likely right that a draft would add less than it costs."""
    return law is not None and law.chance >= SURE


def class_of(matched: int) -> int:
    """The key of USUAL under which a match of this many tokens is counted."""
    return matched if matched <= 8 else max(length for length in USUAL if length <= matched)


def mixed(
    law: CopyLaw, tokens: Sequence[int], scores: Sequence[float], known: Sequence[float], whole: float, noise: Sequence[float] | None
) -> list[tuple[float, int]]:
    """The best of a node's children by (1 - l) q + l c, as many as there are `tokens`: minus log scores and tokens, best first; of equals
    the lower id.

    `tokens` are the drafter's best, `scores` their log scores: log of q e^noise less `whole`, the log of the sum of q e^noise over its
    vocabulary. `known`: the same of c's tokens, in their order; minus infinity where the drafter does not know one. `noise`: of c's tokens;
    None: there is none, and `whole` is 0.
    """
    of_draft, shares = math.log1p(-law.chance), law.following.values()
    if noise is None:
        copied = [math.log(law.chance * share) for share in shares]
    else:
        copied = [math.log(law.chance * share) + more for share, more in zip(shares, noise, strict=True)]
        of_draft += whole
        most = max(of_draft, *copied)
        total = most + math.log(sum([math.exp(part - most) for part in copied], math.exp(of_draft - most)))
        of_draft, copied = of_draft - total, [part - total for part in copied]
    ranked = [(-score - of_draft, token) for score, token in zip(scores, tokens, strict=True) if token not in law.following]
    for token, score, part in zip(law.following, known, copied, strict=True):
        insort(ranked, (-added(score + of_draft, part), token))
    return ranked[: len(tokens)]


def added(a: float, b: float) -> float:
    """log(e^a + e^b)"""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
