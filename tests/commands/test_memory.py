"""Running out of memory is one line that says where, how much was wanted, and what may be smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import eyas
import eyas.cli
from eyas.commands import generate, train
from eyas.config import EyasError, TreeShape
from eyas.decode import generate as generate_turns
from eyas.decode.generate import Decoder
from eyas.train import memory as step_memory
from eyas.train.memory import StepMemory
from eyas.train.trainer import Budget
from tests.tiny import tiny_target
from tests.train.training import make_trainer, silent

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.25 GiB is free. .."
BEYOND = 10**14  # numbers that no address space holds
EACH = 2 * 60 * 5 * 2 * 8 * 4 + 4 * 8 * 53  # bytes that a tiny text of 60 tokens with a tree of 8 takes: keys and values, logits


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


@pytest.mark.parametrize(
    ("room", "said"), [(7 * EACH, "of 16 about 7 would fit"), (99 * EACH, "of 16 about 15"), (EACH // 2, "not one fits")]
)
def test_decoding_says_how_many_texts_would_fit(monkeypatch, room, said):
    """By keys and values of 60 tokens and the logits of a tree of 8."""
    target = tiny_target(dtype=torch.float32)
    decoder = Decoder(target)
    monkeypatch.setattr(generate_turns, "free_on", lambda device: room)
    monkeypatch.setattr(type(target), "new_cache", lambda *_: cuda())
    with pytest.raises(EyasError, match=rf"the GPU is out of memory \(20 GiB more were wanted\); lower --max-new-tokens, .*{said}"):
        decoder.reserve(16, 52, [TreeShape.parse("8x2x3")])


def test_a_pass_that_runs_out_of_memory_says_so_too(models, monkeypatch):
    engine = eyas.load(models / "target", precision="fp32")
    monkeypatch.setattr(type(engine.target), "states", lambda *_: cuda())
    with pytest.raises(EyasError, match=r"the GPU is out of memory .* about [0-9]+ would fit"):
        engine.generate(["hi", "ho", "ha"], seed=1, max_new_tokens=8, method="plain")


def test_training_names_the_largest_batch_that_whole_steps_tell_of(monkeypatch):
    """Steps take 100 bytes a token beside 1,000 that stay; 40,000 are free."""
    steps = StepMemory(torch.device("cpu"))
    monkeypatch.setattr(step_memory, "taken", lambda device: 1000)
    monkeypatch.setattr(step_memory, "peak", lambda device: 1000 + 100 * 250)
    monkeypatch.setattr(step_memory, "free_on", lambda device: 40_000)

    def out_of_memory(tokens):
        with pytest.raises(EyasError) as found, steps.step(tokens):
            cuda()
        return str(found.value)

    first = out_of_memory(900)
    assert steps.most() is None and "fit" not in first and "a batch of 900 tokens is too large; lower --set tokens_per_batch, or" in first
    with steps.step(250):
        pass
    assert steps.most() == 400 and "(batches of about 400 tokens fit)" in out_of_memory(900) and "about 300 tokens" in out_of_memory(301)


def test_a_training_step_is_measured(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "draft")
    monkeypatch.setattr(trainer, "stepped", lambda *_: cuda())
    with pytest.raises(
        EyasError, match=r"the GPU is out of memory .* a batch of [0-9,]+ tokens is too large; lower --set tokens_per_batch"
    ):
        trainer.run(Budget(steps=3), silent)
