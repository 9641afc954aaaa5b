"""A node's score is the log of the chance that the target draws it, given the noise."""

from __future__ import annotations

import pytest
import torch

from eyas.config import Sampling
from eyas.decode.score import best_children, log_scores

LOGITS = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
NOISE = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_greedy_scores_are_the_drafts_log_probabilities():
    torch.testing.assert_close(log_scores(LOGITS, Sampling(), None), LOGITS.log_softmax(-1))


def test_with_noise_the_score_is_softmax_of_log_q_plus_noise():
    expected = ((LOGITS / 0.7).log_softmax(-1) + NOISE).log_softmax(-1)
    torch.testing.assert_close(log_scores(LOGITS, Sampling(0.7), NOISE), expected)


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.2)], ids=str)
def test_filters_are_loosened_but_rule_tokens_out(sampling):
    from eyas.decode.sampling import allowed

    scores = log_scores(LOGITS, sampling, NOISE)
    for row, score in zip(LOGITS, scores):
        kept = set((score > float("-inf")).nonzero()[:, 0].tolist())
        assert set(allowed(row, sampling).tolist()) < kept  # what the target's own filters would leave of this law, and a margin
        assert len(kept) < len(row)


def test_best_children_are_sorted_and_ties_go_to_the_lower_id():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    values, ids = best_children(scores, 4)
    assert ids[0].tolist() == [1, 3, 2, 4]
    assert values[0].tolist() == [2.0, 2.0, 1.0, 1.0]
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert best_children(scores, 1)[1].tolist() == [[1], [0]]
