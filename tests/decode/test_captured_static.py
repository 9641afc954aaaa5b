"""Static trees and Medusa's heads are parts of a round's graph, which commits what the plain round commits, tree for tree."""

from __future__ import annotations

import random

import pytest
import torch

from eyas.config import Request, Sampling, TreeShape
from eyas.decode.fixed import grow_fixed, tree_of
from eyas.decode.generate import Decoder
from eyas.decode.sequence import new_sequence
from eyas.decode.tree import StaticGrowth
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.medusa import USUAL_TREE
from eyas.methods import METHODS
from eyas.model.cache import Pool
from tests.decode.test_captured_batches import served, told
from tests.decode.test_captured_round import FILTERED, V, rounds, short_windows
from tests.tiny import tiny_target
from tests.tiny_family import tiny_network

_ = rounds, short_windows  # fixtures

CASES = [
    ("static:3.2.0.1", Sampling()),
    (USUAL_TREE, Sampling(0.8)),
    ("static:2.0.3.1.1.1", FILTERED),
    ("chain:3", Sampling(0.8)),
    ("12x3x3", Sampling()),
    ("12x3x3", Sampling(1.3)),
]


def pair(method, pooled):
    target = tiny_target(prepare=False, vocab_size=V)
    network, vocab = tiny_network(method, target, size=V - 1)
    network.prepare()
    target.prepare()
    target.pool, network.pool = (Pool(), Pool()) if pooled else (None, None)
    return target, METHODS[method].decoding().drafter(network, vocab)


def watched(method, pooled, shape, sampling, count, copy=False):
    target, drafter = pair(method, pooled)
    decoder, records = Decoder(target, CopyingDrafter(drafter) if copy else drafter), []
    decoder.watch = records.append
    asked, shape = [Request(sampling=sampling, max_new_tokens=16 - 4 * row) for row in range(count)], TreeShape.parse(shape)
    everyone = [new_sequence([row, 2, 3, 4 + row], each, shape, row, target.config) for row, each in enumerate(asked)]
    list(decoder.run_all(everyone))
    return told(everyone), records


@pytest.mark.parametrize(("shape", "sampling"), CASES)
@pytest.mark.parametrize("method", ["medusa", "eagle1", "mtp"])
def test_trees_paths_and_texts_are_the_plain_rounds(method, shape, sampling, rounds):
    """Of one sequence and of three, to their ends."""
    for count in (1, 3):
        (wanted, plain), (found, graphs) = (watched(method, pooled, shape, sampling, count) for pooled in (False, True))
        assert found == wanted and count in served(rounds) and rounds.count(None) <= 1
        for ours, theirs in zip(graphs, plain, strict=True):
            assert (ours.tree.tokens, ours.tree.parents, ours.tree.depths) == (theirs.tree.tokens, theirs.tree.parents, theirs.tree.depths)
            assert ours.accepted == theirs.accepted and (ours.logits - theirs.logits).abs().max() < 1e-9
        rounds.clear()


def test_a_texts_end_needs_no_other_graph(rounds):
    target, drafter = pair("eagle1", True)
    list(Decoder(target, drafter).run([[1, 2, 3]], TreeShape.parse("static:3.2.0.1.1"), Sampling(0.8), [5], 12))
    assert {key[1].guesses.shape for key in drafter.cache.slabs.graphs if key[0] == "round"} == {TreeShape.parse("static:3.2.0.1.1")}
    assert any(rounds)


@pytest.mark.parametrize("shape", [USUAL_TREE, "12x3x3"])
def test_copied_guesses_go_beside_those_of_heads(shape, rounds):
    """The copy law is not weighed against the heads', so trees are not the plain round's; the text is."""
    found, wanted = (watched("medusa", pooled, shape, Sampling(0.7), 2, copy=True)[0] for pooled in (True, False))
    assert [text for text, _, _ in found] == [text for text, _, _ in wanted] and served(rounds) >= {2}


@pytest.mark.parametrize("seed", range(20))
def test_places_are_the_static_growths(seed):
    """Scores drawn at random, some candidates impossible; two trees, of which one has room for two levels alone."""
    draw = random.Random(seed)
    counts = [draw.randrange(4) for _ in range(9)]
    counts[0] += 1
    made, kept = 1, []
    for row, count in enumerate(counts):
        kept.append(count if row < made else 0)
        made += kept[-1]
    shape, generator = TreeShape.static(kept), torch.Generator().manual_seed(seed)
    levels = [torch.randn(2, 40, 5, generator=generator).double().log_softmax(-1) for _ in range(shape.levels)]
    levels[-1][:, ::3, 1] = -torch.inf
    growths, given = [StaticGrowth(7, kept) for _ in range(2)], []

    def read(level, tokens, rows):
        given.append(rows)
        return levels[level][:, : tokens.shape[1]]

    found = grow_fixed(shape, torch.tensor([[9], [2]]), levels[0][:, :1], read, torch.arange(5) + 10)
    for which, growth in enumerate(growths):
        for level in range(shape.levels if which == 0 else min(2, shape.levels)):
            frontier = growth.frontier() if level else [0]
            best = [torch.sort(levels[level][which, place], descending=True) for place in range(len(frontier))]
            growth.expand(frontier, [(each.indices[: shape.top_k] + 10).tolist() for each in best], [each.values.tolist() for each in best])
        tree, wanted = tree_of(7, found[which])[0], growth.tree(99)
        assert (tree.tokens, tree.parents, tree.depths) == (wanted.tokens, wanted.parents, wanted.depths)
        assert tree.scores == pytest.approx(wanted.scores)
