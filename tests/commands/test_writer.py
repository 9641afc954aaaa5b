"""`--writer URL`: an engine that runs already writes, and `train` and `new-draft` train on its text as on the target's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eyas import http_json
from eyas.commands import new_draft
from eyas.files.target import load_target
from eyas.train import card, writers
from eyas.train import trainer as training
from tests.tiny import save_tiny_target
from tests.train.engine import Engine, Reply, served

SHAPE = ["--taps", "1,2,4", "--draft-vocab", "200", "--unroll", "3", "--workers", "1"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> Path:
    """Two targets whose conversations are short."""
    root = tmp_path_factory.mktemp("targets")
    save_tiny_target(root / "target", 0, max_position_embeddings=110, num_hidden_layers=7)
    save_tiny_target(root / "other", 1, max_position_embeddings=110, num_hidden_layers=7)
    return root


@pytest.fixture
def engine(targets, monkeypatch) -> Engine:
    monkeypatch.setattr(http_json, "PAUSE", 0.001)
    return Engine(reading(targets / "target"))


def reading(directory: Path):
    return load_target(directory, writers.writing_precision()).prepare()


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    turns = [[{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "Zzz."}] for n in range(8)]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return path


def words(targets: Path, out: Path, questions: Path, url: str, *more) -> list:
    given = ["--data", questions, "--regenerate", "--writer", url, "--writer-requests", "3"]
    return ["train", "--target", targets / "target", "--out", out, *SHAPE, *given, *more]


def told(out: Path) -> dict:
    return json.loads((out / "training.json").read_text())


def test_a_draft_is_trained_on_what_an_engine_writes(run, targets, engine, questions, tmp_path):
    out = tmp_path / "draft"
    with served(engine) as url:
        status, said, err = run(*words(targets, out, questions, url, "--steps", "2"))
    assert status == 0 and "draft written to" in said, err
    assert f"tiny at {url} has written" in err and "the target finds 100.0% likeliest itself" in err
    data = told(out)["data"]
    assert data["kind"] == "self-written" and data["settings"][0]["writer"] == "tiny" and data["own_share"] == 1.0
    assert data["conversations"] == 8 and data["answer_tokens"] >= 64 and told(out)["steps"] == 2
    assert run(*words(targets, out, questions, url, "--steps", "4", "--resume"))[0] == 0  # no engine is there any more
    assert told(out)["steps"] == 4 and told(out)["data"]["texts"] == data["texts"]


def test_another_model_under_the_same_tokenizer_is_refused(run, targets, engine, questions, tmp_path):
    engine.target = reading(targets / "other")
    with served(engine) as url:
        status, _, err = run(*words(targets, tmp_path / "draft", questions, url, "--steps", "1"))
    assert status == 2 and "another model is served there; serve the target" in err.splitlines()[-1]


def test_what_was_written_before_an_engine_stopped_is_gone_on_with(run, targets, engine, questions, tmp_path):
    engine.fault = lambda number, path: Reply(500, "died") if number > 8 else None
    with served(engine) as url:
        status, _, err = run(*words(targets, tmp_path / "draft", questions, url, "--steps", "1"))
    line = err.splitlines()[-1]
    assert status == 2 and "answered 500 (died); " in line and "answer tokens are kept, and the same command goes on with them" in line
    assert not (tmp_path / "draft").exists()
    before, engine.fault = len(engine.asked), lambda number, path: None
    with served(engine) as url:
        assert run(*words(targets, tmp_path / "draft", questions, url, "--steps", "1"))[0] == 0
    assert len(engine.asked) - before < 12


def test_ctrl_c_says_how_to_go_on(run, targets, engine, questions, tmp_path, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr("eyas.commands.writer.write_remotely", interrupted)
    with served(engine) as url:
        status, _, err = run(*words(targets, tmp_path / "draft", questions, url))
    assert status == 130
    assert "stopped; what the engine wrote is kept. Go on with: eyas train --target" in err and f"--writer {url}" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--writer", "nonsense"], "--writer 'nonsense' is no address of an engine"),
        (["--writer-model", "a"], "--writer-model and --writer-requests are about an engine that writes; name it with --writer URL"),
        (["--writer", "http://x", "--writer-requests", "0"], "--writer-requests must be a whole number from 1 to 4096, not 0"),
        (["--writer", "http://x", "--text", "f"], "--writer lets an engine write the text; --text, --shards and --data without"),
        (["--writer", "http://x", "--shards", "f"], "--writer lets an engine write the text"),
        (["--writer", "http://x", "--data", "f"], "--writer lets an engine write the text"),
        (["--writer", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1/models cannot be reached"),
    ],
)
def test_wishes_about_a_writer_that_cannot_be_met_are_one_line(refused, targets, tmp_path, more, said):
    assert said in refused("train", "--target", targets / "target", "--out", tmp_path / "draft", *SHAPE, "--steps", "1", *more)


def test_a_run_of_other_text_is_not_gone_on_with(run, targets, engine, questions, tmp_path, data):
    out = tmp_path / "draft"
    assert run("train", "--target", targets / "target", "--out", out, *SHAPE, "--data", data, "--steps", "1")[0] == 0
    status, _, err = run(*words(targets, out, questions, "http://127.0.0.1:9", "--steps", "2", "--resume"))
    assert status == 2 and "the text that was written for the run to resume is not there" in err


# ---- new-draft ----


@pytest.fixture
def in_no_time(monkeypatch) -> None:
    monkeypatch.setattr(new_draft, "LEAST_HOURS", 0.001)
    monkeypatch.setattr(new_draft, "METHODS", "plain,eagle3@chain:2")
    monkeypatch.setattr(new_draft, "MEASURED", 2)
    monkeypatch.setattr(card, "FEWEST", 1)
    budget = training.Budget
    monkeypatch.setattr(training, "Budget", lambda minutes: budget(steps=2))
    monkeypatch.setattr(new_draft, "Limit", lambda minutes: writers.Limit(tokens=150))


def test_new_draft_lets_an_engine_write(run, targets, engine, questions, tmp_path, in_no_time):
    out = tmp_path / "draft"
    command = ["new-draft", targets / "target", "--hours", "0.001", "--out", out, "--seed-prompts", questions, "--writer"]
    with served(engine) as url:
        status, said, err = run(*command, url)
        assert status == 0 and "draft written to" in said, err
    data = told(out)["data"]
    assert data["settings"][0]["writer"] == "tiny" and data["answer_tokens"] >= 150 and data["texts"]
    assert json.loads((out / "run.json").read_text())["writer"] is True
    assert "is finished" in run(*command, url)[1]
    status, _, err = run(*command[:-1])
    assert status == 2 and "was begun otherwise (writer True there, False here)" in err


def test_a_forecast_measures_no_engine(refused, targets, tmp_path):
    line = refused("new-draft", targets / "target", "--hours", "1", "--out", tmp_path / "x", "--dry-run", "--writer", "http://x")
    assert line.startswith("--dry-run measures how fast the target writes here, and --writer lets an engine write")
