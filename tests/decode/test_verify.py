"""The walk and EAGLE's accept/reject rule: the slow reference's, and on fixed trees one and the same distribution."""

from __future__ import annotations

import random

import pytest
import torch

from eyas import reference
from eyas.config import EyasError, TreeShape
from eyas.decode.rules import Uniforms, accept_reject, block, traversal, typical, without_replacement
from eyas.decode.tree import StaticGrowth, Tree
from eyas.decode.verify import Accepted, walk
from tests.enumeration import (
    Script,
    depths_of,
    distance,
    distribution_of_accept_reject,
    distribution_of_walk,
    every_way,
    random_distribution,
    random_tree,
)


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
        distribution = torch.tensor(random_distribution(rng, len(tokens), vocab), dtype=torch.float64)
        one, other = random.Random(seed), random.Random(seed)
        ours = accept_reject(tree_of(tokens, parents), distribution.__getitem__, Uniforms(iter(one.random, None)))
        assert ours == reference.accept_reject(tokens, parents, distribution, iter(other.random, None))
        assert one.random() == other.random(), "both took as many uniforms"
        lengths.add(len(ours.path))
    assert {1, 2, 3} <= lengths


def test_walk_has_exactly_the_distribution_of_accept_reject_on_a_hundred_fixed_trees():
    rng = random.Random(2)
    for _ in range(100):
        vocab = rng.randint(2, 4)
        tokens, parents = random_tree(rng, rng.randint(1, 5), vocab)
        distribution = random_distribution(rng, len(tokens), vocab)
        walked = distribution_of_walk(tokens, parents, distribution, our_walk)
        assert abs(sum(walked.values()) - 1) < 1e-12
        assert distance(walked, distribution_of_accept_reject(tokens, parents, distribution)) < 1e-12


def test_accept_reject_changes_no_distribution_it_is_handed():
    distribution = torch.tensor([[0.2, 0.3, 0.5]] * 3, dtype=torch.float64)
    accept_reject(tree_of([0, 1, 2], [-1, 0, 0]), distribution.__getitem__, Uniforms(iter([0.99, 0.99, 0.5])))
    assert distribution.tolist() == [[0.2, 0.3, 0.5]] * 3


# ---- whole texts, by every way that the draft's draws and the verifier's can turn out ----

VOCAB = 3


class World:
    """A target and a draft of three tokens, with a distribution for every text; texts end at `length`."""

    def __init__(self, seed: int, length: int) -> None:
        self.rng, self.length = random.Random(seed), length
        self.target: dict[tuple[int, ...], torch.Tensor] = {}
        self.draft: dict[tuple[int, ...], torch.Tensor] = {}

    def distribution(self, which: dict[tuple[int, ...], torch.Tensor], text: tuple[int, ...]) -> torch.Tensor:
        if text not in which:
            which[text] = torch.tensor(random_distribution(self.rng, 1, VOCAB)[0], dtype=torch.float64)
        return which[text]

    def grown(self, counts: tuple[int, ...], chance: Script) -> Tree:
        """A tree of this shape whose children the draft draws without replacement."""
        growth, texts = StaticGrowth(0, counts), [()]
        frontier = [0]
        while frontier:
            distributions = [self.distribution(self.draft, texts[node]) for node in frontier]
            drawn = [draw_some(distribution, growth.room(node), chance) for distribution, node in zip(distributions, frontier)]
            growth.expand(frontier, drawn, [[0.0] * len(each) for each in drawn], distributions)
            texts += [(*texts[growth.parents[node]], growth.tokens[node]) for node in growth.newest]
            frontier = growth.frontier()
        return growth.tree(len(growth.tokens))

    def text(self, make_tree, verifier, chance: Script) -> tuple[int, ...]:
        """A round, and the target alone from there on."""
        tree = make_tree(chance)
        texts = [()]
        for row in range(1, len(tree)):
            texts.append((*texts[tree.parents[row]], tree.tokens[row]))
        path, bonus = verifier(tree, lambda row: self.distribution(self.target, texts[row]), chance)
        text = (*texts[path[-1]], bonus)[: self.length]
        while len(text) < self.length:
            text = (*text, chance.draws(self.distribution(self.target, text)))
        return text

    def alone(self, chance: Script) -> tuple[int, ...]:
        text = ()
        while len(text) < self.length:
            text = (*text, chance.draws(self.distribution(self.target, text)))
        return text


def draw_some(distribution: torch.Tensor, count: int, chance: Script) -> list[int]:
    left, drawn = distribution.clone(), []
    while len(drawn) < count and left.sum() > 0:
        drawn.append(chance.draws(left))
        left[drawn[-1]] = 0
    return drawn


