"""Every script of `benchmarks/` runs: with --quick, on tiny random models, it finds what it would find on real ones, if not how much."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.request import urlopen

import pytest
import torch

import eyas
from eyas import cli
from eyas.kernels import native
from eyas.parallel.peers import PACKET
from tests.own_cache import own_cache
from tests.parallel import processes

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    """Scripts import what they share by its bare name, as they do when they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def found(tmp_path):
    """Run a script with --quick; what it wrote."""

    def run(name: str):
        script(name).main(["--quick", "--out", str(tmp_path / "found")])
        text = (tmp_path / "found").read_text()
        return json.loads(text) if text.startswith(("{", "[")) else text

    return run


@pytest.fixture
def keeps_apart(tmp_path, monkeypatch):
    """What servers in processes of their own learn from tiny models stays out of the user's cache."""
    monkeypatch.setenv("EYAS_CACHE", own_cache(tmp_path / "cache"))


@contextlib.contextmanager
def forked(*words: str, environ: dict[str, str] | None = None) -> Iterator[str]:
    """What eyas.bench.servers has as `serving`, by a fork of this process: to import all anew takes longer than the rest of a test."""
    port = processes.free_port()
    (process,), (end,) = processes.start(1, lambda _: cli.main(["serve", "--port", str(port), *words]))
    until = time.monotonic() + 60
    try:
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(process, signal.SIGTERM)
        assert processes.result(end, 60) == 0
        os.waitpid(process, 0)


def test_every_script_has_a_claim_here():
    assert {f"test_{name}" for name in SCRIPTS} <= set(globals())


def test_a_script_says_what_it_needs_where_there_is_no_quick(capsys):
    with pytest.raises(SystemExit):
        script("round_profile").main([])
    assert "give prompts, or --quick" in capsys.readouterr().err


@pytest.mark.skipif(native.kernel() is None, reason="times the native kernel's products, which cannot be built here")
def test_round_profile(found):
    """Shares of a round are shares of the whole, and what was replaced to time them is put back."""
    from eyas.decode.generate import Decoder

    before = Decoder.round, native.product
    told = found("round_profile")
    assert sum(told["shares"].values()) == pytest.approx(1, abs=0.01)
    assert {"target's layers", "target's head", "draft's layer", "round, rest"} <= set(told["shares"])
    assert told["rounds"] > 0 and told["over_bare"] > 1 and told["tau"] >= 1
    assert (Decoder.round, native.product) == before


@pytest.mark.skipif(native.kernel() is None, reason="times the native kernel's call, which cannot be built here")
def test_draft_step(found):
    told = found("draft_step")["ms"]
    assert list(told) == ["one call", "parts"]
    for way in told.values():
        assert {rows: list(levels) for rows, levels in way.items()} == {
            f"{rows} rows": ["catching up", "first level", "next levels"] for rows in (1, 8)
        }
        assert all(0 < each["least"] <= each["median"] for levels in way.values() for each in levels.values())


@pytest.mark.skipif(native.kernel() is None, reason="times the native kernel, which cannot be built here")
def test_two_kernels(found):
    told = found("two_kernels")
    for precision in ("bf16", "int8", "q4"):
        assert list(told[precision]) == ["1 rows", "8 rows"]
        for each in told[precision].values():
            assert each["same_bits"] and min(each["before"], each["after"], each["before_over_after"]) > 0


def test_startup(found, monkeypatch):
    """A fresh process is what it measures; importing PyTorch again takes long, so here this one answers."""

    def here(command, **_):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if command[1] == "-c":
                exec(command[2], {})
            else:
                assert command[1:3] == ["-m", "eyas"] and cli.main(command[3:]) == 0
        return SimpleNamespace(stdout=said.getvalue())

    script("startup")
    monkeypatch.setattr(subprocess, "run", here)
    (told,) = found("startup").values()
    assert set(told) == {"import_s", "load_s", "generate_16_tokens_s", "peak_memory_mb"} and told["peak_memory_mb"] > 0


def test_planner_regret(found):
    rows = found("planner_regret")["rows"]
    assert [(row["batch"], row["kind"]) for row in rows] == [(2, "chat"), (2, "code"), (2, "math")]
    for row in rows:
        low, high = row["planner_over_best"][1:]
        assert 0 < low <= row["planner_over_best"][0] <= high


def test_sameness(found):
    rows = found("sameness")
    assert len(rows) == 6 and all(row["tokens"] > row["texts"] for row in rows)
    if native.kernel() is not None:
        assert [row["different"] for row in rows] == [0] * 6


