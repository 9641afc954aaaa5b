"""`eyas plan`: typical rounds pay most among all that are tried, and none where nothing pays."""

from __future__ import annotations

import pytest

from eyas.cli import main
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import Planner
from eyas.decode.plan.prices import Prices
from eyas.view.plan import choices, reliability, typical_rounds
from tests.tiny import save_tiny_draft, save_tiny_target


def planner(passes: dict[int, float], step: float) -> Planner:
    return Planner(Prices(passes), Prices({1: step}), Calibration())


def test_free_rows_and_steps_make_the_deepest_tree_and_dear_ones_none():
    (free,) = typical_rounds(planner({1: 1.0, 64: 1.0}, 1e-9), [1])
    assert free.levels == 8 and free.gain == pytest.approx(free.tokens)
    assert [each.levels for each in typical_rounds(planner({1: 1.0, 2: 2.0, 64: 64.0}, 1.0), [1, 8])] == [0, 0]


def test_a_plan_is_the_best_of_all_choices_and_large_batches_get_smaller_trees():
    made = planner({1: 1.0, 8: 1.2, 16: 2.0, 64: 9.0}, 0.1)
    one, many = typical_rounds(made, [1, 16])
    assert one.gain == max(each.gain for each in choices(made, 1)) > 1
    assert one.nodes > many.nodes


def test_the_command_prints_prices_plans_and_reliability(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    target = save_tiny_target(tmp_path / "target")
    draft = save_tiny_draft(tmp_path / "draft", target)
    picture = tmp_path / "plan.png"
    assert main(["plan", "--target", str(target), "--draft", str(draft), "--precision", "fp32", "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "What a pass costs here" in said and "Typical rounds" in said and "come true" in said
    assert picture.stat().st_size > 1000
    assert main(["plan", "--method", "plain"]) == 2
    assert "no trees to plan" in capsys.readouterr().err
    assert main(["plan", "--method", "medusa"]) == 2
    assert "'medusa' has no trees to plan; choose eagle3, eagle2, mtp, draft-model, lookup" in capsys.readouterr().err


def test_reliability_is_the_mean_guess_against_the_share_that_came_true():
    calibration = Calibration()
    for drawn in (0, 0, 0, None):
        calibration.judge(1, [0.6, 0.1], drawn)
    calibration.judge(2, [0.6], None)
    found = {round(each.guessed, 3): (each.right, each.tried) for each in reliability(calibration) if each.tried}
    assert found == {0.6: (0.6, 5), 0.1: (0.0, 4)}
    assert [each.tried for each in reliability(calibration, (2,)) if each.tried] == [1]
