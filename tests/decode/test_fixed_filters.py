"""Filters by tensors leave what the plain filters leave, and draw what these draw."""

from __future__ import annotations

import random

import pytest
import torch

from eyas.config import Sampling
from eyas.decode.fixed import Drawn, log_scores
from eyas.decode.fixed_filters import Filters, filtered, law_of
from eyas.decode.fixed_round import drawn
from eyas.decode.sampling import allowed, draw, gumbel
from eyas.decode.score import loosely_filtered
from eyas.decode.tree import IMPOSSIBLE

V = 37


def settings(seed):
    pick = random.Random(seed)
    top_k, top_p, min_p = pick.choice([0, 1, 2, 3, 8, 36, 50]), pick.choice([1.0, 0.99, 0.9, 0.4]), pick.choice([0.0, 0.01, 0.2])
    return Sampling(pick.uniform(0.3, 2), top_k, top_p, min_p)


def logits_of(seed, dtype=torch.float32):
    """Rows with and without equal scores."""
    rows = 2 * torch.randn(6, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    rows[3:] = rows[3:].round()
    return rows


@pytest.mark.parametrize("seed", range(60))
def test_rows_keep_the_tokens_that_the_plain_filters_leave(seed):
    sampling, scores = settings(seed), logits_of(seed).double() / settings(seed).temperature
    kept = filtered(scores, Filters.of(sampling), law_of(sampling)) > IMPOSSIBLE
    for row, its_scores in zip(kept, scores):
        ids = allowed(its_scores, sampling)
        assert row.nonzero()[:, 0].tolist() == (list(range(V)) if ids is None else ids.tolist())


@pytest.mark.parametrize("seed", range(60))
def test_draws_are_the_plain_draws(seed):
    sampling, logits, noise = settings(seed), logits_of(seed), torch.stack([gumbel(seed, position, V) for position in range(6)])
    found = drawn(logits, Filters.of(sampling), law_of(sampling), noise)
    assert found.tolist() == [draw(row, sampling, its) for row, its in zip(logits, noise)]


@pytest.mark.parametrize("seed", range(60))
def test_a_draft_rules_out_what_it_rules_out_in_plain_growth(seed):
    sampling, logits = settings(seed), logits_of(seed)
    wanted = loosely_filtered(logits / sampling.temperature, sampling).log_softmax(-1)
    found = log_scores(logits, Drawn(True, False, Filters.of(sampling)), law_of(sampling), None)
    assert torch.allclose(found.float(), wanted, atol=1e-6, rtol=0)


def test_numbers_may_change_without_another_graph():
    assert {Filters.of(Sampling(1.0, top_k=k, top_p=p)) for k in (33, 50, 64) for p in (0.3, 0.9)} == {Filters(64, True)}
    assert Filters.of(Sampling()) == Filters.of(Sampling(0.0, top_k=5)) == Filters() and not any(Filters())
