"""Prices are timed once on a machine and kept; a damaged memory only means timing again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eyas import planning
from eyas.config import EyasError, Sampling
from eyas.planning import Memory, time_passes
from tests.tiny import tiny_target


def engine(precision: str = "fp32") -> SimpleNamespace:
    return SimpleNamespace(directory=Path("target"), target=SimpleNamespace(device="cpu"), draft=None, precision=precision)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(planning, "time_passes", lambda target: calls.append(target) or {1: 1.0, 8: 2.0})
    return calls, tmp_path / "plans.json"


def test_passes_are_timed_once_for_all_that_decides_their_price(timed):
    calls, _ = timed
    for _ in range(2):
        memory = Memory(engine())
        assert memory.planner("eagle3", Sampling()).passes is memory.planner("lookup", Sampling(1.0)).passes
        memory.save()
    assert len(calls) == 1
    Memory(engine("int8")).planner("eagle3", Sampling())
    assert len(calls) == 2


def test_what_a_call_learned_the_next_process_knows(timed):
    memory = Memory(engine())
    plan = memory.planner("eagle3", Sampling())
    for _ in range(50):
        plan.calibration.judge(1, [0.9], None)
        plan.stepped(1, 9.0)
    memory.save()
    again = Memory(engine())
    assert again.planner("eagle3", Sampling()).calibration.chance(1, 0.9) < 0.5
    assert again.planner("eagle3", Sampling()).steps.of(1) == plan.steps.of(1) > 0.2
    assert again.planner("eagle3", Sampling(1.0)).calibration.chance(1, 0.9) == pytest.approx(0.9)  # other draws, other chances


def test_a_measurement_learns_nothing(timed):
    _, path = timed
    memory = Memory(engine())
    memory.frozen = True
    memory.planner("eagle3", Sampling()).calibration.judge(1, [0.9], None)
    memory.save()
    assert memory.planner("eagle3", Sampling()).calibration.chance(1, 0.9) == pytest.approx(0.9) and not path.exists()


def test_calls_share_what_pauses_learned_but_not_a_pause(timed):
    """A measurement begins with it and leaves it as it was."""
    memory = Memory(engine())

    def pauses_after(rounds: int, gain: float) -> list[bool]:
        plan, paused = memory.planner("eagle3", Sampling()), []
        for _ in range(rounds):
            plan.begin(range(4))
            paused.append(not plan.guesses)
            plan.served(4, 1.0, 4, 1.0 if paused[-1] else 1.0 / gain)
        return paused

    assert pauses_after(60, 0.8).index(True) == 50
    memory.frozen = True
    for _ in range(2):
        assert pauses_after(60, 0.8).index(True) == 12
    memory.frozen = False
    assert pauses_after(60, 0.8).index(True) == 12


@pytest.mark.parametrize("damage", ["", "[1", "[]", '{"x": 3}'])
def test_a_damaged_memory_is_timed_anew(timed, damage):
    calls, path = timed
    path.write_text(damage)
    memory = Memory(engine())
    memory.planner("eagle3", Sampling())
    memory.save()
    assert len(calls) == 1 and memory.key in json.loads(path.read_text())


@pytest.mark.parametrize("passes", [{}, {"1": -1}, {"0": 1}, {"a": 1}, {"1": "x"}, [1], 3])
def test_prices_that_cannot_be_are_timed_anew(timed, passes):
    calls, path = timed
    memory = Memory(engine())
    path.write_text(json.dumps({memory.key: {"passes": passes, "eagle3 greedy": 7}}))
    assert Memory(engine()).planner("eagle3", Sampling()).passes.of(8) == 2.0
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_only_means_timing_again(timed, capsys):
    calls, path = timed
    path.mkdir()  # a directory in the file's place
    for _ in range(2):
        memory = Memory(engine())
        memory.planner("eagle3", Sampling())
        memory.save()
    assert len(calls) == 2 and "cannot be kept" in capsys.readouterr().err


def test_passes_of_a_real_target_are_timed_for_every_number_of_rows_that_fits():
    seconds = time_passes(tiny_target())
    assert set(seconds) <= set(planning.ROWS) and 1 in seconds and all(value > 0 for value in seconds.values())
    with pytest.raises(EyasError, match="--tree"):
        time_passes(tiny_target(max_position_embeddings=1))
