"""Every size has a bound, which is said before anything is loaded or taken, with what it would take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eyas.config import EyasError, Sampling, TrainSettings, TreeShape
from eyas.decode import memory
from eyas.decode.generate import Decoder
from eyas.train.trainer import Budget
from tests.tiny import tiny_target
from tests.train.training import SETTINGS, make_trainer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1000000x100x1000", "1,000,000 nodes, and with a vocabulary of 50,000 their logits alone take 200.0 GB a round; at most 4,096"),
        ("4097x1x1", "at most 4,096"),
        ("64x100000x200", "4,000,000,200 to weigh a round; at most 1,048,576"),
        ("chain:1000000", "1,000,001 nodes"),
        ("static:1000000000", "a static tree of 1,000,000,001 nodes is too large"),
        ("9" * 5000 + "x1x1", "is not understood"),
    ],
)
def test_a_tree_that_no_machine_could_grow_is_refused(text, said):
    with pytest.raises(EyasError) as caught:
        TreeShape.parse(text)
    assert said in str(caught.value) and len(str(caught.value)) < 250


def test_trees_of_any_use_are_let_through():
    for text in ("4096x10x100", "chain:4000", "static:100.2.1", "60x30x4", "1x0x1"):
        assert str(TreeShape.parse(text).checked()) == text


@pytest.mark.parametrize("shape", [TreeShape(0, 1, 1), TreeShape(8, 1.5, 2), TreeShape("8", 1, 2), TreeShape(8, 1, True)])
def test_a_shape_made_in_python_is_checked_when_it_is_used(shape):
    with pytest.raises(EyasError, match=r"a tree's (nodes|depth|top_k) must be a whole number"):
        shape.checked()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 1e-308}, "temperature 1e-308 is too small to divide by: 0 is greedy, else at least 1e-10"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_p": "0.9"}, "top-p must be a number, not '0.9'"),
        ({"min_p": [0.1]}, "min-p must be a number, not [0.1]"),
        ({"top_k": 2.5}, "top-k must be 0 (off) or a whole number above it, not 2.5"),
    ],
)
def test_a_value_of_sampling_that_is_no_number_is_one_line(settings, said):
    with pytest.raises(EyasError) as caught:
        Sampling(**settings)
    assert str(caught.value) == said


def test_numpy_numbers_are_numbers():
    assert not Sampling(np.float32(0.5), np.int64(3), np.float64(0.9)).greedy


@pytest.mark.parametrize(
    "settings",
    [
        *({"unroll_steps": value} for value in (0, 65, 1.5, "7")),
        *({"measure_steps": value} for value in (0, -1)),
        *({"warmup_steps": value} for value in (-1,)),
        *({"betas": value} for value in ((0.9, 1.0), (-0.1, 0.9))),
        *({"held_out": value} for value in (1.0, -0.1, math.nan)),
        *({"tokens_per_batch": value} for value in (0, 10**9)),
        *({"learning_rate": value} for value in (0.0, math.inf)),
        *({"draft_layers": value} for value in (0, 10**6)),
    ],
    ids=str,
)
def test_a_setting_that_no_training_could_use_is_refused_by_name(settings):
    with pytest.raises(EyasError, match=next(iter(settings))):
        TrainSettings(**settings)


def test_no_warming_up_is_a_way_to_train():
    trainer = make_trainer(None, replace(SETTINGS, warmup_steps=0))
    assert trainer.learning_rate(0.0) == trainer.settings.learning_rate
    trainer.run(Budget(steps=1), lambda *_: None)


# ---- memory ----


@pytest.fixture
def memory_of(monkeypatch, tmp_path):
    """Pretend that this many bytes are free."""

    def pretend(free: int, **cgroup: str) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free // 1024} kB\n")
        for name, text in cgroup.items():
            (tmp_path / f"memory.{name}").write_text(text)
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "CGROUP", tmp_path)

    return pretend


def test_free_memory_is_what_the_container_leaves(memory_of, monkeypatch):
    memory_of(1 << 30)
    assert memory.free_bytes() == 1 << 30
    memory_of(1 << 30, max="max\n", current="5", stat="file 1\n")
    assert memory.free_bytes() == 1 << 30
    memory_of(1 << 30, max="1000000", current="900000", stat="anon 1\nfile 300000\n")
    assert memory.free_bytes() == 400_000
    monkeypatch.setattr(memory, "MEMINFO", Path("/nowhere"))
    assert memory.free_bytes() is None


def test_a_batch_that_the_memory_cannot_hold_is_refused_before_it_is_taken(memory_of):
    decoder = Decoder(tiny_target())
    memory_of(1 << 20)
    with pytest.raises(EyasError, match=r"keys and values of 1,000 x 6\d\d tokens .* GB are free; lower --max-new-tokens, --tree, or"):
        decoder.reserve(1000, 600, [TreeShape.parse("60x7x10")])
    assert not hasattr(decoder, "cache")
    memory_of(1 << 34)
    decoder.reserve(2, 60, [TreeShape.parse("60x7x10")])
