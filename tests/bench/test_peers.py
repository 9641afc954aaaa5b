"""The race of engines: real processes that take turns and are stopped in between; figures from what they answered."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from eyas.bench import environments
from eyas.bench.peers import LLAMA, OURS, PLAIN_BF16, Contestant, Runner, count_weights, figures, race, spread, table_rows
from eyas.config import EyasError
from eyas.files.target import target_config
from tests.own_cache import own_cache
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_config, tiny_target

PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [9, 8, 9, 8]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    target = save_tiny_target(place / "target")
    return target, save_tiny_draft(place / "draft", target)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EYAS_CACHE", own_cache(tmp_path_factory.mktemp("cache")))


def ours(models, method: str, **more) -> Contestant:
    job = {
        "target": str(models[0]),
        "draft": str(models[1]),
        "precision": "fp32",
        "method": method,
        "practice": [[5, 6, 5, 6]],
        "threads": 1,
    }
    return Contestant(f"eyas {method}", "eyas", Path(sys.executable), [32.0], job | more)


def test_contestants_take_turns_and_answer_alike(models):
    ends = list(target_config(models[0]).eos_token_ids)
    theirs = Contestant(
        "transformers",
        "transformers",
        Path(sys.executable),
        [32.0],
        {"target": str(models[0]), "dtype": "float32", "threads": 1, "end_ids": ends or [0]},
    )
    broken = Contestant("broken", "nowhere", Path(sys.executable), [32.0], {})
    result = race([ours(models, "plain"), ours(models, "eagle3"), theirs, broken], PROMPTS, 12, 1, lambda said: None)
    answers = {name: each["tokens"] for name, each in result["contestants"].items()}
    assert answers["eyas plain"] == answers["eyas eagle3"] and len(answers["eyas plain"]) == len(PROMPTS)
    assert [len(text) for text in answers["transformers"]] == [len(text) for text in answers["eyas plain"]]
    assert all(seconds > 0 for each in result["contestants"].values() for seconds in each["seconds"])
    assert list(result["left_out"]) == ["broken"] and "nowhere" in result["left_out"]["broken"]


ECHO = """#!/bin/sh
echo '{"version": "1"}'
while read -r asked; do echo '{"tokens": [1, 2, 3]}'; done
"""


def state(runner: Runner) -> str:
    """Of its process, as the kernel has it."""
    return Path(f"/proc/{runner.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_contestant_is_stopped_while_it_is_not_asked_and_ended_with_the_race(tmp_path):
    """A program that answers at once stands for an engine: what is tried is who runs when."""
    (program := tmp_path / "engine").write_text(ECHO)
    program.chmod(0o755)
    runner = Runner(Contestant("echo", "eyas", program, [32.0], {}), 1, tmp_path / "log")
    try:
        for _ in range(3):
            os.waitid(os.P_PID, runner.process.pid, os.WSTOPPED | os.WNOWAIT)  # a signal takes a moment to arrive
            assert state(runner) == "T"
            assert runner.ask(PROMPTS[0], 5)["tokens"] == [1, 2, 3]
    finally:
        runner.end()
    assert runner.version == "1" and runner.process.poll() is not None


def test_figures_are_medians_over_prompts_of_ratios_within_a_prompt():
    def answers(seconds: list[float], texts: list[list[int]]) -> dict:
        return {"version": "1", "bits_a_weight": 8.0, "tokens": texts, "seconds": seconds}

    texts = [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]
    found = figures(
        {
            "contestants": {
                PLAIN_BF16: answers([2.0, 2.0, 2.0], texts),
                OURS: answers([0.5, 1.0, 4.0], [[1, 2], [1, 2, 3, 4], [1, 2, 3, 9]]),
                LLAMA: answers([1.0, 4.0, 4.0], texts),
            }
        }
    )
    assert found["rows"][OURS]["tokens_per_second"][0] == 4.0 and found["rows"][OURS]["texts_equal_bf16"] == 2
    assert found["ratios"][f"{OURS} / {LLAMA}"][0] == 2.0  # of 2, 4 and 1
    names = [cells[0] for cells in table_rows({"conditions": {"prompts": 3}, **found})]
    assert names[0] == OURS and set(names) == {PLAIN_BF16, OURS, LLAMA}
    assert spread([3.0]) == [3.0, 3.0, 3.0]


def test_weights_are_counted_as_the_matrices_have_them():
    config = tiny_config()
    target = tiny_target(prepare=False)
    assert count_weights(config) == sum(p.numel() for name, p in target.named_parameters() if p.dim() > 1)


def test_an_environment_is_made_once_and_a_failure_is_one_line(monkeypatch, capfd):
    own, commands = environments.run, []

    def run(command, **environ) -> None:
        """A venv is made quickly: with this Python for its own."""
        commands.append(list(map(str, command)))
        if "venv" in commands[-1]:
            shutil.rmtree(command[-1], ignore_errors=True)
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").symlink_to(sys.executable)
        else:
            own(command, **environ)

    monkeypatch.setattr(environments, "run", run)
    python = environments.environment("nothing", [])
    assert python.exists() and environments.environment("nothing", []) == python
    assert [command[:3] for command in commands] == [[sys.executable, "-m", "venv"]]
    for _ in range(2):
        with pytest.raises(EyasError, match="could not be made") as caught:
            environments.environment("broken", [("install", "--no-index", "no-such-package-of-eyas")])
        assert "\n" not in str(caught.value)
    assert len(commands) == 5 and not list(environments.workplace("broken").rglob("complete")), "what failed is tried again"
