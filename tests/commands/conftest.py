"""What tests of commands run on: tiny models, a cache of their own, and a command line called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eyas import cli
from eyas.train import writers
from tests.own_cache import own_cache
from tests.tiny import save_tiny_draft, save_tiny_target
from tests.train.writing import write_here


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny targets and drafts by name; tests read them only."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_target(root / "target", 0)
    save_tiny_draft(root / "draft", root / "target")
    save_tiny_target(root / "short", 0, max_position_embeddings=64)
    save_tiny_target(root / "wide", 0, hidden_size=64)
    save_tiny_target(root / "wordy", 0, vocab_size=300)
    save_tiny_target(root / "shallow", 0, num_hidden_layers=3)
    return root


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, tmp_path_factory) -> None:
    monkeypatch.setenv("EYAS_CACHE", own_cache(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def writes_here():
    """Text that a target writes itself is written in this process: starting another takes longer than all that is written here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "write_in_processes", write_here)
        yield


@pytest.fixture
def run(capsys):
    """Run a command here; returns (status, stdout, stderr)."""

    def command(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def refused(run):
    """Run a command that must be refused: its one line, without `eyas: `."""

    def command(*words) -> str:
        status, out, err = run(*words)
        assert status == 2 and out == ""
        assert err.startswith("eyas: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err[len("eyas: ") : -1]

    return command


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve conversations in both forms."""
    turns = [("Where is the nest?", f"The nest is in tree {number}, high up, and it is made of twigs.") for number in range(12)]
    openai = [{"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]} for ask, say in turns[:6]]
    sharegpt = [{"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]} for ask, say in turns[6:]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*openai, *sharegpt]))
    return path
