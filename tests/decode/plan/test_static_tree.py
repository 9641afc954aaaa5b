"""The best static tree is the best: no other tree of as many nodes goes further along any table of chances."""

from __future__ import annotations

import itertools
import random

import pytest

from eyas.config import PLAIN, TreeShape, depths_of
from eyas.decode.plan.static_tree import RankChances, best_static
from eyas.decode.tree import Tree


def expected(counts: tuple[int, ...], chances: list[list[float]]) -> float:
    """Nodes that a walk takes, on average."""
    depths, reach, total = depths_of(counts), [1.0], 0.0
    for place, count in enumerate(counts):
        for rank in range(count):
            reach.append(reach[place] * chances[depths[place]][rank])
            total += reach[-1]
    return total


def every_shape(nodes: int, levels: int, most: int):
    for counts in itertools.product(range(most + 1), repeat=nodes):
        if sum(counts) == nodes - 1 and len(depths_of(counts)) == nodes and max(depths_of(counts)) <= levels:
            yield counts


def test_no_other_tree_of_as_many_nodes_goes_further():
    rng = random.Random(0)
    for _ in range(20):
        chances = []
        for _ in range(3):
            first = rng.random()
            second = rng.random() * min(first, 1 - first)
            chances.append([first, second, rng.random() * min(second, 1 - first - second)])
        for nodes in (2, 4, 6):
            shape = best_static(chances, nodes)
            assert shape.nodes == nodes
            best = max(expected(counts, chances) for counts in every_shape(nodes, 3, 3))
            assert expected(shape.fixed, chances) == pytest.approx(best)


def test_what_was_never_taken_is_not_guessed():
    assert best_static([[0.5, 0.0], [0.0]], 10) == TreeShape.parse("static:1")
    assert best_static([[0.0]], 10) == PLAIN


def test_chances_count_only_where_the_walk_came_by():
    chances = RankChances()
    tree = Tree([0, 5, 6, 7, 8], [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0.0] * 5)
    for path in ([0, 1, 3], [0, 1], [0]):
        chances.judge(tree, path)
    assert dict(chances.tried) == {(1, 0): 3, (1, 1): 3, (2, 0): 2}
    assert {place: count for place, count in chances.taken.items() if count} == {(1, 0): 2, (2, 0): 1}
    assert chances.table() == [[2 / 5, 0.0], [1 / 4]]
