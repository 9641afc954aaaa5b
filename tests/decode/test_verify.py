"""The walk and EAGLE's accept/reject rule: the slow reference's, and on fixed trees one and the same law."""

from __future__ import annotations

import random

import torch

from eyas import reference
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted, accept_reject, walk
from tests.enumeration import depths_of, distance, law_of_accept_reject, law_of_walk, random_law, random_tree


def tree_of(tokens, parents) -> Tree:
    return Tree(tokens, parents, depths_of(parents), [0.0] * len(tokens))


def our_walk(tokens, parents, draws) -> Accepted:
    return walk(tree_of(tokens, parents), lambda row: draws[row])


def test_walk_is_the_references_walk():
    rng, lengths = random.Random(0), set()
    for _ in range(500):
        vocab = rng.randint(1, 4)
        tokens, parents = random_tree(rng, rng.randint(1, vocab + 6 if vocab > 1 else 4), vocab)
        draws = [rng.randrange(vocab + 1) for _ in tokens]
        ours = our_walk(tokens, parents, draws)
        assert ours == reference.walk(tokens, parents, draws)
        lengths.add(len(ours.path))
    assert {1, 2, 3, 4} <= lengths


def test_walk_draws_only_on_the_path():
    tree = tree_of([9, 4, 7, 4, 5], [-1, 0, 0, 2, 3])
    asked = []

    def draw(row: int) -> int:
        asked.append(row)
        return {0: 7, 2: 4, 3: 6}[row]

    assert walk(tree, draw) == Accepted([0, 2, 3], 6)
    assert asked == [0, 2, 3]


def test_accept_reject_is_the_references_given_the_same_uniforms():
    rng, lengths = random.Random(1), set()
    for seed in range(500):
        vocab = rng.randint(2, 5)
        tokens, parents = random_tree(rng, rng.randint(1, 9), vocab)
        law = torch.tensor(random_law(rng, len(tokens), vocab), dtype=torch.float64)
        one, other = random.Random(seed), random.Random(seed)
        ours = accept_reject(tree_of(tokens, parents), law.__getitem__, iter(one.random, None))
        assert ours == reference.accept_reject(tokens, parents, law, iter(other.random, None))
        assert one.random() == other.random(), "both took as many uniforms"
        lengths.add(len(ours.path))
    assert {1, 2, 3} <= lengths


def test_walk_has_exactly_the_law_of_accept_reject_on_a_hundred_fixed_trees():
    rng = random.Random(2)
    for _ in range(100):
        vocab = rng.randint(2, 4)
        tokens, parents = random_tree(rng, rng.randint(1, 5), vocab)
        law = random_law(rng, len(tokens), vocab)
        walked = law_of_walk(tokens, parents, law, our_walk)
        assert abs(sum(walked.values()) - 1) < 1e-12
        assert distance(walked, law_of_accept_reject(tokens, parents, law)) < 1e-12


def test_accept_reject_changes_no_law_it_is_handed():
    law = torch.tensor([[0.2, 0.3, 0.5]] * 3, dtype=torch.float64)
    accept_reject(tree_of([0, 1, 2], [-1, 0, 0]), law.__getitem__, iter([0.99, 0.99, 0.5]))
    assert law.tolist() == [[0.2, 0.3, 0.5]] * 3
