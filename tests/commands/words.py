"""Command lines that tests of commands share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from eyas.decode.generate import Decoder

JSON_KEYS = ["text", "tokens", "tau", "rounds", "seconds", "seed", "finish_reason", "method", "copy", "generation_config"]
TREE = "8x2x3"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello, how are you?"}]}


def generate(models: Path, *words, target="target", draft="draft") -> list:
    drafted = ["--draft", models / draft] if draft else []
    return ["generate", "--target", models / target, *drafted, "--precision", "fp32", "--tree", TREE, "--max-new-tokens", "24", *words]


def train(models: Path, out: Path, data: Path, *words, target="target") -> list:
    shape = ["--taps", "1,2,4", "--draft-vocab", "200", "--unroll", "3", "--workers", "1"]
    return ["train", "--target", models / target, "--out", out, "--data", data, *shape, *words]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def eyas(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "eyas", *map(str, words)], capture_output=True, text=True, env=environment(), timeout=120)


def interrupt_round(monkeypatch, number: int) -> None:
    """Ctrl-C as round `number` begins."""
    calls, own = [], Decoder.round

    def interrupted(self, *words):
        calls.append(words)
        if len(calls) == number:
            raise KeyboardInterrupt
        return own(self, *words)

    monkeypatch.setattr(Decoder, "round", interrupted)
