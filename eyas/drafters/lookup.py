"""Prompt look-up: guess that what followed the same few tokens earlier in the text follows them again.

Costs nothing to draft and knows nothing of the model; pays where texts repeat themselves or their prompt (summaries, edits, code). How
often a match of so many tokens was right is counted in the text itself, from what is usual on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree, merge
from eyas.model.protocols import TargetModel

PATTERNS = (4, 3, 2)  # tokens that are looked up; what matched before them is compared in the text
USUAL = {2: 0.3, 3: 0.45, 4: 0.6, 6: 0.75, 8: 0.85, 12: 0.92}  # share of right guesses, by how many tokens matched at least
WEIGHT = 8  # guesses that what is usual counts as much as
LONGEST = max(USUAL)
FAINT = math.log(0.02)  # chance of a guess under which none is made, but for the first
OCCURRENCES = 4  # latest places looked at, so a much repeated pattern stays cheap


@dataclass
class TextIndex:
    """One sequence's text, where its patterns ended (latest last), and how its latest matches did."""

    text: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)  # what it goes on with
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    right: dict[int, float] = field(default_factory=lambda: {length: share * WEIGHT for length, share in USUAL.items()})
    tried: dict[int, float] = field(default_factory=lambda: dict.fromkeys(USUAL, WEIGHT))
    matches: list[tuple[int, int]] = field(default_factory=list)  # where the longest pattern that it ends with ended before

    def chance(self, matched: int) -> float:
        length = class_of(matched)
        return self.right[length] / self.tried[length]


class LookupDrafter:
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
        """Note where patterns end, and whether matches came true."""
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
        """The continuations of the longest pattern that occurred before, the likeliest first, merged into one tree."""
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
    return LookupDrafter()


def matches(text: list[int], ends: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Places where the last `length` tokens ended before, with the number of tokens equal there: longest first, then latest."""
    found = [(end, matched(text, end, length)) for end in reversed(ends)]
    return sorted(found, key=lambda place: -place[1])


def matched(text: list[int], end: int, at_least: int) -> int:
    """How many tokens before `end` equal the text's last ones, up to LONGEST."""
    count = at_least
    while count < min(LONGEST, end) and text[end - 1 - count] == text[-1 - count]:
        count += 1
    return count


def class_of(matched: int) -> int:
    return max(length for length in USUAL if length <= matched)
