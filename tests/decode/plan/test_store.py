"""Prices are timed once on a machine and kept; a damaged file only means timing again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eyas.config import EyasError, Sampling
from eyas.decode.plan import store
from eyas.decode.plan.shapes import SHAPES
from eyas.decode.plan.store import PlanStore, time_passes
from tests.tiny import tiny_target


def new_store(precision: str = "fp32") -> PlanStore:
    return PlanStore(SimpleNamespace(device="cpu"), Path("target"), None, precision)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(store, "time_passes", lambda target: calls.append(target) or {1: 1.0, 8: 2.0})
    return calls, tmp_path / "plans.json"


def test_passes_are_timed_once_for_all_that_decides_their_price(timed):
    calls, _ = timed
    for _ in range(2):
        held = new_store()
        assert held.planner("eagle3", Sampling()).passes is held.planner("lookup", Sampling(1.0)).passes
        held.save()
    assert len(calls) == 1
    new_store("int8").planner("eagle3", Sampling())
    assert len(calls) == 2


def test_what_a_call_learned_the_next_process_knows(timed):
    held = new_store()
    plan = held.planner("eagle3", Sampling())
    for _ in range(50):
        plan.calibration.judge(1, [0.9], None)
        plan.record_step(1, 9.0)
    held.save()
    again = new_store()
    assert again.planner("eagle3", Sampling()).calibration.chance(1, 0.9) < 0.5
    assert again.planner("eagle3", Sampling()).steps.of(1) == plan.steps.of(1) > 0.2
    assert again.planner("eagle3", Sampling(1.0)).calibration.chance(1, 0.9) == pytest.approx(0.9)  # other draws, other chances


def test_what_is_learned_with_copying_and_without_is_kept_apart_and_under_its_earlier_name(timed):
    held = new_store()
    held.planner("eagle3", Sampling()).calibration.judge(1, [0.9], None)
    held.planner("eagle3-lookup", Sampling()).calibration.judge(1, [0.2], 0)
    held.save()
    again = new_store()
    assert again.planner("eagle3", Sampling()).calibration.chance(1, 0.9) < 0.9
    copying = again.planner("eagle3+copy", Sampling()).calibration
    assert copying.chance(1, 0.2) > 0.2 and copying.chance(1, 0.9) == pytest.approx(0.9)


def test_a_measurement_learns_nothing(timed):
    _, path = timed
    held = new_store()
    held.frozen = True
    held.planner("eagle3", Sampling()).calibration.judge(1, [0.9], None)
    held.save()
    assert held.planner("eagle3", Sampling()).calibration.chance(1, 0.9) == pytest.approx(0.9) and not path.exists()


def test_calls_share_what_pauses_learned_but_not_a_pause(timed):
    """A measurement begins with it and leaves it as it was."""
    held = new_store()

    def pauses_after(rounds: int, gain: float) -> list[bool]:
        plan, paused = held.planner("eagle3", Sampling()), []
        for _ in range(rounds):
            plan.begin(4)
            paused.append(not plan.guesses)
            plan.record(4, 1.0, 4, 1.0 if paused[-1] else 1.0 / gain)
        return paused

    assert pauses_after(60, 0.8).index(True) == 50
    held.frozen = True
    for _ in range(2):
        assert pauses_after(60, 0.8).index(True) == 12
    held.frozen = False
    assert pauses_after(60, 0.8).index(True) == 12


@pytest.mark.parametrize("damage", ["", "[1", "[]", '{"x": 3}'])
def test_a_damaged_store_is_timed_anew(timed, damage):
    calls, path = timed
    path.write_text(damage)
    held = new_store()
    held.planner("eagle3", Sampling())
    held.save()
    assert len(calls) == 1 and held.key in json.loads(path.read_text())


@pytest.mark.parametrize("passes", [{}, {"1": -1}, {"0": 1}, {"a": 1}, {"1": "x"}, [1], 3])
def test_prices_that_cannot_be_are_timed_anew(timed, passes):
    calls, path = timed
    held = new_store()
    path.write_text(json.dumps({held.key: {"passes": passes, "eagle3 greedy": 7}}))
    assert new_store().planner("eagle3", Sampling()).passes.of(8) == 2.0
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_only_means_timing_again(timed, capsys):
    calls, path = timed
    path.mkdir()  # a directory in the file's place
    for _ in range(2):
        held = new_store()
        held.planner("eagle3", Sampling())
        held.save()
    assert len(calls) == 2 and "cannot be kept" in capsys.readouterr().err


def test_passes_of_a_real_target_are_timed_for_every_number_of_rows_that_fits():
    seconds = time_passes(tiny_target())
    assert set(seconds) <= set(store.TIMED_ROWS) and 1 in seconds and all(value > 0 for value in seconds.values())
    with pytest.raises(EyasError, match="--tree"):
        time_passes(tiny_target(max_position_embeddings=1))


def test_what_rounds_of_each_shape_cost_and_bring_is_kept_and_not_learned_in_a_measurement(timed):
    held = new_store()
    shapes = held.planner("eagle3", Sampling()).shapes
    shapes.judge(SHAPES[-1], [1, 2])
    shapes.record(SHAPES[-1], 0.5)
    held.frozen = True
    held.planner("eagle3", Sampling()).shapes.record(SHAPES[2], 0.1)
    held.frozen = False
    held.save()
    again = new_store()
    assert again.planner("eagle3", Sampling()).shapes.seconds == {60: 0.5}
    assert not again.planner("eagle3", Sampling(1.0)).shapes.seconds
