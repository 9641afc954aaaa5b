"""The command line as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from eyas.train import trainer as training
from tests.commands.words import environment, eyas, generate, train
from tests.tiny import save_tiny_target


def test_the_process_has_the_status_and_the_line(models):
    result = eyas(*generate(models, "hi", "--top-p", "0"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "eyas: top-p must be above 0 and at most 1 (1 is off), not 0.0\n"


def test_help_and_import_need_no_torch():
    code = "import sys, eyas, eyas.cli; eyas.cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_real_ctrl_c_in_train_leaves_a_checkpoint(models, data, tmp_path, number):
    """The signal comes while it trains; --minutes alone would end it. SIGTERM does the same, even where a script ignores Ctrl-C."""
    out = tmp_path / "draft"
    often = ("--minutes", "20", "--set", "measure_steps=1", "--set", "tree_every=0")
    words = [sys.executable, "-m", "eyas", *map(str, train(models, out, data, *often))]
    attention = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN  # a job in the background may begin with either

    def prepare() -> None:
        signal.signal(signal.SIGINT, attention)

    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=prepare)
    for line in process.stderr:
        if "held-out simulated tau" in line:  # steps are made
            break
    process.send_signal(number)
    said, err = process.communicate(timeout=300)
    assert process.returncode == 130 and said == "" and "Traceback" not in err
    assert "the checkpoint is saved. Go on with: eyas train" in err and err.endswith("eyas: interrupted\n")
    steps = torch.load(out / training.CHECKPOINT, weights_only=True)["progress"]["steps"]
    assert steps == json.loads((out / "training.json").read_text())["steps"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_target_with_scaled_rotary_embeddings_loads_and_a_stop_may_be_one_string(tmp_path):
    from eyas.engine import load, make_request

    directory = save_tiny_target(tmp_path / "scaled", rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert load(directory, precision="fp32").generate("hello", max_new_tokens=3).rounds <= 2
    assert make_request(stop="END").stop == ("END",)
