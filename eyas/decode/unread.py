"""Committed text that a draft has not read yet, in rows: row j pairs the feature f_j with the token t_{j+1}; of modules that each guess one
token further, the row j of module k the state that the module before made there with t_{j+1+k}.

Knows tokens, features, and how many rows a cache holds; knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.model.cache import Cache
from eyas.model.rows import Segment


class Unread(NamedTuple):
    """Rows for somebody who reads them now; where they are the text's last, the last token is the root."""

    tokens: list[int]
    features: Tensor  # [rows, F]


@dataclass
class PendingRows:
    """Rows that wait."""

    tokens: list[int] = field(default_factory=list)  # t_{j+1} of these rows
    features: list[Tensor] = field(default_factory=list)  # f_j of these rows, in pieces as they came
    begun: bool = False  # whether `observe` was called: the very first token has no row

    def first(self, count: int) -> Unread:
        """The first `count` rows; they go on waiting."""
        if len(self.features) > 1:
            self.features = [torch.cat(self.features)]
        return Unread(self.tokens[:count], self.features[0][:count])

    def take(self, count: int) -> Unread:
        """The first `count` rows, which wait no longer."""
        taken, held = self.first(count), self.features[0]
        self.tokens, self.features = self.tokens[count:], [held[count:]] if len(held) > count else []
        return taken


class ModuleRows:
    """A text as modules read it. Of the states that a module has read the last ones stay: a tree begins from them, and a graph lets the
    modules read them anew."""

    def __init__(self, caches: Sequence[Cache], slot: int, again: int) -> None:
        """`caches`: with the rows that each module has read in this slot; they are forgotten. `again`: how many states that were read
        stay."""
        self.tokens: list[int] = []
        self.caches, self.slot, self.again = caches, slot, again
        self.states = [list[Tensor]() for _ in range(len(caches) + 1)]  # by module, what it reads; of the last, what it made
        self.cut(0)

    def observe(self, tokens: Sequence[int], states: Tensor) -> None:
        """Take in tokens, and the target's last hidden states, of which each stands before its token."""
        self.tokens += tokens
        self.states[0].append(states)

    @property
    def position(self) -> int:
        """Of the last token, whose state is not known yet."""
        return len(self.tokens) - 1

    def read(self, level: int) -> int:
        """How many positions module `level` has read; of -1, the target."""
        return self.caches[level].lengths[self.slot] if level >= 0 else self.position

    def cut(self, rows: int) -> None:
        """All modules have read so many positions."""
        for cache in self.caches:
            cache.lengths[self.slot] = rows

    def take(self, level: int, most: int) -> tuple[list[int], Tensor, Segment, list[int]]:
        """The next rows of module `level`, at most so many, which wait no longer: tokens, states, segment and positions."""
        start = self.read(level)
        tokens = self.tokens[start + 1 + level :]
        held = torch.cat(self.states[level]) if self.states[level] else torch.zeros(0)
        first = len(held) - (self.read(level - 1) - start)
        rows = held[first : first + min(len(tokens), most)]
        self.states[level] = [held[max(0, first + len(rows) - self.again) :]]
        return tokens[: len(rows)], rows, Segment(self.slot, len(rows)), list(range(start, start + len(rows)))

    def made(self, level: int, rows: Tensor) -> None:
        """Module `level` made these of the rows that it was given, and they stand in its cache."""
        self.caches[level].keep(self.slot, range(len(rows)))
        self.states[level + 1].append(rows)
        if level + 2 == len(self.states):  # no module reads these
            self.states[-1] = [rows[-1:]]

    def last(self, level: int) -> Tensor:
        """What module `level` made of the last position that it read, [1, H]."""
        return self.states[level + 1][-1][-1:]

    # ---- for a graph that lets all modules read from one position on, and keeps what they make of the text's end to itself ----

    @property
    def begun(self) -> int:
        """That position. Each module has the rows of those before."""
        return max(0, min(self.read(len(self.caches) - 1), self.position - 1))

    @property
    def unread(self) -> Unread:
        self.states[0] = [torch.cat(self.states[0])]
        return Unread(self.tokens[self.begun + 1 :], self.states[0][0][self.begun - self.position :])

    def was_read(self) -> None:
        """The last rows will be read anew, by each module where the last one goes on."""
        self.cut(max(0, self.position + 1 - len(self.caches)))
        self.states = [[torch.cat(self.states[0])[-self.again :]], *[[] for _ in self.states[1:]]]
