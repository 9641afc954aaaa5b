"""The default tree is timed once and remembered; a damaged memory only means timing again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eyas import auto_tree
from eyas.config import PLAIN, Sampling, TreeShape


class Machine:
    """What decides the key, and nothing else: the timing itself is replaced."""

    directory = Path("target")
    target = SimpleNamespace(device="cpu")
    draft, precision, watch = None, "fp32", None


@pytest.fixture
def timed(monkeypatch, tmp_path):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))
    calls = []

    def time_shapes(engine, method, sampling):
        calls.append(sampling.greedy)
        return TreeShape.parse("6x2x3") if sampling.greedy else PLAIN

    monkeypatch.setattr(auto_tree, "time_shapes", time_shapes)
    return calls, tmp_path / "shapes.json"


def test_each_kind_of_sampling_is_timed_once(timed):
    calls, _ = timed
    for _ in range(2):
        assert auto_tree.fastest_shape(Machine(), "eagle3", Sampling()) == TreeShape(6, 2, 3)
        assert auto_tree.fastest_shape(Machine(), "eagle3", Sampling(1.0)) == PLAIN
    assert calls == [True, False]


def test_who_watches_the_answer_does_not_see_the_timing(timed, monkeypatch):
    engine, seen = Machine(), []
    engine.watch = seen.append
    monkeypatch.setattr(auto_tree, "time_shapes", lambda engine, *_: seen.append(engine.watch) or PLAIN)
    auto_tree.fastest_shape(engine, "eagle3", Sampling())
    assert seen == [None]
    assert engine.watch == seen.append


@pytest.mark.parametrize("damage", ["", "[1", "[]"])
def test_a_damaged_memory_is_timed_anew(timed, damage):
    calls, path = timed
    path.write_text(damage)
    assert auto_tree.fastest_shape(Machine(), "eagle3", Sampling()) == TreeShape(6, 2, 3)
    assert calls == [True]
    assert list(json.loads(path.read_text()).values()) == ["6x2x3"]


def test_a_shape_that_is_none_of_the_candidates_is_timed_anew(timed):
    calls, path = timed
    auto_tree.fastest_shape(Machine(), "eagle3", Sampling())
    path.write_text(path.read_text().replace("6x2x3", "6x2"))
    assert auto_tree.fastest_shape(Machine(), "eagle3", Sampling()) == TreeShape(6, 2, 3)
    assert calls == [True, True]


def test_a_cache_that_cannot_be_written_only_means_timing_again(timed, monkeypatch, capsys):
    calls, path = timed
    path.mkdir()  # a directory in the file's place
    for _ in range(2):
        assert auto_tree.fastest_shape(Machine(), "eagle3", Sampling()) == TreeShape(6, 2, 3)
    assert calls == [True, True] and "cannot be remembered" in capsys.readouterr().err
