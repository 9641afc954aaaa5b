"""Targets whose keys cannot be shared out yet are refused by what they are, not computed wrong."""

from __future__ import annotations

import pytest

from eyas.config import EyasError
from eyas.parallel.start import check_shareable
from tests.tiny import tiny_target


def test_a_model_with_full_attention_is_taken():
    model = tiny_target()
    assert check_shareable(model) is model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny_target(sliding_window=8), "sees 8 positions at a time"),
        (lambda: tiny_target(prepare=False).to("meta"), "on meta"),
        (lambda: object(), "runs through transformers"),
    ],
)
def test_another_is_refused_in_one_line(model, words):
    with pytest.raises(EyasError, match=words) as told:
        check_shareable(model())
    assert "\n" not in str(told.value)
