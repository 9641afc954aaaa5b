"""The training on a machine that is lent for minutes: what is carried arrives, and what was saved comes back whole whenever the machine
goes."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from eyas.files.disk import directory_hash
from eyas.files.eagle3_files import load_draft
from eyas.files.target import load_target
from eyas.train.questions import SelfPlay
from eyas.train.shards import Counts, Written
from eyas.train.texts import write_text
from tests.tiny import save_tiny_target

SCRIPTS = Path(__file__).parents[1] / "scripts"
GIVEN = {
    "batch": 4096,
    "warm_up": 100,
    "measure_every": 1000,
    "save_every": 60,
    "learning_rate": 4e-3,
    "device": "cuda",
    "tiny": False,
    "set": [],
}


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


class Gone(BaseException):
    """The machine is taken away."""


def test_pieces_join_to_the_latest_edition(tmp_path):
    pieces = script("pieces")
    for content, most, count in ((b"abcdefg", 3, 3), (b"x" * 6, 3, 2), (b"", 3, 1), (b"last", 9, 1)):
        assert len(pieces.split(content, tmp_path, "draft", most)) == count == len(list(tmp_path.iterdir()))
        assert pieces.join(tmp_path, "draft") == content
    with pytest.raises(FileNotFoundError, match="no whole other"):
        pieces.join(tmp_path, "other")


def test_whenever_the_machine_goes_one_edition_is_whole(tmp_path, monkeypatch):
    """A stop before and after each thing that is done to a file: written, renamed, deleted."""
    pieces = script("pieces")
    earlier, later = b"earlier edition", b"the later one"
    outcomes = []
    for stop in itertools.count():
        folder, done = tmp_path / str(stop), 0
        folder.mkdir()
        pieces.split(earlier, folder, "draft", 6)

        def or_gone(call, stop=stop):
            def called(*given, **named):
                nonlocal done
                done += 1
                if done > stop:
                    raise Gone
                return call(*given, **named)

            return called

        with monkeypatch.context() as patch:
            patch.setattr(pieces.os, "replace", or_gone(os.replace))
            patch.setattr(Path, "write_bytes", or_gone(Path.write_bytes))
            patch.setattr(Path, "unlink", or_gone(Path.unlink))
            try:
                pieces.split(later, folder, "draft", 6)
                whole = True
            except Gone:
                whole = False
        outcomes.append(pieces.join(folder, "draft"))
        if whole:
            break
    assert outcomes == [earlier] * 6 + [later] * (len(outcomes) - 6) and len(outcomes) == 10


def test_a_target_and_text_arrive_as_they_were_whatever_a_call_takes(tmp_path, monkeypatch, capsys):
    carry, target = script("gpu_carry"), save_tiny_target(tmp_path / "tiny")
    text_of(directory_hash(target), tmp_path / "mine.safetensors")
    text_of("another", tmp_path / "other.safetensors")
    here, there = tmp_path / "here", tmp_path / "there"
    place(carry, monkeypatch, here)
    monkeypatch.setattr(carry, "tracked_bytes", lambda: 1000)
    most = 60_000
    carry.main(["pack", str(tmp_path / "mine.safetensors"), "--target", str(target), "--call", str(most + 1000 + carry.MARGIN)])
    calls = [line for line in capsys.readouterr().out.splitlines() if line.startswith("call ")]
    folders = sorted(here.iterdir())
    assert len(calls) == len(folders) > 2 and all(sum(file.stat().st_size for file in each.iterdir()) <= most for each in folders)
    assert "unpack" in calls[-1] and not any("unpack" in call for call in calls[:-1])
    place(carry, monkeypatch, there)
    for folder in folders:  # one call after another brings one folder
        there.mkdir(exist_ok=True)
        folder.rename(there / folder.name)
        carry.main(["take"])
        (there / folder.name / next((there / folder.name).iterdir()).name).unlink()
    carry.main(["unpack"])
    assert (there / "there" / "text" / "mine.safetensors").read_bytes() == (tmp_path / "mine.safetensors").read_bytes()
    assert contents(there / "there" / "target") == contents(target)
    with pytest.raises(SystemExit, match="was written by another target"):
        carry.main(["pack", str(tmp_path / "other.safetensors"), "--target", str(target)])
    with pytest.raises(SystemExit, match="leave nothing of 1000 bytes"):
        carry.main(["pack", str(tmp_path / "mine.safetensors"), "--call", "1000"])


def text_of(target: str, path: Path) -> None:
    settings = asdict(SelfPlay(target, "chat", (1, 2, 4)))
    write_text([Written([*range(256)] * 20, [-1] * 100 + [0] * 5020, 0.0)], [settings], Counts(5020), path)


def place(carry: ModuleType, monkeypatch, root: Path) -> None:
    for name, path in (("CARRIED", root), ("KEPT", root / "kept"), ("THERE", root / "there")):
        monkeypatch.setattr(carry, name, path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_training_leaves_a_whole_draft_and_goes_on(tmp_path):
    """Killed without a word once it has saved; then the stage itself is run, ends, and its draft has more steps behind it."""
    out, work = tmp_path / "out", tmp_path / "work"
    words = ["--tiny", "--device", "cpu", "--out", out, "--work", work, "--seconds", 600, "--save-every", 0.1, "--batch", 300]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command = [sys.executable, str(SCRIPTS / "gpu_train.py"), *map(str, words)]
    with subprocess.Popen(command, env=surroundings, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 240
        while not list(out.glob("draft-*-1of1")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    first = brought(out, work, tmp_path / "first")
    more = f"--work {work} --save-every 600"
    surroundings |= {"TRAIN_SECONDS": str(round(60 * first["minutes"]) + 3), "TRAIN_BATCH": "300", "TRAIN_MORE": more}
    stage = [str(SCRIPTS / "gpu_session.sh"), "--tiny", str(out), "train"]
    ended = subprocess.run(stage, env=surroundings, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0 and "train: exit 0" in ended.stdout, ended.stdout + ended.stderr + (out / "train.log").read_text()
    last = brought(out, work, tmp_path / "last")
    assert last["steps"] > first["steps"] > 0 and len(last["curve"]) >= 1
    told = json.loads((out / "train.json").read_text())
    assert told["steps"] == last["steps"] and told["anchors_per_second"] > 0
    assert len(list(out.iterdir())) <= 8 and last["settings"]["tokens_per_batch"] == 300 and last["settings"]["warmup_steps"] == 100


def test_a_training_that_fails_is_begun_anew_at_half_the_rate(tmp_path, capfd):
    words = ["--tiny", "--device", "cpu", "--out", tmp_path / "out", "--work", tmp_path / "work", "--seconds", 60, "--set", "loss_from=2"]
    assert script("gpu_train").main([*map(str, words)]) == 2
    said = capfd.readouterr()
    assert said.out.count("ended with status 2") == 2 and said.err.count("loss_from") == 2
    rates = [script("gpu_train").command(SimpleNamespace(**GIVEN), tmp_path / "work", tmp_path, again, 60) for again in (False, True)]
    assert [words[words.index("--learning-rate") + 1] for words in rates] == ["0.004", "0.002"]
    assert ["induction=true" in words for words in rates] == [True, False] == ["induction=false" not in words for words in rates]


def brought(out: Path, work: Path, directory: Path) -> dict:
    """What training.json says of the draft that was laid out; its weights are whole."""
    script("gpu_carry").main(["bring", str(out), str(directory)])
    network, _ = load_draft(directory, load_target(work / "there" / "target", "fp32").embedding.detach(), torch.float32)
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    return json.loads((directory / "training.json").read_text())