def test_verifiers(found):
    rows = found("verifiers")["rows"]
    assert {row["verifier"] for row in rows} == {"walk", "accept-reject", "without-replacement", "traversal"}
    assert all(row["tau"] >= 1 and row["nodes"] <= 16 for row in rows)
    assert [row["tree"] for row in rows if row["chosen"]] == ["16x4x4"] * 2  # rules that divide by q may not have one


def test_precisions(found):
    told = found("precisions")
    assert [(row["precision"], row["drafted"]) for row in told["rows"]] == [
        (name, drafted) for name in ("bf16", "int8", "q4") for drafted in ("plain", "chain:2")
    ]
    assert told["nearness"]["bf16"]["equal"] == 1 and told["nearness"]["bf16"]["nats"] == 0 < told["nearness"]["q4"]["nats"]


def test_long_context(found):
    short, long = found("long_context").values()
    assert 150 <= short["mean_length"] < 300 <= long["mean_length"] and min(short["tau"], long["tau"]) >= 1


def test_gpu_round(found):
    told = found("gpu_round")
    assert list(told["passes_ms"]) == list(told["long_context"]["passes_ms"]) == ["1", "8"]
    assert told["copying_alone_ms"] > 0 and all(nodes in ("1", "4", "8", "16", "32", "60") for nodes in told["planned_ms"])
    for form in ("launched", "captured", "captured, temperature 1", "captured, temperature 1, top-p 0.9"):
        assert all(each["over_plain"] > 0 for each in told[form]["rounds"].values()) and list(told[form]["rounds"]) == ["8"]
    assert told["batch"]["sequences"] == 2 and told["batch"]["planned_ms"]
    for form in ("launched", "captured", "captured, temperature 1"):
        assert told["batch"][form]["plain_ms"] > 0 and told["batch"][form]["rounds"]["16"]["over_plain"] > 0


def test_gpu_training(found):
    told = found("gpu_training")
    assert told["writing"]["answer_tokens"] > 0 and told["writing"]["answer_tokens_per_second"] > 0
    assert told["reading_tokens_per_second"] > 0
    assert told["training, batches of 300 tokens"]["anchors_per_second"] > 0


def test_training_speed(found):
    told = found("training_speed")
    assert told["steps"] == 2 and told["bf16_over_fp32"] > 0
    assert all(told[products]["share"] > 0 and told[products]["mflop_per_slot"] > 0 for products in ("fp32", "bf16"))


def test_generation_speed(found):
    told = found("generation_speed")
    assert told["ours"][0] > 0 and told["transformers"][0] > 0 and told["ratio"][0] > 0


def test_data_scaling(found):
    half, whole = found("data_scaling").values()
    assert half["answer_tokens"] < whole["answer_tokens"] and half["steps"] > 0
    assert min(half["held_out"]["tau"], whole["held_out"]["tau"]) >= 1


def test_family_tables(found):
    """Of the quick figures; those of the page are what docs/family.md shows, line by line."""
    assert "| eagle3 |" in found("family_tables")
    page = (FOLDER.parent / "docs" / "family.md").read_text()
    figures = json.loads((FOLDER / "results" / "2026-11-26-family" / "full.json").read_text())
    tables = script("family_tables")
    for _, methods in tables.titled(figures):
        assert tables.tables(methods) in page


def test_options_of_the_shell_are_taken_where_none_are_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["family_tables.py", "--quick"])
    script("family_tables").main()
    assert capsys.readouterr().out.startswith("### Equal training tokens")


def test_busy_machine(found, monkeypatch):
    """A process for each number of threads; importing PyTorch again takes long, so here this one answers."""
    made = []

    class Here:
        def __init__(self, threads, models):
            self.engine, self.threads, self.process = eyas.load(**models), threads, SimpleNamespace(kill=lambda: made.append(threads))

        def rate(self, tokens):
            return len(self.engine.generate("hi", method="plain", max_new_tokens=tokens).tokens) / self.threads

    monkeypatch.setattr(script("busy_machine"), "Asked", Here)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = found("busy_machine")
    assert [(row["busy"], row["threads"], row["of_alone"], row["of_one_thread"]) for row in rows] == [(0, 2, 1.0, 0.5), (1, 2, 1.0, 0.5)]
    assert sorted(made) == [1, 2]


