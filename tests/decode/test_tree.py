"""The tree keeps its rules: what the constructor refuses, how growth counts, what `best` and `merge` leave, who sees whom."""

from __future__ import annotations

import random

import pytest
import torch

from eyas import reference
from eyas.config import PLAIN, EyasError, TreeShape
from eyas.decode.tree import Growth, StaticGrowth, Tree, merge
from eyas.model import mask
from tests.enumeration import depths_of, random_parents, random_tree


def scored_tree(rng: random.Random, size: int, vocab: int = 4) -> Tree:
    """Random scores in which a child never beats its parent; some are equal."""
    tokens, parents = random_tree(rng, size, vocab)
    scores = [0.0]
    for parent in parents[1:]:
        scores.append(scores[parent] - rng.choice([0.0, 0.5, rng.random()]))
    return Tree(tokens, parents, depths_of(parents), scores)


def paths(tree: Tree) -> dict[tuple[int, ...], float]:
    """Every node as the tokens that lead to it, with its score."""
    lines: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents):
        lines.append((*(lines[parent] if parent >= 0 else ()), token))
    return dict(zip(lines, tree.scores))


def ancestors(parents: list[int], row: int) -> set[int]:
    """The row and all above it."""
    line = set()
    while row >= 0:
        line.add(row)
        row = parents[row]
    return line


# ---- the constructor ----


@pytest.mark.parametrize(
    ("tokens", "parents", "depths", "words"),
    [
        ([1, 5, 5], [-1, 0, 0], [0, 1, 1], "equal siblings"),
        ([1, 5, 6], [-1, 2, 0], [0, 2, 1], "parents come before children"),
        ([1, 5], [-1, 1], [0, 1], "parents come before children"),
        ([1, 5], [-1, -1], [0, 0], "parents come before children"),
        ([1, 5, 6], [-1, 0, 1], [0, 1, 1], "one deeper than its parent"),
        ([1, 5], [-1, 0], [1, 2], "row 0 is the root"),
        ([1, 5], [0, 0], [0, 1], "row 0 is the root"),
    ],
)
def test_a_tree_that_breaks_a_rule_is_refused(tokens, parents, depths, words):
    with pytest.raises(AssertionError, match=words):
        Tree(tokens, parents, depths, [0.0] * len(tokens))


def test_cousins_may_be_equal():
    assert len(Tree([1, 5, 6, 7, 7], [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0.0] * 5)) == 5


def test_a_chain_and_a_root_are_trees():
    assert Tree.chain(3, [4, 5], [-1.0, -2.0]) == Tree([3, 4, 5], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -2.0])
    assert Tree.root(3) == Tree([3], [-1], [0], [0.0])


# ---- growth ----


def grown(rng: random.Random, shape: TreeShape, vocab: int = 40) -> Growth:
    growth = Growth(7, shape.top_k)
    for _ in range(shape.depth + 1):
        frontier = growth.frontier()
        tokens = [rng.sample(range(vocab), shape.top_k) for _ in frontier]
        growth.expand(frontier, tokens, [sorted((-5 * rng.random() for _ in range(shape.top_k)), reverse=True) for _ in frontier])
    return growth


def test_a_root_alone_is_drawn_and_a_tree_is_where_it_says_from_what():
    assert Tree.root(7).drawn and not Tree([7, 5], [-1, 0], [0, 1], [0.0, -1.0]).drawn
    assert Tree([7, 5], [-1, 0], [0, 1], [0.0, -1.0], distributions=[torch.ones(9) / 9, None]).drawn


def test_60x7x10_expands_ten_nodes_a_level_and_drafts_59_on_at_most_8_levels():
    shape = TreeShape.parse("60x7x10")
    for seed in range(5):
        growth = grown(random.Random(seed), shape)
        assert len(growth.tokens) == 1 + 10 + 7 * 100
        assert len(growth.expanded) == 1 + 7 * 10
        tree = growth.tree(shape.nodes)
        assert len(tree) - 1 == 59
        assert max(tree.depths) <= shape.levels == 8


def test_a_level_expands_its_best_and_ties_go_to_the_earlier_made():
    growth = Growth(0, 2)
    growth.expand([0], [[5, 6, 7]], [[-1.0, -1.0, -1.0]])
    assert growth.frontier() == [1, 2]
    growth.expand([1, 2], [[1, 2], [3, 4]], [[-3.0, -3.0], [-1.0, -2.0]])
    assert growth.frontier() == [6, 7]


def test_impossible_children_are_not_made():
    growth = Growth(0, 3)
    growth.expand([0], [[5, 6, 7]], [[-1.0, float("-inf"), float("-inf")]])
    assert growth.tree(60).tokens == [0, 5]
    growth.expand([1], [[5]], [[float("-inf")]])
    assert growth.frontier() == []


def test_sight_is_being_an_ancestor():
    for seed in range(5):
        rng = random.Random(seed)
        growth = grown(rng, TreeShape(30, seed, 1 + seed))
        frontier = growth.frontier()
        columns = (growth.expanded + frontier)[1:]
        assert growth.seen(frontier) == [
            [place for place, column in enumerate(columns) if column in ancestors(growth.parents, node)] for node in frontier
        ]


def test_best_keeps_parents_and_the_best_scores():
    rng = random.Random(3)
    for _ in range(200):
        tree = scored_tree(rng, rng.randint(1, 25))
        nodes = rng.randint(1, 25)
        kept = tree.best(nodes)  # its constructor refuses an orphan
        assert len(kept) == min(nodes, len(tree))
        assert paths(kept).items() <= paths(tree).items()
        assert sorted(kept.scores) == sorted(tree.scores)[-nodes:]


