"""A tree of guesses about what follows the last token: the tree itself, how it is grown, cut to size and merged.

Knows token ids, parents and scores; knows nothing of models, caches or temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True)
class Tree:
    """Row 0 is the root, the last committed token. Parents come before children; siblings carry distinct tokens."""

    tokens: list[int]
    parents: list[int]  # -1 for the root
    depths: list[int]  # 0 for the root
    scores: list[float]  # log of the chance that the path down to the node is drawn; 0.0 for the root
    distributions: list[Tensor | None] | None = field(default=None, repr=False, compare=False)  # [V] for each row; see `drawn`
    grown: Tree | None = field(default=None, repr=False, compare=False)  # what it was cut out of, for whoever shows it; None: it is whole
    children: list[dict[int, int]] = field(init=False, repr=False, compare=False)  # token -> row, for each row

    def __post_init__(self) -> None:
        assert self.parents[0] == -1 and self.depths[0] == 0, "row 0 is the root"
        children: list[dict[int, int]] = [{} for _ in self.tokens]
        for row in range(1, len(self.tokens)):
            parent = self.parents[row]
            assert 0 <= parent < row, f"row {row} has parent {parent}: parents come before children"
            assert self.depths[row] == self.depths[parent] + 1, f"row {row} lies one deeper than its parent"
            assert self.tokens[row] not in children[parent], f"rows {row} and {children[parent][self.tokens[row]]} are equal siblings"
            children[parent][self.tokens[row]] = row
        object.__setattr__(self, "children", children)

    @property
    def drawn(self) -> bool:
        """Whether the children of every row were drawn: without replacement, in their order, from the probabilities [V] that
        `distributions` holds for the row, in a shape fixed beforehand. A tree cut by `keep` or `best` is not drawn: its guesses were kept
        for being likely."""
        return self.distributions is not None or len(self) == 1

    @classmethod
    def root(cls, token: int) -> Tree:
        """The empty tree: it guesses nothing, so the round is plain decoding."""
        return cls([token], [-1], [0], [0.0])

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int], scores: Sequence[float]) -> Tree:
        """A tree without branches: `tokens` one below the other. `scores` are those of the paths, as in a tree's `scores`."""
        return cls([root, *tokens], list(range(-1, len(tokens))), list(range(len(tokens) + 1)), [0.0, *scores])

    def __len__(self) -> int:
        return len(self.tokens)

    def keep(self, rows: Iterable[int]) -> Tree:
        """The tree of these rows, in the order they had. The root and every kept row's parent must be among them."""
        rows = sorted(rows)
        place = {-1: -1} | {row: i for i, row in enumerate(rows)}
        return Tree(
            [self.tokens[row] for row in rows],
            [place[self.parents[row]] for row in rows],
            [self.depths[row] for row in rows],
            [self.scores[row] for row in rows],
            grown=self.grown or self,
        )

    def cut(self) -> list[int]:
        """Rows of `grown` that this tree has not, parents before children."""
        if self.grown is None:
            return []
        places, found = [0], list[int]()
        for row, parent in enumerate(self.grown.parents[1:], 1):
            above = places[parent]
            places.append(self.children[above].get(self.grown.tokens[row], -1) if above >= 0 else -1)
            if places[row] < 0:
                found.append(row)
        return found

    def best(self, nodes: int) -> Tree:
        """The tree of the `nodes` best rows, root included, by score and then by order. A child never scores above its parent, so a kept
        child's parent is kept."""
        if len(self) <= nodes:
            return self
        ranked = sorted(range(1, len(self)), key=lambda row: (-self.scores[row], row))
        return self.keep([0, *ranked[: nodes - 1]])


