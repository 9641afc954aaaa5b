"""`--context-parallel` from a shell: several processes as torchrun starts them write what one does, and say what passed between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def test_torchrun_writes_the_text_of_one_process(models, run, tmp_path):
    words = ["generate", "Tell me of hawks, and of what they eat.", "--target", models / "target", "--draft", models / "draft"]
    words += [
        "--context-parallel",
        "--precision",
        "fp32",
        "--tree",
        "12x3x4",
        "--seed",
        "3",
        "--temperature",
        "1",
        "--max-new-tokens",
        "24",
    ]
    status, out, _ = run(*words, "--json")
    alone = json.loads(out)
    nothing = dict.fromkeys(("passes", "collectives", "messages", "bytes"), 0) | {"seconds_waited": [0], "slow_process": None}
    assert status == 0 and alone["context_parallel"] | {"passes": 0} == {"processes": 1, "shards": 64, "block": 256, **nothing}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "eyas", *map(str, words), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("{")]
    shared = json.loads(line)
    assert shared["tokens"] == alone["tokens"] and shared["text"] == alone["text"]
    facts = shared["context_parallel"]
    assert len(facts["seconds_waited"]) == 2 and facts["processes"] == 2 and facts["collectives"] == 5 * facts["passes"], "one a layer"


def test_a_trace_tells_where_a_trees_keys_lie(models, run):
    words = ["trace", "hi", "--target", models / "target", "--draft", models / "draft", "--context-parallel", "--rounds", "1"]
    status, out, _ = run(*words, "--shards", "4")
    assert status == 0 and "Tree Attention: keys of rows 0" in out and "(process 1)" in out


def test_shards_that_cannot_be_are_refused(models, run):
    status, _, told = run("generate", "hi", "--target", models / "target", "--context-parallel", "--shards", "6")
    assert status == 2 and told == "eyas: shards must be a power of two, not 6: states of shards meet along a binary tree\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "hi"], "torchrun started 3 processes of `eyas generate`, which would all do the same; add --context-parallel"),
        (["new-draft", "--hours", "1", "--out", "x"], "`eyas new-draft` is one process: what it writes and reads is short"),
        (["demo"], "`eyas demo` is one process; start it without torchrun"),
        (["generate", "hi", "--context-parallel", "--peer-timeout", "0"], "peer-timeout must be above 0 seconds"),
    ],
)
def test_several_processes_are_refused_where_they_make_no_sense(refused, monkeypatch, words, told):
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert refused(*words).startswith(told)


def test_options_of_shards_go_with_the_option_that_makes_them(models, run):
    status, _, told = run("generate", "hi", "--target", models / "target", "--shards", "8")
    assert status == 2 and told == "eyas: --shards goes with --context-parallel; add it, or leave this out\n"
