"""Running out of memory is one line that says where, how much was wanted, and what may be smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import eyas
import eyas.cli
from eyas.commands import generate, train
from eyas.config import EyasError
from eyas.decode.generate import Decoder

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.25 GiB is free. .."
BEYOND = 10**14  # numbers that no address space holds


def cuda() -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.mark.parametrize(
    ("take", "said"),
    [
        (lambda: torch.empty(BEYOND), "this machine is out of memory (4e+14 bytes more were wanted); "),
        (lambda: np.empty(BEYOND), "this machine is out of memory (728 TiB more were wanted); "),
        (lambda: [0] * BEYOND, "this machine is out of memory; "),
        (cuda, "the GPU is out of memory (20 GiB more were wanted); "),
    ],
    ids=["torch", "numpy", "python", "cuda"],
)
def test_it_is_one_line_that_names_a_way_out(refused, tmp_path, monkeypatch, take, said):
    monkeypatch.setattr(generate, "run", lambda options: take())
    monkeypatch.setattr(train, "run", lambda options: take())
    told = refused("generate", "hi")
    assert told.startswith(said) and "smaller trees" in told
    told = refused("train", "--out", tmp_path / "x")
    assert told.startswith(said) and "--set tokens_per_batch" in told


def test_other_errors_of_a_program_are_not_taken_for_it(monkeypatch):
    def broken(options) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(generate, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        eyas.cli.main(["generate", "hi"])


def test_from_python_it_is_an_error_that_can_be_mended(models, monkeypatch):
    engine = eyas.load(models / "target", precision="fp32")
    monkeypatch.setattr(Decoder, "round", lambda *_: cuda())
    with pytest.raises(EyasError, match=r"the GPU is out of memory \(20 GiB more were wanted\); use a smaller batch, tree or context"):
        engine.generate("hi", seed=1, max_new_tokens=8)
