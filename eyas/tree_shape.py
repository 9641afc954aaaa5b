"""How large a tree may grow, and what its text means. Knows numbers of nodes, levels and children; knows no tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eyas.checks import EyasError, is_number, short

MOST_NODES = 4096  # rows of a tree; a pass of so many takes seconds anywhere
MOST_GUESSES = 1 << 20  # guesses that a round may weigh: one list entry each


@dataclass(frozen=True)
class TreeShape:
    """How large a tree may grow: `NODESxDEPTHxTOPK`, counted as SafeAILab counts.

    `chain:K` guesses K tokens, one below the other. `static:3.2.0.1` fixes the shape before anything is guessed: it lists how many
    children each node has, breadth first from the root (zeros at the end left out). A shape of 1 node is the empty tree: plain decoding.
    `60x7x10/NAME` grows with the growth that a plugin registered as NAME (decode/grow.py).
    """

    nodes: int  # nodes that the target reads at most, the root included
    depth: int  # times the draft is expanded after the first; a node lies `depth` + 1 below the root at most
    top_k: int  # children of a node at most; in a tree that scores shape, nodes expanded in a level at most too
    counts: tuple[int, ...] = ()  # of a static tree: each node's number of children, breadth first; () for every other shape
    growth: str = ""  # the name of a registered growth, used instead of EAGLE-2's; "": none

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Read `60x7x10`, `60x7x10/NAME`, `chain:3` or `static:3.2.0.1`. Raises `EyasError` for any other text, for a tree of no nodes, no
        children or an empty chain, and as `static` and `checked` do."""
        chain = re.fullmatch(r"chain:(\d{1,18})", text.strip())
        full = re.fullmatch(r"(\d{1,18})x(\d{1,18})x(\d{1,18})(?:/(\w+))?", text.strip())
        static = re.fullmatch(r"static:(\d{1,18}(?:\.\d{1,18})*)", text.strip())
        if chain and int(chain[1]) > 0:
            return cls.chain(int(chain[1])).checked()
        if full and int(full[1]) > 0 and int(full[3]) > 0:
            return cls(int(full[1]), int(full[2]), int(full[3]), growth=full[4] or "").checked()
        if static and int(static[1].split(".")[0]) > 0:
            return cls.static([int(count) for count in static[1].split(".")]).checked()
        known = "NODESxDEPTHxTOPK (60x7x10), chain:K (chain:3), static:CHILDREN (static:3.2.0.1) or auto"
        raise EyasError(f"tree shape {short(text)} is not understood; write {known}")

    def checked(self) -> TreeShape:
        """The shape itself. Raises `EyasError`, which says what it would take, where no round can grow it."""
        for name, value, least in (("nodes", self.nodes, 1), ("depth", self.depth, -1), ("top_k", self.top_k, 1)):
            if not is_number(value, whole=True) or value < least:
                raise EyasError(f"a tree's {name} must be a whole number, at least {max(least, 0)}, not {short(value)}")
        if self.nodes > MOST_NODES:
            memory = f"with a vocabulary of 50,000 their logits alone take {self.nodes * 4 * 50_000 / 1e9:,.1f} GB a round"
            raise EyasError(f"tree {short(str(self))} asks for {self.nodes:,} nodes, and {memory}; at most {MOST_NODES:,}")
        guesses = self.top_k * (1 + max(self.depth, 0) * self.top_k)
        if guesses > MOST_GUESSES:
            memory = f"{self.top_k:,} guesses below each of {self.top_k:,} nodes on {self.depth:,} levels, {guesses:,} to weigh a round"
            raise EyasError(f"tree {short(str(self))} asks for {memory}; at most {MOST_GUESSES:,}: lower DEPTH or TOPK")
        return self

    @classmethod
    def chain(cls, tokens: int) -> TreeShape:
        """The shape of a chain of this many guessed tokens (at least 1)."""
        return cls(tokens + 1, tokens - 1, 1)

    @classmethod
    def static(cls, counts: Sequence[int]) -> TreeShape:
        """The static shape with these numbers of children, one for each node, breadth first from the root. Zeros at the end may be left
        out. Raises `EyasError` where it counts children of nodes that the tree does not have."""
        if sum(counts) >= MOST_NODES:
            raise EyasError(f"a static tree of {1 + sum(counts):,} nodes is too large; at most {MOST_NODES:,}")
        depths = depths_of(counts)
        text = ".".join(map(str, counts))
        if any(counts[len(depths) :]):
            raise EyasError(f"static tree {short(text)} names more nodes than it has: {len(counts)} counts, {len(depths)} nodes")
        counts = counts[: max((place + 1 for place, count in enumerate(counts) if count), default=0)]
        return cls(len(depths), depths[-1] - 1, max(counts), tuple(counts)) if counts else PLAIN

    @property
    def fixed(self) -> tuple[int, ...]:
        """Each node's number of children, breadth first, where the shape is settled before anything is guessed (a static tree, a chain);
        () where scores decide."""
        return self.counts or ((1,) * self.levels if self.top_k == 1 and not self.growth else ())

    @property
    def levels(self) -> int:
        """The depth of the deepest node the shape allows; the root's children have depth 1."""
        return 0 if self.nodes == 1 else min(self.depth + 1, self.nodes - 1)

    def cut(self, levels: int) -> TreeShape:
        """This shape, cut to at most `levels` levels."""
        if levels >= self.levels:
            return self
        if levels <= 0:
            return PLAIN
        if self.counts:
            return TreeShape.static([count for count, depth in zip(self.counts, depths_of(self.counts), strict=False) if depth < levels])
        return replace(self, depth=levels - 1)

    def __str__(self) -> str:
        if self.counts:
            return "static:" + ".".join(map(str, self.counts))
        if self.growth:
            return f"{self.nodes}x{self.depth}x{self.top_k}/{self.growth}"
        return f"chain:{self.nodes - 1}" if self.top_k == 1 and self.nodes == self.depth + 2 else f"{self.nodes}x{self.depth}x{self.top_k}"


def depths_of(counts: Sequence[int]) -> list[int]:
    """The depth of each node of a static tree, breadth first."""
    depths = [0]
    for place, count in enumerate(counts):
        if place == len(depths):
            break
        depths += [depths[place] + 1] * count
    return depths


PLAIN = TreeShape(1, 0, 1)
