"""Claims about what training writes: it tells how it came about, and no failure or Ctrl-C loses what was there."""

from __future__ import annotations

import errno
import json
import resource
import signal
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import SafetensorError

from eyas.config import EyasError
from eyas.files import tensors
from eyas.files.eagle3_files import load_draft
from eyas.train import trainer as training
from eyas.train.trainer import Budget
from tests.train.training import (
    FACTS,
    SETTINGS,
    assert_identical,
    interrupt_at,
    make_trainer,
    one_line,
    silent,
    state_of,
)


def test_training_json_tells_how_the_draft_came_about(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=2), silent)
    told = json.loads((tmp_path / "training.json").read_text())
    assert {key: told[key] for key in FACTS} == FACTS
    assert told["settings"] == json.loads(json.dumps(asdict(replace(SETTINGS, products="fp32"))))  # a tiny draft: nothing is measured
    assert told["steps"] == 2 and told["slots"] == trainer.progress.slots and told["hours"] == round(told["minutes"] / 60, 3)
    (point,) = told["curve"]
    assert point.keys() == {"step", "slots", "minutes", "tau", "accept_1", "accept_2", "accept_3", "accept_4"} and point["tau"] >= 1


def test_what_is_written_is_the_trained_draft(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=2), silent)
    network, vocab = load_draft(tmp_path, trainer.network.embedding[0], torch.float64)
    assert torch.equal(vocab.ids, trainer.vocab.ids) and network.config == trainer.network.config
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(network.get_parameter(name), parameter.bfloat16().double()), name


def contents(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failure"), [(tensors, "save_file", full_for_safetensors), (tensors, "save_file", full), (torch, "save", full)]
)
def test_a_full_disk_leaves_the_older_draft(tmp_path, monkeypatch, module, name, failure):
    out = tmp_path / "draft"
    trainer = make_trainer(out)
    trainer.run(Budget(steps=1), silent)
    before = contents(out)
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(EyasError, match=r"cannot write .*draft: .*No space left on device.*; what was there before is untouched") as caught:
        trainer.run(Budget(steps=2), silent)
    one_line(caught)
    assert contents(out) == before and [file.name for file in tmp_path.iterdir()] == ["draft"]
    monkeypatch.undo()
    make_trainer(out).resume()
    load_draft(out, trainer.network.embedding[0], torch.float32)


@pytest.mark.parametrize("largest", [3_000, 60_000])  # bytes: fails in the weights, in the checkpoint
def test_a_file_that_may_not_grow_leaves_the_older_draft(tmp_path, largest):
    """The system's own refusal rather than a simulated one."""
    out = tmp_path / "draft"
    trainer = make_trainer(out)
    trainer.run(Budget(steps=1), silent)
    before = contents(out)
    assert len(before["model.safetensors"]) < 60_000 < len(before[training.CHECKPOINT])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        with pytest.raises(EyasError, match=r"cannot write .*draft: .*; what was there before is untouched") as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    one_line(caught)
    assert contents(out) == before and [file.name for file in tmp_path.iterdir()] == ["draft"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EyasError, match="cannot write") as caught:
        make_trainer(tmp_path / "file" / "draft").run(Budget(steps=1), silent)
    one_line(caught)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_spoils_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Budget(steps=9), interrupt_at(2))
    before = contents(tmp_path)

    def poison(progress, losses, spent):
        if progress.steps == 4:
            trainer.teacher.head_DH.fill_(float("nan"))

    with pytest.raises(EyasError, match=r"the loss exploded at step 5 .*its last checkpoint is untouched.*lower --learning-rate") as caught:
        trainer.run(Budget(steps=9), poison)
    one_line(caught)
    assert contents(tmp_path) == before
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.parameters)


@pytest.fixture
def ctrl_c_raises():
    """As in a terminal: a job in the background begins with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_a_step(tmp_path, monkeypatch, ctrl_c_raises):
    """A signal that comes while the weights change is acted on once the step is counted, so no batch is trained twice."""
    trainer = make_trainer(tmp_path)
    update = trainer.optimiser.step

    def interrupted_update():
        if trainer.progress.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return update()

    monkeypatch.setattr(trainer.optimiser, "step", interrupted_update)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(Budget(steps=9), silent)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole = make_trainer(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        whole.run(Budget(steps=9), interrupt_at(3))
    assert trainer.progress.steps == 3
    assert_identical(state_of(trainer), state_of(whole))


def test_ctrl_c_while_the_end_is_measured_saves_too(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).run(Budget(steps=2), silent)
    again = make_trainer(tmp_path)
    again.resume()
    assert again.progress.steps == 2