def test_what_a_tree_was_cut_out_of_is_known():
    """However often it is cut, and behind a merge too; equal trees stay equal."""
    tree = Tree([0, 5, 6, 7, 8], [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0.0, -1.0, -2.0, -1.5, -3.0])
    kept = tree.best(4).best(3)
    assert tree.cut() == [] and kept.grown is tree and kept.cut() == [2, 4]
    assert kept == Tree([0, 5, 7], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -1.5])
    merged = merge([kept, Tree.chain(0, [6], [-2.5])])
    assert merged.grown is tree and merged.cut() == [4]


def test_best_breaks_ties_by_order():
    tree = Tree([0, 5, 6, 7], [-1, 0, 0, 0], [0, 1, 1, 1], [0.0, -2.0, -1.0, -2.0])
    assert tree.best(3) == Tree([0, 5, 6], [-1, 0, 0], [0, 1, 1], [0.0, -2.0, -1.0])


# ---- static trees ----


def test_a_static_shape_names_each_nodes_children_breadth_first():
    shape = TreeShape.parse("static:3.2.0.1.0.1.0.0")
    assert (shape.nodes, shape.levels, shape.top_k, shape.fixed) == (8, 3, 3, (3, 2, 0, 1, 0, 1))
    assert str(shape) == "static:3.2.0.1.0.1" and TreeShape.parse(str(shape)) == shape
    assert [str(shape.cut(levels)) for levels in (9, 3, 2, 1)] == [str(shape), str(shape), "static:3.2.0.1", "static:3"]
    assert shape.cut(0) == PLAIN == TreeShape.static([0, 0])
    assert TreeShape.chain(3).fixed == (1, 1, 1) == TreeShape.parse("static:1.1.1").fixed
    assert TreeShape.parse("60x7x10").fixed == () == PLAIN.fixed


@pytest.mark.parametrize("text", ["static:", "static:0", "static:2.x", "static:2..1", "static:1.1.0.1"])
def test_a_static_shape_that_is_none_is_refused(text):
    with pytest.raises(EyasError, match=r"not understood|names more nodes than it has: 4 counts, 3 nodes"):
        TreeShape.parse(text)


def test_a_static_growth_fills_the_shape_whatever_the_scores():
    growth = StaticGrowth(9, TreeShape.parse("static:3.2.0.1.0.1").fixed)
    growth.expand([0], [[5, 6, 7]], [[-3.0, -2.0, -1.0]])
    assert growth.frontier() == [1, 3], "the second child has none"
    growth.expand([1, 3], [[1, 2, 3], [4, 5, 6]], [[-1.0] * 3] * 2)
    assert growth.frontier() == [5]
    growth.expand([5], [[8, 9, 1]], [[-1.0] * 3])
    assert growth.frontier() == []
    tree = growth.tree(60)
    assert (tree.tokens, tree.parents) == ([9, 5, 6, 7, 1, 2, 4, 8], [-1, 0, 0, 0, 1, 1, 3, 5])
    assert not tree.drawn


def test_a_place_that_no_child_took_has_no_children():
    growth = StaticGrowth(9, TreeShape.parse("static:2.1.1").fixed)
    growth.expand([0], [[5, 6]], [[-1.0, float("-inf")]], [torch.tensor([1.0])])
    assert growth.frontier() == [1]
    growth.expand([1], [[7, 8]], [[-1.0, -1.0]], [torch.tensor([1.0])])
    tree = growth.tree(60)
    assert tree.tokens == [9, 5, 7] and tree.drawn
    assert not tree.keep([0, 1]).drawn, "what is left of it was chosen"


# ---- merge ----


def test_merged_paths_are_the_union_and_the_larger_score_stays():
    rng = random.Random(4)
    for _ in range(200):
        trees = [scored_tree(rng, rng.randint(1, 15)) for _ in range(rng.randint(1, 4))]
        expected: dict[tuple[int, ...], float] = {}
        for tree in trees:
            for path, score in paths(tree).items():
                expected[path] = max(score, expected.get(path, float("-inf")))
        merged = merge(trees)
        assert paths(merged) == expected
        assert all(merged.scores[row] <= merged.scores[merged.parents[row]] for row in range(1, len(merged)))
        assert paths(merge(trees[::-1])) == expected, "the order of the trees does not matter"
        assert merge([merged, merged]) == merged
        assert paths(merge([merge(trees[:1]), merge(trees)])) == expected


def test_merge_refuses_other_roots():
    with pytest.raises(AssertionError, match="share their root"):
        merge([Tree.root(1), Tree.root(2)])


# ---- who sees whom ----


def test_ancestor_mask_is_being_an_ancestor_and_the_references_mask():
    rng = random.Random(5)
    for _ in range(200):
        parents = random_parents(rng, rng.randint(1, 30))
        seen = mask.ancestor_mask(parents)
        assert mask.ancestor_sight(parents).seen == [row.nonzero()[:, 0].tolist() for row in seen]
        assert torch.equal(seen, reference.ancestor_mask(parents))
        assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == [ancestors(parents, row) for row in range(len(parents))]
    assert torch.equal(mask.ancestor_mask(list(range(-1, 9))), mask.causal_mask(10))


def test_rows_in_front_are_seen_by_all():
    own = torch.tensor([[True, False], [True, True]])
    assert mask.behind_prefix(own, 3).tolist() == [[True, True, True, True, False], [True] * 5]