@pytest.mark.parametrize("shape", ["chain:1", "chain:3", "static:2", "static:3.1", "static:2.1.1.1", "static:2.2"])
@pytest.mark.parametrize("verifier", [without_replacement, traversal], ids=["without-replacement", "traversal"])
def test_a_verifier_of_drawn_guesses_leaves_the_distribution_of_the_text_alone(verifier, shape):
    shape = TreeShape.parse(shape)
    for seed in range(4):
        world = World(seed, shape.levels + 1)
        ours = every_way(lambda chance, world=world: world.text(lambda c: world.grown(shape.fixed, c), verifier, chance))
        alone = every_way(world.alone)
        assert abs(sum(ours.values()) - 1) < 1e-12
        assert distance(ours, alone) < 1e-12


def expected_length(world: World, shape: str, verifier) -> float:
    lengths = every_way(lambda chance: (len(verifier(*parts(world, TreeShape.parse(shape).fixed, chance), chance).path),))
    return sum(length[0] * p for length, p in lengths.items())


def test_traversal_accepts_at_least_as_much_and_on_some_trees_more():
    gains = []
    for seed in range(6):
        world = World(seed, 4)  # one for both: its distributions are drawn as they are asked for
        for shape in ("chain:2", "chain:3", "static:2.1.1"):
            ours, others = (expected_length(world, shape, verifier) for verifier in (traversal, without_replacement))
            gains.append(ours - others)
    assert min(gains) > -1e-12 and max(gains) > 0.01


def test_block_verification_reads_chains_and_keeps_each_prefix_with_its_joint_ratio():
    """Sun et al., lemma 3: a prefix is kept with the chance min(1, that of the prefix one shorter times p / q)."""
    for seed in range(4):
        world = World(seed, 3)
        kept = every_way(lambda chance, world=world: (len(block(*parts(world, (1, 1), chance), chance).path) - 1,))
        common = [0.0, 0.0]
        for first in range(VOCAB):
            p1, q1 = (float(world.distribution(which, ())[first]) for which in (world.target, world.draft))
            common[0] += min(p1, q1)
            for second in range(VOCAB):
                p2, q2 = (float(world.distribution(which, (first,))[second]) if p1 * q1 else 0.0 for which in (world.target, world.draft))
                common[1] += min(min(p1, q1) * p2, q1 * q2)
        assert kept.get((2,), 0.0) == pytest.approx(common[1])
        assert kept.get((1,), 0.0) + kept.get((2,), 0.0) == pytest.approx(common[0])
    with pytest.raises(EyasError, match="block reads chains"):
        block(Tree([0, 1, 2], [-1, 0, 0], [0, 1, 1], [0.0] * 3, [None] * 3), None, None)


def test_typical_acceptance_keeps_the_longest_path_of_guesses_likely_enough_for_how_unsure_the_target_is():
    sure, unsure = torch.tensor([0.02, 0.9, 0.08]).double(), torch.full((3,), 1 / 3).double()
    tree = tree_of([9, 1, 0, 2, 2, 1], [-1, 0, 0, 1, 2, 3])
    distributions = {0: sure, 1: unsure, 2: sure, 3: sure, 5: unsure}
    uniforms = Uniforms(iter([0.5]))
    assert typical(tree, distributions.__getitem__, uniforms) == Accepted([0, 1, 3, 5], 1), "2 after 1 is as likely as any"
    assert typical(tree_of([9, 0], [-1, 0]), distributions.__getitem__, Uniforms(iter([0.5]))) == Accepted([0], 1), "0.02 is too little"


def even(count: int, first: float) -> torch.Tensor:
    """A distribution of `count` tokens: the first has this chance, the others share the rest."""
    return torch.tensor([first, *[(1 - first) / (count - 1)] * (count - 1)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("distribution", "taken"),
    [
        (even(3, 0.1), True),  # a sure target: 0.09 decides, though 0.3 exp(-entropy) is above a tenth
        (even(3, 0.08), False),
        (even(40, 0.02), True),  # an unsure one: exp(-entropy) is about 1/40, and 0.3 of it decides
        (even(40, 0.005), False),
    ],
)
def test_a_guess_is_typical_above_the_less_of_a_fixed_chance_and_a_share_of_what_an_even_distribution_would_give(distribution, taken):
    accepted = typical(tree_of([9, 0], [-1, 0]), {0: distribution, 1: distribution}.__getitem__, Uniforms(iter([0.5])))
    assert accepted.path == ([0, 1] if taken else [0])


def test_a_typical_guess_behind_one_that_is_not_is_lost():
    distribution = even(3, 0.02)
    tree = tree_of([9, 0, 1, 1], [-1, 0, 1, 2])
    assert typical(tree, lambda row: distribution, Uniforms(iter([0.5]))).path == [0]


def test_of_typical_paths_as_long_the_first_is_kept():
    distribution = torch.full((3,), 1 / 3).double()
    tree = tree_of([9, 0, 1, 2, 0, 0], [-1, 0, 0, 0, 1, 2])
    assert typical(tree, lambda row: distribution, Uniforms(iter([0.5]))).path == [0, 1, 4]


def test_a_number_on_the_border_of_two_tokens_draws_the_second():
    """As intervals that begin with their border: so no number draws a token without weight."""
    weights = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5], dtype=torch.float64)
    assert [Uniforms(iter([number])).draws(weights) for number in (0.0, 0.2, 0.25, 0.4, 0.5, 0.75, 0.999)] == [1, 1, 3, 3, 4, 4, 4]
    assert Uniforms(iter([1 - 2**-53])).draws(torch.tensor([0.5, 0.5])) == 1, "in float32 this number is 1"


