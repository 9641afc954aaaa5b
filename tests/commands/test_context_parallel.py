"""`--context-parallel` from a shell: several processes as torchrun starts them write what one does, and say what passed between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest

from eyas import cli
from eyas.commands.common import engine_from
from eyas.commands.parser import parser
from tests.parallel import processes
from tests.serve.serving import at_an_address, served


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


def test_processes_as_torchrun_starts_them_serve_what_one_process_serves(models):
    words = ["--target", models / "target", "--draft", models / "draft", "--context-parallel", "--precision", "fp32"]
    asked = ["--tree", "12x3x4", "--slots", "2", "--prefix-cache", "--drain", "5"]
    port, command = processes.free_port(), ["serve", *map(str, words), *asked]
    ids, ends = processes.start(2, lambda rank: cli.main([*command, "--port", str(port)]))
    try:
        several = answers(f"http://127.0.0.1:{port}/v1")
    finally:
        os.kill(ids[0], signal.SIGTERM)
        statuses = [processes.result(end, 60) for end in ends]
        for each in ids:
            os.waitpid(each, 0)
    with served(engine_from(parser().parse_args(command)), *asked) as (_, server), at_an_address(server) as address:
        assert answers(f"{address}v1") == several and len(set(map(str, several))) == 4
    assert statuses[0] == 0


def answers(address: str) -> list:
    """What a server says to prompts that begin alike, alone and at once, and its fingerprint."""
    body = {"max_tokens": 16, "temperature": 1, "echo": True, "logprobs": 1}
    bodies = [body | {"prompt": "how a hawk sees " * 6 + more, "seed": number} for number, more in enumerate(("far", "far", "near"))]
    bodies[1] |= {"echo": False}

    def ask(each: dict) -> tuple:
        request = Request(f"{address}/completions", json.dumps(each).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            told = json.load(answer)
        return told["choices"], told["system_fingerprint"]

    until = time.monotonic() + 60
    while not listens(address) and time.monotonic() < until:
        time.sleep(0.05)
    alone = [ask(each) for each in bodies]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(ask, bodies)) == alone
    with urlopen(f"{address}/models", timeout=60) as answer:
        return [*alone, json.load(answer)["data"][0]["eyas"]["system_fingerprint"]]


def listens(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=60):
            return True
    except OSError:
        return False


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
