"""Prompt look-up: guess that the tokens which followed the same few tokens earlier in the text follow them again.

It costs nothing to draft, and pays where texts repeat themselves or their prompt (summaries, edits, code). It counts in the text itself
how often a match of each length was right, beginning with what is usual. Knows token ids; knows nothing of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree, merge
from eyas.model.protocols import TargetModel

PATTERNS = (4, 3, 2)  # lengths of the patterns that are indexed; a match is then followed back through the text
USUAL = {2: 0.3, 3: 0.45, 4: 0.6, 6: 0.75, 8: 0.85, 12: 0.92}  # tokens that matched at least -> the usual share of right guesses
WEIGHT = 8  # the usual share weighs as much as this many guesses
LONGEST = max(USUAL)  # a longer match is not told from one of this length
FAINT = math.log(0.02)  # a guess less likely than this is not made, but for the first of its match
OCCURRENCES = 4  # the latest occurrences of a pattern that are kept, so a much repeated pattern stays cheap


@dataclass
class TextIndex:
    """One sequence's text, where its patterns ended, and how often its matches were right."""

    text: list[int] = field(default_factory=list)  # the tokens that are indexed
    unread: list[int] = field(default_factory=list)  # the tokens after them
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # pattern -> positions just after it, latest last
    right: dict[int, float] = field(default_factory=lambda: {length: share * WEIGHT for length, share in USUAL.items()})
    tried: dict[int, float] = field(default_factory=lambda: dict.fromkeys(USUAL, WEIGHT))
    matches: list[tuple[int, int]] = field(default_factory=list)  # of the text's end: see `matches` below

    def chance(self, matched: int) -> float:
        """The chance that a guess is right after a match of this many tokens."""
        length = class_of(matched)
        return self.right[length] / self.tried[length]


class LookupDrafter:
    """Proposes what followed earlier occurrences of the text's last tokens."""

    wants: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.indexes: dict[int, TextIndex] = {}

    def reserve(self, sequences: int, capacity: int) -> None:
        for sequence in range(sequences):
            self.forget(sequence)

    def forget(self, sequence: int) -> None:
        self.indexes[sequence] = TextIndex()

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.indexes[sequence].unread += tokens  # until something is looked up

    def read(self, index: TextIndex) -> None:
        """Index the tokens that are not indexed yet: note where patterns end, and whether the match before each token was right."""
        for token in index.unread:
            if index.matches:
                end, matched = index.matches[0]
                index.tried[class_of(matched)] += 1
                index.right[class_of(matched)] += index.text[end] == token
            index.text.append(token)
            index.matches = []
            for length in PATTERNS:
                if len(index.text) >= length:
                    held = index.places.setdefault(tuple(index.text[-length:]), [])
                    if held and not index.matches:
                        index.matches = matches(index.text, held, length)
                    held.append(len(index.text))
                    del held[:-OCCURRENCES]
        index.unread = []

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        return [self.look_up(request, request.shape.levels) for request in requests]

    def look_up(self, request: TreeRequest, levels: int) -> Tree:
        """One tree, up to `levels` deep, of what followed the earlier occurrences of the longest pattern that the text ends with."""
        index = self.indexes[request.sequence]
        self.read(index)
        trees = []
        for rank, (end, matched) in enumerate(index.matches[: request.shape.top_k] if levels else ()):
            score, scores = 0.0, []
            for depth in range(min(levels, len(index.text) - end)):
                score += math.log(index.chance(matched + depth)) * (1 + rank)  # another occurrence is worth less
                if score < FAINT and depth:
                    break
                scores.append(score)
            trees.append(Tree.chain(request.root, index.text[end : end + len(scores)], scores))
        return merge(trees).best(request.shape.nodes) if trees else Tree.root(request.root)


def alone(target: TargetModel) -> LookupDrafter:
    """The method's drafter, which needs no draft."""
    return LookupDrafter()


def matches(text: list[int], ends: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The earlier occurrences of the text's last `length` tokens: (the position just after one, the number of tokens that match), the
    longest first, then the latest."""
    found = [(end, matched(text, end, length)) for end in reversed(ends)]
    return sorted(found, key=lambda place: -place[1])


def matched(text: list[int], end: int, at_least: int) -> int:
    """How many tokens before position `end` equal the text's last ones, up to LONGEST."""
    count = at_least
    while count < min(LONGEST, end) and text[end - 1 - count] == text[-1 - count]:
        count += 1
    return count


def class_of(matched: int) -> int:
    """The key of USUAL under which a match of this many tokens is counted."""
    return max(length for length in USUAL if length <= matched)
