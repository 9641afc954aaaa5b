"""The copy law is what followed the context's longest known suffix, counted in the text, and joins a drafter's law as (1 - l) q + l c."""

from __future__ import annotations

import random

import pytest
import torch

from eyas.config import Sampling, TreeShape
from eyas.decode.copying import LONGEST, OCCURRENCES, USUAL, CopiedText, CopyLaw, mixed
from eyas.decode.drafter import TreeRequest
from eyas.decode.score import children
from eyas.model.vocab import DraftVocab


def read(tokens: list[int]) -> CopiedText:
    text = CopiedText(unread=list(tokens))
    text.read()
    return text


def longest_suffix(text: list[int], path: list[int]) -> tuple[int, list[int]]:
    """By brute force: how many of the context's last tokens stood in the text before, and what followed there, latest last."""
    context = text + path
    for length in range(min(len(context), LONGEST), 0, -1):
        followed = [text[end] for end in range(length, len(text)) if text[end - length : end] == context[-length:]]
        if followed:
            return length, followed
    return 0, []


def test_the_law_is_of_the_longest_suffix_of_text_and_path_that_stood_in_the_text():
    rng = random.Random(0)
    found = 0
    for _ in range(400):
        tokens = [rng.randrange(6) for _ in range(rng.randint(1, 14))]
        path = [rng.randrange(6) for _ in range(rng.randint(0, 5))]
        law, (length, followed) = read(tokens).law(path), longest_suffix(tokens, path)
        assert (law is None) == (length == 0)
        if law is not None and len(followed) <= OCCURRENCES:
            weights = torch.zeros(6)
            for rank, token in enumerate(followed):
                weights[token] += 2.0**rank
            assert law.matched == length
            assert [law.following.get(token, 0.0) for token in range(6)] == pytest.approx((weights / weights.sum()).tolist())
            found += 1
    assert found > 200


def test_a_law_found_from_the_one_before_it_is_the_one_that_is_looked_up():
    """Where the law before knew all places that matched."""
    rng = random.Random(1)
    longer = 0
    for _ in range(400):
        tokens, path = [rng.randrange(4) for _ in range(rng.randint(4, 18))], [rng.randrange(4) for _ in range(6)]
        along = read(tokens)
        for length in range(len(path) + 1):
            law, fresh = along.law(path[:length]), read(tokens).law(path[:length])
            matched, followed = longest_suffix(tokens, path[: length - 1]) if length else (0, [])
            if len(followed) <= OCCURRENCES:
                assert law == fresh
                longer += law is not None and law.matched == matched + 1
    assert longer > 200


def test_a_law_is_worth_what_it_was_in_this_text():
    copied = read([1, 2, 3, 4, 5] * 12)
    assert copied.chance(8) > USUAL[8] and copied.law([]).chance == copied.chance(LONGEST)
    fooled = read([token for other in range(10, 60) for token in (1, 2, other)])
    assert fooled.chance(2) < USUAL[2] / 2
    assert read([1, 2, 3]).chance(4) == USUAL[4], "nothing counted yet"


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("known", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 5]])
def test_children_are_those_of_the_mixture_whatever_the_draft_knows(noisy, known):
    """Against the whole mixture over the target's vocabulary."""
    torch.manual_seed(1)
    vocab, logits = DraftVocab(known, 8), torch.randn(2, len(known))
    noise = torch.randn(8).double() if noisy else torch.zeros(8).double()
    laws = [CopyLaw(0.4, {2: 0.75, 6: 0.25}, 3), None]
    sampling = Sampling(temperature=0.7) if noisy else Sampling()
    request = TreeRequest(0, 1, 5, TreeShape(9, 2, 3), sampling, (lambda position: noise) if noisy else None)
    found = children(request, 1, [1, 2], logits, vocab, laws)
    for row, law in enumerate(laws):
        q = torch.zeros(8).double().index_copy_(0, vocab.ids, (logits[row].double() / (0.7 if noisy else 1.0)).softmax(-1))
        c = torch.tensor([0, 0, 0.75, 0, 0, 0, 0.25, 0]).double()
        whole = (q if law is None else 0.6 * q + 0.4 * c) * noise.exp()
        wanted = (whole / whole.sum()).topk(3)
        assert found.tokens[row] == wanted.indices.tolist()
        assert found.log_scores[row] == pytest.approx(wanted.values.log().tolist(), abs=1e-5)


def test_a_law_that_is_sure_leaves_no_score_above_nothing():
    best = mixed(CopyLaw(1 - 1e-12, {3: 1.0}, 12), [3, 4], [-0.1, -3.0], [-0.1], 0.0, None)
    assert best[0][1] == 3 and 0.0 <= best[0][0] + 1e-6 < 2e-6 and best[1][0] > 20