class Growth:
    """Grow a tree level by level (EAGLE-2, expansion and reranking): expand the `width` best of the newest level, keep the best of all.

    The drafter asks for `frontier`, computes what follows each of its nodes, and hands that to `expand`.
    """

    def __init__(self, root: int, width: int) -> None:
        self.tokens, self.parents, self.depths, self.scores = [root], [-1], [0], [0.0]
        self.width = width
        self.ranks = [0]  # each node's rank among its siblings
        self.distributions: dict[int, Tensor] = {}  # node -> the probabilities [V] its children were drawn from
        self.newest = [0]  # the nodes of the newest level
        self.expanded: list[int] = []  # nodes that were expanded, in that order: the tree's rows in the drafter's cache
        self.places: dict[int, int] = {}  # where a node is among the expanded ones behind the root

    def frontier(self) -> list[int]:
        """The nodes to expand next: the best of the newest level; of equal scores the node made earlier."""
        return sorted(self.newest, key=lambda node: (-self.scores[node], node))[: self.width]

    def path(self, node: int) -> list[int]:
        """Tokens on the path from the root's child down to a node."""
        tokens: list[int] = []
        while node:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def seen(self, frontier: Sequence[int]) -> list[list[int]]:
        """Which nodes each of the F frontier nodes sees, of the expanded ones and of these behind them, but for the root: its ancestors and
        itself, as their places, ascending (a parent is expanded before its children)."""
        found = []
        for place, node in enumerate(frontier, len(self.expanded) - 1):
            line = [place]
            while (node := self.parents[node]) > 0:
                line.append(self.places[node])
            found.append(line[::-1])
        return found

    def expand(
        self,
        frontier: Sequence[int],
        tokens: Sequence[Sequence[int]],
        log_scores: Sequence[Sequence[float]],
        distributions: Sequence[Tensor] | None = None,
    ) -> None:
        """Give each frontier node its children: tokens and log scores (at most 0), best first. `distributions`: the probabilities that
        the children were drawn from, where they were drawn."""
        self.newest = []
        for node, its_tokens, its_scores in zip(frontier, tokens, log_scores, strict=True):
            possible = its_scores.index(IMPOSSIBLE) if IMPOSSIBLE in its_scores else len(its_scores)
            its_tokens, above, first = its_tokens[:possible][: self.room(node)], self.scores[node], len(self.tokens)
            count = len(its_tokens)
            self.newest += range(first, first + count)
            self.tokens += its_tokens
            self.parents += [node] * count
            self.ranks += range(count)
            self.depths += [self.depths[node] + 1] * count
            self.scores += [above + score for score in its_scores[:count]]
        self.places.update(zip(frontier, itertools.count(len(self.expanded) - 1)))
        self.expanded += frontier
        self.distributions.update(zip(frontier, distributions or (), strict=False))

    def room(self, node: int) -> int | None:
        """How many children a node may have; None: all that `expand` is given."""
        return None

    def tree(self, nodes: int) -> Tree:
        return Tree(self.tokens, self.parents, self.depths, self.scores).best(nodes)


class StaticGrowth(Growth):
    """Grow a tree whose shape was fixed beforehand (EAGLE, Medusa): the shape says where nodes are, scores only which tokens they get.

    A place is the number of a node in the shape, breadth first from the root.
    """

    def __init__(self, root: int, counts: Sequence[int]) -> None:
        super().__init__(root, max(counts))
        self.counts = [*counts, *[0] * (1 + sum(counts) - len(counts))]
        self.first = [1 + sum(self.counts[:place]) for place in range(len(self.counts))]  # the place of each place's first child

    def frontier(self) -> list[int]:
        return [node for node in self.newest if self.room(node)]

    def place(self, node: int) -> int:
        return self.first[self.place(self.parents[node])] + self.ranks[node] if node else 0

    def room(self, node: int) -> int:
        return self.counts[self.place(node)]

    def tree(self, nodes: int) -> Tree:
        distributions = [self.distributions.get(node) for node in range(len(self.tokens))] if self.distributions else None
        return Tree(self.tokens, self.parents, self.depths, self.scores, distributions)


def merge(trees: Sequence[Tree]) -> Tree:
    """One tree with the paths of all `trees`, which share their root: equal siblings become one node, with the larger score."""
    tokens, parents, depths, scores = [trees[0].tokens[0]], [-1], [0], [0.0]
    rows: dict[tuple[int, int], int] = {}  # (parent row, token) -> row
    for tree in trees:
        assert tree.tokens[0] == tokens[0], "trees to merge share their root"
        place = [0]
        for row in range(1, len(tree)):
            key = (place[tree.parents[row]], tree.tokens[row])
            if key not in rows:
                rows[key] = len(tokens)
                tokens.append(tree.tokens[row])
                parents.append(key[0])
                depths.append(tree.depths[row])
                scores.append(tree.scores[row])
            scores[rows[key]] = max(scores[rows[key]], tree.scores[row])
            place.append(rows[key])
    return Tree(tokens, parents, depths, scores, grown=next((tree.grown for tree in trees if tree.grown), None))
