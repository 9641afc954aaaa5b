"""Targets whose keys cannot be shared out yet are refused by what they are, not computed wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas.config import EyasError
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.start import begin, check_shareable
from tests.tiny import tiny_target


def test_a_model_with_full_attention_is_taken():
    model = tiny_target()
    assert check_shareable(model) is model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny_target(sliding_window=8), "sees 8 positions at a time"),
        (lambda: tiny_target(prepare=False).to("meta"), "on meta"),
    ],
)
def test_another_is_refused_in_one_line(model, words):
    with pytest.raises(EyasError, match=words) as told:
        check_shareable(model())
    assert "\n" not in str(told.value)


def test_a_schedule_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("EYAS_SCHEDULE", "ring")
    with pytest.raises(EyasError, match=r"schedule \(EYAS_SCHEDULE\) must be one of auto, .* not 'ring'"):
        begin(tiny_target(), Path(), "fp32", Layout(), Peers())