def test_tree_attention(found):
    told = found("tree_attention")
    assert [(row["processes"], row["context"], row["rows"]) for row in told["passes"]] == [(2, 300, 1), (2, 300, 4)]
    held = 256  # of 300 positions those of a whole block, in one of the two
    for row in told["passes"]:
        assert row["collectives_a_layer"] == 1
        assert row["tree_bytes"] == 8 * row["rows"] * 4 * (8 + 1) * 4, "layers, rows, heads, a state of width 8, float32"
        assert row["ring_bytes"] == row["keys_bytes"] == 8 * 2 * 2 * held * 8 * 2, "layers, keys and values, key heads, width, bfloat16"
    for row in told["tokens"]:
        assert row["collectives_a_token"] == pytest.approx(8 / row["tau"], abs=0.01), "a gather a layer, for all tokens of a pass"
    plain, drafted = told["tokens"]
    assert plain["bytes_a_token"] == 8 * 4 * (8 + 1) * 4 + PACKET, "states, and what the pass was told"
    most = (8 * 4 * 4 * (8 + 1) * 4 + PACKET) / drafted["tau"]
    assert PACKET / drafted["tau"] < drafted["bytes_a_token"] <= most, "trees are smaller where a text is about to end"
    assert [(row["processes"], row["kind"]) for row in told["memory"]] == [(1, "tree"), (1, "ring"), (2, "tree"), (2, "ring")]
    assert all(0 < row["keys_mb"] <= row["room_mb"] for row in told["memory"])


def test_sharded_sameness(tmp_path):
    """Every way to write, once; what was kept of a run that was ended is not written again, and a token that differs is seen."""
    state, out = tmp_path / "kept", tmp_path / "found"

    def found() -> dict:
        script("sharded_sameness").main(["--quick", "--state", str(state), "--out", str(out)])
        return json.loads(out.read_text())

    told = found()
    assert [(row["method"], row["temperature"]) for row in told["rows"]] == [
        (method, temperature) for method in ("plain", "eagle3", "eagle3+copy") for temperature in (0, 1)
    ]
    assert all(row["texts"] == 2 and row["tokens"] > 2 for row in told["rows"])
    if native.kernel() is not None:
        assert [row["different"] for row in told["rows"]] == [0] * 6
    *lines, last = state.read_text().splitlines(keepends=True)
    batch, processes, texts = json.loads(lines[0])
    texts[1][-1] += 1
    state.write_text("".join([json.dumps([batch, processes, texts]) + "\n", *lines[1:], last[:20]]))
    again = found()
    assert len(state.read_text().splitlines()) == len(lines) + 1, "the line that was cut off"
    assert [row["different"] for row in again["rows"]] == [
        told["rows"][0]["different"] + 1,
        *(row["different"] for row in told["rows"][1:]),
    ]


def test_sharded_speed(found):
    """One process with shards and without, and two: each passes over as many keys."""
    rows = found("sharded_speed")
    assert [(row["context"], row["rows"]) for row in rows] == [(300, 1), (300, 4)]
    assert all(row[f"{way}_ms"] > 0 for row in rows for way in ("whole", "shards", "processes", "gather", "scatter"))
    assert [row["bytes_gathered"] for row in rows] == [4 * (8 + 1) * 4, 4 * 4 * (8 + 1) * 4], "a state for each head, from the other"
    assert ["replicated_ms" in row for row in rows] == [False, True]


def test_tree_attention_network(found):
    """Without a network of its own: both ways run, and the model says something of each."""
    told = found("tree_attention_network")
    assert [(row["rows"], row["kind"]) for row in told["rows"]] == [(1, "tree"), (1, "ring"), (4, "tree"), (4, "ring")]
    for row in told["rows"]:
        size = row["rows"] * 4 * (8 + 1) * 4 if row["kind"] == "tree" else 2 * 2 * 150 * 8 * 2
        assert row["bytes"] == 8 * size, "states of rows, or the other's keys and values"
        assert row["model_ms"] > row["alone_ms"] > 0 or row["kind"] == "ring"


def test_tree_attention_model(found):
    """More devices cost a ring more and trees less, until meeting costs more than reading; beyond a node the schedules part."""
    lines = {(row["network"][:4], row["devices"], row["rows"]): row for row in found("tree_attention_model")}
    nvlink = [lines["NVLi", count, 1] for count in (1, 2, 4, 8, 16, 32)]
    assert [row["ring_ms"] for row in nvlink] == sorted(row["ring_ms"] for row in nvlink)
    assert [row["two-level_ms"] for row in nvlink] == sorted((row["two-level_ms"] for row in nvlink), reverse=True)
    assert nvlink[0]["gather_ms"] == nvlink[0]["ring_ms"], "alone there is nothing to send"
    assert lines["NVLi", 128, 64]["two-level_ms"] < lines["NVLi", 128, 64]["scatter_ms"] < lines["NVLi", 128, 64]["gather_ms"]
    assert lines["NVLi", 128, 16]["two-level_ms"] < lines["NVLi", 128, 1]["two-level_ms"], "a tree of guesses pays for the network"