class Refusing:
    """Chance that accepts nothing and draws the likeliest."""

    def accepts(self, probability: float) -> bool:
        return False

    def draws(self, weights: torch.Tensor) -> int:
        assert float(weights.sum()) == pytest.approx(1), "what is left to draw from is a distribution"
        return int(weights.argmax())


@pytest.mark.parametrize("verifier", [without_replacement, traversal])
def test_where_rounding_refuses_a_guess_that_was_sure_the_targets_distribution_is_left(verifier):
    distribution = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    tree = Tree([9, 0], [-1, 0], [0, 1], [0.0, 0.0], [distribution, None])
    assert verifier(tree, {0: distribution, 1: distribution}.__getitem__, Refusing()) == Accepted([0], 1)


def test_it_accepts_more_than_a_guess_that_ignores_q_and_all_where_the_draft_is_the_target():
    rejected = 0.0
    for seed in range(4):
        world = World(seed, 3)
        world.draft = world.target
        lengths = every_way(lambda chance, world=world: (len(without_replacement(*parts(world, (1, 1), chance), chance).path),))
        assert {length: p for length, p in lengths.items() if p > 1e-12} == {(3,): pytest.approx(1)}
        lengths = every_way(lambda chance, world=world: (len(accept_reject(*parts(world, (1, 1), chance), chance).path),))
        rejected += lengths.get((1,), 0.0)
    assert rejected > 0.5, "of four times, as often as p(x) is less than one"


def parts(world: World, counts: tuple[int, ...], chance: Script):
    tree = world.grown(counts, chance)
    texts = [()]
    for row in range(1, len(tree)):
        texts.append((*texts[tree.parents[row]], tree.tokens[row]))
    return tree, lambda row: world.distribution(world.target, texts[row])


def test_on_guesses_that_were_kept_for_being_likely_it_would_change_the_distribution():
    """Why a reranked tree is refused: of two drawn children the likelier is kept, as if it had been the first draw."""

    def reranked(world: World, chance: Script) -> Tree:
        q = world.distribution(world.draft, ())
        token = max(draw_some(q, 2, chance), key=lambda token: float(q[token]))
        return Tree([0, token], [-1, 0], [0, 1], [0.0, 0.0], [q, None])

    worst = 0.0
    for seed in range(4):
        world = World(seed, 2)
        biased = every_way(lambda chance, world=world: world.text(lambda c: reranked(world, c), without_replacement, chance))
        worst = max(worst, distance(biased, every_way(world.alone)))
    assert worst > 0.01


def test_guesses_that_were_chosen_are_refused_where_a_verifier_divides_by_q():
    distribution = torch.tensor([[0.2, 0.3, 0.5]] * 3, dtype=torch.float64)
    chosen, drawn = tree_of([0, 1, 2], [-1, 0, 0]), Tree([0, 1, 2], [-1, 0, 0], [0, 1, 1], [0.0] * 3, [distribution[0], None, None])
    for tree in (chosen, drawn.keep([0, 1]), drawn.best(2)):
        with pytest.raises(EyasError, match="needs a draft that draws its guesses"):
            without_replacement(tree, distribution.__getitem__, Uniforms(iter([0.5] * 3)))
        with pytest.raises(EyasError, match="verifier traversal needs a draft that draws its guesses"):
            traversal(tree, distribution.__getitem__, Uniforms(iter([0.5] * 3)))
    assert without_replacement(drawn, distribution.__getitem__, Uniforms(iter([0.5] * 3))).path == [0, 1]
    assert without_replacement(Tree.root(0), distribution.__getitem__, Uniforms(iter([0.1]))) == Accepted([0], 0), (
        "no guess, nothing to refuse"
    )
