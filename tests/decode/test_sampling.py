"""Noise and the target's distribution: known answers, streams that never meet, transformers' filters, and draws that follow it."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from eyas.config import Sampling
from eyas.decode import sampling as S
from eyas.decode.philox import CHOICE, DERIVE, GUESS, GUMBEL
from eyas.decode.sampling import (
    NOISE_VERSION,
    Noise,
    allowed,
    derived_seed,
    distribution,
    draw,
    nucleus,
    philox_words,
    uniforms,
)
from tests.enumeration import surprise


def random_logits(seed: int, size: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- noise ----

KNOWN = {  # (seed, position) -> words, first Gumbel values; a change here is a new NOISE_VERSION, since every text changes
    (0, 0): (
        [213000021201967259, 4455796210202625458, 2055444239878205049, 10411612076246414556],
        [-1.49545161157695, -0.3511371183614868, -0.7859067841514997, 0.5586754626449686],
    ),
    (20240229, 1_000_003): (
        [11453608472773838413, 8801018583410636970, 17272851484779598951, 12080755007951377759],
        [0.7411132769886418, 0.30107749986330196, 2.7218668420515177, 0.8597351048901307],
    ),
}


@pytest.mark.parametrize("key", KNOWN, ids=str)
def test_noise_version_1_is_these_words_and_values(key):
    words, gumbels = KNOWN[key]
    assert NOISE_VERSION == 1
    assert philox_words(*key, 4).tolist() == words
    assert np.abs(Noise(key[0], 4).at(key[1]).numpy() - gumbels).max() < 1e-15


def test_derived_seeds_are_known_and_differ():
    assert [derived_seed(0, 0), derived_seed(20240229, 1_000_003)] == [8003247762981128062, 1229635496946409376]
    seeds = {derived_seed(seed, index) for seed in range(20) for index in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**11, 2**12 - 1])
def test_uniforms_never_reach_0_or_1(monkeypatch, word):
    monkeypatch.setattr(S, "philox_words", lambda seed, position, count, *stream: np.full(count, word, dtype=np.uint64))
    u = uniforms(0, 0, 3)
    assert (u > 0).all() and (u < 1).all()
    assert bool(Noise(0, 3).at(0).isfinite().all())


def test_streams_of_other_seeds_positions_purposes_and_nodes_never_meet():
    seeds, positions, purposes = [0, 1, 2, 2**32, 2**63], [0, 1, 2, 2**32], [GUMBEL, CHOICE, DERIVE, GUESS]
    keys = list(itertools.product(seeds, positions, purposes, [0, 1, 60]))
    words = [word for seed, position, purpose, node in keys for word in philox_words(seed, position, 50, purpose, node).tolist()]
    assert len(set(words)) == len(keys) * 50


def test_noise_is_forgotten_before_a_position_and_not_at_it(monkeypatch):
    noise, made = Noise(5, 7), []
    real = S.gumbel
    monkeypatch.setattr(S, "gumbel", lambda *key: made.append(key[1]) or real(*key))
    for position in (3, 4, 5):
        noise.at(position)
    noise.forget_before(4)
    for position in (3, 4, 5):
        noise.at(position)
    assert made == [3, 4, 5, 3]


@pytest.mark.parametrize("seed", [0, 2**63 + 9])
def test_noise_made_by_tensors_is_the_noise(seed, monkeypatch):
    """As a GPU makes it, some positions at a time."""
    monkeypatch.setattr(Noise, "made", Noise.made_by_tensors)
    found = Noise(seed, 50)
    for position in (9, 7, 8, 31, 2**40):
        assert torch.allclose(found.at(position), S.gumbel(seed, position, 50), rtol=1e-14, atol=1e-14)
    assert set(found._held) == {*range(7, 13), *range(31, 35), *range(2**40, 2**40 + 4)}


def test_noise_of_a_position_is_the_same_in_any_order_and_after_forgetting():
    one, other = Noise(3, 20), Noise(3, 20)
    later, earlier = one.at(9).clone(), one.at(4).clone()
    assert torch.equal(other.at(4), earlier)
    one.forget_before(9)
    assert torch.equal(one.at(4), earlier)
    assert torch.equal(one.at(9), later)
    assert torch.equal(Noise(3, 7).at(4), earlier[:7]), "a larger vocabulary goes on where a smaller one ends"


# ---- draws ----

SIZE, DRAWS = 12, 6_000
SAMPLINGS = [
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.3, top_k=5),
    Sampling(1.0, top_p=0.8),
    Sampling(1.5, min_p=0.1),
    Sampling(1.2, 8, 0.9, 0.05),
]


@cache
def much_noise() -> list[torch.Tensor]:
    """As decoding would draw: many seeds, some positions each."""
    return [noise.at(position) for seed in range(DRAWS // 20) for noise in [Noise(seed, SIZE)] for position in range(20)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_distribution(sampling):
    logits = random_logits(1, SIZE, 1.5)
    seen = Counter(draw(logits, sampling, noise) for noise in much_noise())
    assert surprise(seen, dict(enumerate(distribution(logits, sampling).tolist()))) < 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_token_keeps_its_own_noise_whatever_the_filters_leave(sampling):
    """So a draft that knows the noise of a position knows it for every token, before it knows which the target allows."""
    for seed in range(40):
        logits, noise = random_logits(seed, SIZE, 1.5), Noise(seed, SIZE).at(7)
        scores = (distribution(logits, sampling).log() + noise).tolist()
        assert draw(logits, sampling, noise) == max(range(SIZE), key=scores.__getitem__)


def test_greedy_ties_go_to_the_lowest_id():
    for seed, kind in itertools.product(range(10), [torch.float32, torch.float64]):
        logits = torch.randn(5003, generator=torch.Generator().manual_seed(seed)).to(kind)
        best = (torch.randperm(5003, generator=torch.Generator().manual_seed(seed))[:3]).sort().values
        logits[best] = 9.0
        assert draw(logits, Sampling(), None) == best[0]
        assert distribution(logits, Sampling()).argmax() == best[0]
    assert distribution(torch.tensor([0.0, 4.0, 4.0]), Sampling()).tolist() == [0.0, 1.0, 0.0]


# ---- filters ----

GRID = [
    Sampling(temperature, top_k, top_p, min_p)
    for temperature, top_k, top_p, min_p in itertools.product([0.5, 1.0, 1.7], [0, 1, 7, 200], [1.0, 0.9, 0.3], [0.0, 0.02, 0.3])
]


def transformers_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The chain that `generate` builds, in its order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    chain = [TemperatureLogitsWarper(sampling.temperature)]
    chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    chain += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = logits[None]
    for step in chain:
        scores = step(None, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_distribution_is_transformers_chain_of_filters(spread):
    supports = set()
    for number, sampling in enumerate(GRID):
        logits = random_logits(number, 60, spread)
        ours = distribution(logits, sampling)
        assert torch.allclose(ours, transformers_distribution(logits, sampling), rtol=1e-12, atol=1e-15), sampling
        supports.add(int((ours > 0).sum()))
    assert len(supports) > 10, "the grid must filter in many ways"


def test_ties_at_a_filters_boundary_go_to_the_lower_ids():
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    kept = {k: distribution(logits, Sampling(1.0, top_k=k)).nonzero()[:, 0].tolist() for k in range(1, 6)}
    assert [allowed(logits, Sampling(1.0, top_k=k)).tolist() for k in kept] == list(kept.values()), "ids ascend"
    assert kept == {1: [1], 2: [1, 3], 3: [0, 1, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4]}
    even = torch.zeros(8, dtype=torch.float64)
    assert distribution(even, Sampling(1.0, top_p=0.3)).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert distribution(even, Sampling(1.0, top_p=0.25)).nonzero()[:, 0].tolist() == [0, 1], "two hold a quarter: a third is not wanted"
    assert distribution(even, Sampling(1.0, min_p=1.0)).count_nonzero() == 8


def test_nucleus_of_the_likely_is_the_nucleus_of_all():
    shortcuts = 0
    for seed, top_p, spread in itertools.product(range(20), [0.3, 0.9, 0.99], [0.1, 2.0, 5.0]):
        scores = random_logits(seed, 3000, spread)
        probabilities = scores.softmax(0)
        shortcuts += bool(probabilities[probabilities >= 1e-4].sum() >= top_p) and bool((probabilities < 1e-4).any())
        ranked = probabilities.sort(descending=True, stable=True)
        mass, expected = 0.0, []
        for probability, token in zip(ranked.values.tolist(), ranked.indices.tolist()):
            if mass >= top_p:
                break
            expected.append(token)
            mass += probability
        assert nucleus(scores, None, top_p).tolist() == sorted(expected)
    assert 20 < shortcuts < 160, "both ways must have been gone"