def test_the_model_of_a_pass_counts_its_messages():
    model = script("tree_attention_model")
    assert model.tree_pass(0, layers=1, count=2, size=0, latency=1, rate=100) == 3, "told, asked for, sent"
    assert model.tree_pass(5, layers=10, count=4, size=100, latency=0, rate=100) == 5 + 30, "the bytes of three others in each layer"
    assert model.ring_pass(5, 2, layers=10, count=4, size=100, latency=0, rate=100) == 5 + 80, "attention over all keys hides the bytes"
    assert model.ring_pass(5, 0, layers=10, count=4, size=100, latency=1, rate=100) == 5 + 60 + 3


def test_gpu_tree_attention(found):
    told = found("gpu_tree_attention")
    assert [(row["rows"], row["parts"]) for row in told["kernels"]] == [(1, 1), (1, 4), (4, 1), (4, 4)]
    assert all(row["ms"] > 0 and row["off_by"] < 0.02 for row in told["kernels"]), "parts, joined, are the whole"
    (several,) = told["processes"]
    assert several["processes"] == 2 and several["keys"] == 512 and several["off_by"] < 0.02 and several["same_bits"]


@pytest.mark.usefixtures("keeps_apart")
def test_serving(found):
    told = found("serving")
    for at_once in ("1 at once", "3 at once"):
        assert told[at_once]["same_texts"] and told[at_once]["over_library"] > 0 and told[at_once]["first_token_ms"]["most"] > 0
    assert told["second turn"]["without_ms"] > 0 and told["beside others"]["ratio"] > 0 and 0 < told["1 at once"]["own"] < 1


@pytest.mark.usefixtures("keeps_apart")
def test_serving_promise(found, monkeypatch):
    monkeypatch.setattr(script("serving_promise"), "serving", forked)
    told = found("serving_promise")
    assert told["different"] == 0 and told["requests alone"] == 12 and len(told["fingerprints"]) == 1, told["the first of these"]
    assert list(told["same, by server"].values()) == [12]


@pytest.mark.usefixtures("keeps_apart")
def test_serving_soak(found):
    told = found("serving_soak")
    assert not told["wrong"] and not told["trouble in the log"] and told["5xx"] == 0
    assert told["requests"] == 40 and told["the answer given alone"] > 10 and told["left"] > 3
    assert told["ended in the middle"]["exit status"] == told["ended at last"]["exit status"] == 0
    assert told["at the end"]["slots free"] == 16 and told["at the end"]["running"] == told["at the end"]["waiting"] == 0


@pytest.mark.usefixtures("keeps_apart")
def test_serving_peers(found, monkeypatch):
    monkeypatch.setattr(script("serving_peers"), "serving", forked)
    told = found("serving_peers")
    for at_once in ("1 at once", "2 at once"):
        assert set(told[at_once]) == {"eyas", "eyas plain"}
        assert all(each["same_texts"] == 3 and each["tokens_per_second"] > 0 for each in told[at_once].values())


def test_acceptance(found):
    """Walking a draft along the target's texts finds the tau of the rounds that would have written them."""
    told = found("acceptance")
    assert [(row["temperature"], row["method"]) for row in told] == list(itertools.product((0, 1), ("eagle3", "eagle3+copy")))
    first = told[0]
    assert first["tau"]["more_than_first"] == 0 and first["tau"]["more_interval"] == [0, 0]
    from common import KINDS, tiny

    prompts = [json.loads(line)["prompt"] for line in (tiny().root / "prompts" / KINDS["chat"]).read_text().splitlines()[:2]]
    engine = eyas.load(target=tiny().target, draft=tiny().draft)
    for row in told:
        more = {"temperature": row["temperature"], "seed": 0, "max_new_tokens": 12, "generation_config": "none"}
        copy = row["method"].endswith("+copy")
        results = engine.generate(prompts, method=row["method"], copy=copy, tree=row["tree"], **more)
        tokens = sum(length * count for result in results for length, count in result.accepted_lengths.items())
        assert row["tau"]["mt_bench"] == pytest.approx(tokens / sum(result.rounds for result in results), abs=0.02)
