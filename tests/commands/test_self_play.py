"""`eyas train` on text the target writes itself: shards are written, shared between runs, and a run goes on with those it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eyas import cli
from tests.tiny import save_tiny_target

TAPS = ["--taps", "1,2,4", "--draft-vocab", "200", "--unroll", "3", "--workers", "1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache in which a first run of three steps left its shards."""
    root = tmp_path_factory.mktemp("selfplay")
    save_tiny_target(root / "target", 0)
    save_tiny_target(root / "other", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EYAS_CACHE", str(root / "cache"))
        assert cli.main(words(root, "first", "--self-play", "1500", "--steps", "3")) == 0
    return root


@pytest.fixture(autouse=True)
def environment(cache, monkeypatch) -> None:
    monkeypatch.setenv("EYAS_CACHE", str(cache / "cache"))


def words(root: Path, out: str, *more, target: str = "target") -> list[str]:
    return ["train", "--target", str(root / target), "--out", str(root / out), *TAPS, *map(str, more)]


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("cache/selfplay/*/*.safetensors"))


def told(root: Path, out: str) -> dict:
    return json.loads((root / out / "training.json").read_text())


def test_the_target_writes_what_is_wanted_and_the_run_says_what_it_was(cache):
    data = told(cache, "first")["data"]
    assert data["kind"] == "self-written" and data["answer_tokens"] >= 1500
    assert data["shards"] == [f"{shard.parent.name}/{shard.name}" for shard in shards(cache)] and len(data["settings"]) == 1
    assert told(cache, "first")["steps"] == 3


def test_shards_of_an_earlier_run_train_alone_or_beside_new_ones(cache, capsys):
    folder = shards(cache)[0].parent
    before = shards(cache)
    assert cli.main(words(cache, "alone", "--shards", folder, "--steps", "1")) == 0
    assert shards(cache) == before  # nothing was written
    assert told(cache, "alone")["data"]["shards"] == [f"{shard.parent.name}/{shard.name}" for shard in before]
    capsys.readouterr()
    assert cli.main(words(cache, "stranger", "--shards", folder, "--steps", "1", target="other")) == 2
    assert "was written by another target or in another way (target differ)" in capsys.readouterr().err
    assert cli.main(words(cache, "nothing", "--shards", cache, "--steps", "1")) == 2
    assert "is not a folder of self-written shards" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_its_own_shards_where_the_folder_has_grown(cache, capsys):
    began = told(cache, "first")["data"]["shards"]
    assert cli.main(words(cache, "second", "--self-play", "3000", "--steps", "1")) == 0
    assert len(shards(cache)) > len(began)
    assert cli.main(words(cache, "first", "--self-play", "3000", "--steps", "5", "--resume")) == 0
    assert told(cache, "first")["data"]["shards"] == began and told(cache, "first")["steps"] == 5
