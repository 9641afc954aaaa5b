"""A node's score is the log of the chance that the target draws it, given the noise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from eyas.config import Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.philox import GUESS
from eyas.decode.sampling import Noise, gumbel
from eyas.decode.score import best_children, children, log_scores
from eyas.model.vocab import DraftVocab
from tests.enumeration import surprise

LOGITS = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
SAMPLED = Sampling(1.0)
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
        assert set(allowed(row, sampling).tolist()) < kept  # what the target's own filters would leave of this distribution, and a margin
        assert len(kept) < len(row)


def test_best_children_are_sorted_and_ties_go_to_the_lower_id():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    values, ids = best_children(scores, 4)
    assert ids[0].tolist() == [1, 3, 2, 4]
    assert values[0].tolist() == [2.0, 2.0, 1.0, 1.0]
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert best_children(scores, 1)[1].tolist() == [[1], [0]]
    for size in range(3, 90):
        level = torch.zeros(1, size)
        level[0, -1] = 1.0
        assert best_children(level, 2)[1].tolist() == [[size - 1, 0]], "of equals that do not all stay"


def test_children_are_scored_with_the_noise_of_the_place_they_would_fill_each_token_with_its_own():
    vocab, noise = DraftVocab(list(range(11, 51)), 60), Noise(5, 60)
    request = TreeRequest(0, 7, 20, TreeShape.parse("8x2x3"), SAMPLED, noise=noise.at)
    found = children(request, 2, [4, 5], LOGITS[:2], vocab)
    values, ids = log_scores(LOGITS[:2], SAMPLED, noise.at(23)[11:51]).topk(3)
    assert found.tokens == (ids + 11).tolist()
    torch.testing.assert_close(torch.tensor(found.log_scores, dtype=torch.float64), values)


def drawing(shape: str, sampling: Sampling = SAMPLED, seed: int = 3) -> TreeRequest:
    return TreeRequest(0, 7, 20, TreeShape.parse(shape), sampling, None, draws=lambda node, count: gumbel(seed, 20, count, GUESS, node))


def test_drawn_children_are_drawn_without_replacement_from_the_distribution_they_carry():
    logits, vocab = LOGITS[0, :5] / 2, DraftVocab([1, 3, 4, 8, 9], 12)
    q = logits.softmax(-1)
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(20):
        found = children(drawing("static:2", seed=seed), 0, range(200), logits.expand(200, 5), vocab)
        seen.update(map(tuple, found.tokens))
        torch.testing.assert_close(torch.stack(found.distributions)[:, vocab.ids], q.expand(200, 5))
        assert all(distribution.shape == (12,) and float(distribution.sum()) == pytest.approx(1) for distribution in found.distributions)
    ids = vocab.ids.tolist()
    exact = {(ids[i], ids[j]): float(q[i] * q[j] / (1 - q[i])) for i in range(5) for j in range(5) if i != j}
    assert surprise(seen, exact) < 1


def test_children_are_drawn_only_where_the_shape_was_fixed_before_and_with_noise_of_the_node_s_own():
    assert children(drawing("8x2x3"), 0, [0], LOGITS[:1], None).distributions is None, (
        "the best of a level would be kept: chosen, not drawn"
    )
    static = children(drawing("static:3"), 0, [4, 5], LOGITS[:1].expand(2, -1), None)
    assert static.tokens[0] != static.tokens[1]
    assert static.tokens[1] == children(drawing("static:3"), 0, [5], LOGITS[:1], None).tokens[0]


def test_what_filters_rule_out_is_not_drawn():
    found = children(drawing("static:9", Sampling(1.0, top_k=2)), 0, range(50), LOGITS[:1].expand(50, -1), None)
    for tokens, scores, distribution in zip(*found):
        assert sum(score > float("-inf") for score in scores) == int((distribution > 0).sum()) == 4, (
            "twice top-k: the draft's distribution is only near"
        )
        assert all(distribution[token] > 0 for token, score in zip(tokens, scores) if score > float("-inf"))
