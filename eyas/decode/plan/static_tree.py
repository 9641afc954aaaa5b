"""The best tree of a fixed shape, from how often children of each rank were taken (Medusa, arXiv 2401.10774, 3.3; Sequoia, 2402.12374).

Knows ranks, depths and counts; knows no tokens.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from eyas.config import PLAIN, TreeShape
from eyas.decode.tree import Tree

USUAL_NODES = 16  # nodes of a static tree where no number is given
BELIEF = 2  # the belief that a child is never taken weighs as much as this many nodes: a child that was hardly tried promises nothing


class RankChances:
    """How often the child of each rank was taken where a walk came to its parent, by depth."""

    def __init__(self) -> None:
        self.taken: dict[tuple[int, int], int] = defaultdict(int)
        self.tried: dict[tuple[int, int], int] = defaultdict(int)

    def judge(self, tree: Tree, path: Sequence[int]) -> None:
        """Count a walk along `path`, rows of a tree whose siblings lie in the order of their ranks."""
        for place, row in enumerate(path):
            for rank, child in enumerate(tree.children[row].values()):
                self.tried[tree.depths[child], rank] += 1
                self.taken[tree.depths[child], rank] += path[place + 1 : place + 2] == [child]

    def table(self) -> list[list[float]]:
        """The chance that a child is taken where the walk came to its parent, as [depth - 1][rank]."""
        found: list[list[float]] = []
        for depth, rank in sorted(self.tried):
            if rank == 0:
                found.append([])
            found[depth - 1].append(self.taken[depth, rank] / (self.tried[depth, rank] + BELIEF))
        return found


def best_static(chances: Sequence[Sequence[float]], nodes: int) -> TreeShape:
    """The tree of `nodes` nodes, root included, in which a walk goes furthest. A child is assumed to be taken with the chance of its depth
    and rank, whatever came before; then a node's chance is the product along its path, and the likeliest nodes are the best tree."""
    counts: dict[tuple[int, ...], int] = {(): 0}
    waiting: list[tuple[float, tuple[int, ...], float]] = []  # minus a node's chance, its ranks from the root, its parent's chance

    def offer(ranks: tuple[int, ...], parent: float, most: float) -> None:
        """Let a node wait to join the tree, with a chance of no more than `most`, so that siblings join in the order of their ranks."""
        if len(ranks) <= len(chances) and ranks[-1] < len(chances[len(ranks) - 1]):
            heapq.heappush(waiting, (-min(most, parent * chances[len(ranks) - 1][ranks[-1]]), ranks, parent))

    offer((0,), 1.0, 1.0)
    while waiting and len(counts) < nodes:
        minus, ranks, parent = heapq.heappop(waiting)
        if minus == 0:
            break
        counts[ranks] = 0
        counts[ranks[:-1]] += 1
        offer((*ranks, 0), -minus, -minus)
        offer((*ranks[:-1], ranks[-1] + 1), parent, -minus)
    ordered = sorted(counts, key=lambda ranks: (len(ranks), ranks))
    return TreeShape.static([counts[ranks] for ranks in ordered]) if len(counts) > 1 else PLAIN


def tree_for(accuracies: Sequence[Sequence[float]] | None, usual: str, nodes: int | None = None) -> TreeShape:
    """The best tree of `nodes` nodes for a draft with these accuracies, [depth - 1][rank]; without accuracies the shape `usual`."""
    return best_static(accuracies, nodes or USUAL_NODES) if accuracies else TreeShape.parse(usual)
