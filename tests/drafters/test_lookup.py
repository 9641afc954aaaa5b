"""Look-up proposes what followed the longest earlier match, the latest first, and nothing where nothing matched."""

from __future__ import annotations

import random

import pytest

from eyas.config import Sampling, TreeShape
from eyas.decode.copying import OCCURRENCES
from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree
from eyas.drafters.lookup import LookupDrafter

WIDE = TreeShape(60, 3, 4)


def proposed(text: list[int], shape: TreeShape = WIDE, sequence: int = 0) -> Tree:
    drafter = LookupDrafter()
    drafter.reserve(sequence + 1, 100)
    drafter.observe(sequence, text, None)
    return tree_of(drafter, text, shape, sequence)


def tree_of(drafter: LookupDrafter, text: list[int], shape: TreeShape = WIDE, sequence: int = 0) -> Tree:
    return drafter.propose([TreeRequest(sequence, text[-1], len(text) - 1, shape, Sampling(), None)])[0]


def lines(tree: Tree) -> set[tuple[int, ...]]:
    """The tokens down to each leaf."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:]):
        found.append((*found[parent], token))
    return {line for row, line in enumerate(found) if row not in tree.parents}


def test_what_followed_the_same_tokens_is_proposed():
    assert proposed([1, 2, 3, 4, 5, 6, 1, 2]) == Tree.chain(2, [3, 4, 5, 6], proposed([1, 2, 3, 4, 5, 6, 1, 2]).scores[1:])
    assert lines(proposed([1, 2, 3, 4, 5, 6, 1, 2], TreeShape.chain(2))) == {(3, 4)}


def test_nothing_is_proposed_where_nothing_matches():
    for text in ([1], [1, 2, 3, 4], [1, 2, 3, 4, 1, 3]):
        assert proposed(text) == Tree.root(text[-1])
    assert proposed([1, 2, 1, 2, 1, 2], TreeShape(1, 0, 1)) == Tree.root(2), "the empty tree stays empty"


def test_the_longest_match_wins_over_a_later_one():
    text = [8, 1, 2, 3, 40, 9, 2, 3, 50, 7, 8, 1, 2, 3]  # four tokens match at 40, two at 50
    assert {line[0] for line in lines(proposed(text))} == {40}
    assert {line[0] for line in lines(proposed(text[5:]))} == {50}, "without the longer one, the shorter is found"


def test_of_equal_matches_the_latest_comes_first():
    text = [1, 2, 30, 7, 1, 2, 40, 8, 1, 2, 50, 9, 1, 2]
    tree = proposed(text)
    children = tree.children[0]
    assert list(children) == [50, 40, 30]
    scores = [tree.scores[row] for row in children.values()]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    assert lines(proposed(text, TreeShape.chain(2))) == {(50, 9)}, "a chain is the latest alone"


def test_equal_continuations_are_one_branch():
    tree = proposed([1, 2, 30, 40, 1, 2, 30, 50, 1, 2])
    assert list(tree.children[0]) == [30]
    assert set(tree.children[1]) == {40, 50}


def test_a_tree_stays_within_its_shape_and_only_says_what_followed():
    rng = random.Random(0)
    proposals = 0
    for _ in range(300):
        text = [rng.randrange(3) for _ in range(rng.randint(1, 40))]
        shape = TreeShape(rng.randint(1, 12), rng.randint(0, 4), rng.randint(1, 5))
        tree = proposed(text, shape, rng.randint(1, 3))
        assert len(tree) <= shape.nodes
        assert max(tree.depths) <= shape.levels
        assert len(tree.children[0]) <= min(shape.top_k, OCCURRENCES)
        threes = set(zip(text, text[1:], text[2:], strict=False))
        for line in lines(tree) - {()}:
            context = [*text[-2:], *line]
            assert set(zip(context, context[1:], context[2:], strict=False)) <= threes, "each guess followed the two before it"
        proposals += len(tree) > 1
    assert proposals > 150


def test_a_long_text_is_found_like_a_short_one():
    rng = random.Random(1)
    text = [rng.randrange(50) for _ in range(2000)]
    assert lines(proposed([*text, *text[700:704]], TreeShape.chain(3))) == {tuple(text[704:707])}


@pytest.mark.parametrize("size", [1, 3, 7])
def test_it_is_the_same_whether_the_text_comes_whole_or_in_pieces(size):
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    drafter = LookupDrafter()
    drafter.reserve(1, 100)
    for start in range(0, len(text), size):
        drafter.observe(0, text[start : start + size], None)
    assert tree_of(drafter, text) == proposed(text)


def test_sequences_know_nothing_of_each_other_and_a_forgotten_one_knows_nothing():
    text = [1, 2, 3, 4, 1, 2]
    drafter = LookupDrafter()
    drafter.reserve(2, 100)
    drafter.observe(0, text, None)
    drafter.observe(1, [1, 2], None)
    requests = [TreeRequest(sequence, 2, 1, WIDE, Sampling(), None) for sequence in (0, 1)]
    trees = drafter.propose(requests)
    assert len(trees[0]) > 1 and trees[1] == Tree.root(2)
    drafter.forget(0)
    drafter.observe(0, [1, 2], None)
    assert drafter.propose(requests[:1]) == [Tree.root(2)]
    drafter.observe(1, text, None)
    drafter.reserve(2, 100)
    drafter.observe(1, [1, 2], None)
    assert drafter.propose(requests[1:]) == [Tree.root(2)]
