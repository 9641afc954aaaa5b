"""`eyas compare`: every row trained on the same text and measured in the same rounds, kept as it is done."""

from __future__ import annotations

import json

import pytest

from eyas.bench.family import ROWS, chosen_rows, with_copying
from eyas.commands import compare
from eyas.methods import METHODS, trained
from eyas.train.trainer import Budget
from tests.tiny import save_tiny_target

TINY = compare.Scale(1500, 1200, 2, 12, False)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny_target(tmp_path_factory.mktemp("models") / "target", num_hidden_layers=7, max_position_embeddings=512)


@pytest.fixture
def quick(monkeypatch, writes_here):
    monkeypatch.setattr(compare, "QUICK", TINY)
    monkeypatch.setattr(compare, "FULL", compare.Scale(1500, 1200, 2, 12, True))


def test_rows_are_all_methods_and_what_they_leave_out():
    methods = {row.method for row in ROWS if not row.also}
    assert methods == set(METHODS) and len(chosen_rows(None, True)) == 9 < len(chosen_rows(None, False))
    assert {row.trains for row in ROWS} - {None} == set(trained())
    for row in ROWS:
        assert row.trains or row.like or METHODS[row.method].draft is None, row.name
        assert row.teaches


def test_a_named_row_brings_plain_and_the_draft_it_needs():
    assert [row.name for row in chosen_rows("eagle2, lookup", True)] == ["plain", "lookup", "eagle1", "eagle2"]


def test_copying_is_a_row_of_its_own_or_in_every_row_that_drafts():
    assert [row.name for row in chosen_rows("eagle3-lookup", True)] == ["plain", "eagle3", "eagle3+copy"]
    every = with_copying(chosen_rows(None, True))
    assert {row.name: row.copy for row in every} == {row.name: METHODS[row.method].copy for row in chosen_rows(None, True) if not row.copy}


def test_one_command_trains_measures_tells_and_goes_on(target, quick, run, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    words = ["compare", "--quick", "--target", target, "--rows", "lookup,medusa,mtp,eagle2,eagle3", "--out", out]
    status, said, _ = run(*words)
    assert status == 0 and "Equal training tokens" in said
    told = json.loads(out.read_text())
    assert list(told["methods"]) == ["plain", "lookup", "medusa", "mtp", "eagle1", "eagle2", "eagle3"]
    for name, each in told["methods"].items():
        assert each["tau"] >= 1 and set(each["at"]) == {"16, T=0", "60, T=0", "16, T=1", "60, T=1"}
        assert all(figures["same_text"] == told["conditions"]["prompt_count"] for figures in each["at"].values()), name
        assert each["at"]["16, T=0"]["tau"] == each["tau"] and f" {name} " in said
    drafted = {name: each for name, each in told["methods"].items() if "training" in each}
    assert set(drafted) == {"medusa", "mtp", "eagle1", "eagle2", "eagle3"}
    assert all(each["training"]["tokens"] >= TINY.trained for each in drafted.values())
    assert drafted["eagle1"]["training"]["unrolled_slots"] == drafted["eagle1"]["training"]["tokens"]
    assert drafted["eagle3"]["training"]["unrolled_slots"] > drafted["eagle3"]["training"]["tokens"]
    assert drafted["mtp"]["parameters"] > drafted["eagle1"]["parameters"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compare.training.Trainer, "step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(compare, "run_bench", lambda *_: pytest.fail("measured again"))
    assert run(*words)[0] == 0 and json.loads(out.read_text())["methods"] == told["methods"]


def test_an_interrupted_comparison_goes_on_with_what_was_done(target, quick, run, tmp_path, monkeypatch):
    own, calls = compare.run_bench, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*given)

    monkeypatch.setattr(compare, "run_bench", interrupted)
    words = ["compare", "--quick", "--target", target, "--rows", "medusa", "--out", tmp_path / "r.json"]
    assert run(*words)[0] == 130 and not (tmp_path / "r.json").exists()
    assert run(*words)[0] == 0 and len(calls) == 6  # of plain's two and medusa's two, the one that was cut short ran again, with its first
    assert set(json.loads((tmp_path / "r.json").read_text())["methods"]) == {"plain", "medusa"}


def test_the_full_comparison_has_a_table_at_equal_time(target, quick, run, tmp_path, monkeypatch):
    budgets = []
    monkeypatch.setattr(compare.training, "Budget", lambda **given: budgets.append(given) or Budget(**given))
    status, said, _ = run("compare", "--target", target, "--rows", "medusa,eagle3", "--out", tmp_path / "r.json")
    assert status == 0 and "Equal training time" in said
    told = json.loads((tmp_path / "r.json").read_text())
    assert set(told["same_time"]) == {"medusa", "eagle3"}
    minutes = told["methods"]["eagle3"]["training"]["minutes"]
    assert budgets == [{"tokens": TINY.trained}] * 2 + [{"minutes": minutes}]
    assert told["same_time"]["eagle3"] == told["methods"]["eagle3"]


def test_wishes_that_cannot_be_met_are_one_line(refused, target):
    assert refused("compare", "--rows", "eagle9").startswith("row 'eagle9' is unknown; choose plain, lookup, ")
    assert "cannot be written" in refused("compare", "--out", "/nowhere/r.json")
