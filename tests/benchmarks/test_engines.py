"""The harness for other engines, with none of them here: what it says of an engine that does what we do, and of one that does not."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from eyas.config import GREEDY, PLAIN, TrainSettings, TreeShape
from eyas.decode.generate import Decoder
from eyas.engine import load

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENGINES = BENCHMARKS / "engines"
CHAIN = "chain:3"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    for folder in (BENCHMARKS, ENGINES):
        monkeypatch.syspath_prepend(str(folder))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def world():
    return script("common").tiny()


@pytest.fixture
def chosen(world, tmp_path):
    words = ["--prompts", world.root / "prompts" / "mt_bench.jsonl", "--limit", "3", "--max-tokens", "16", "--tree", CHAIN]
    words += ["--target", world.target, "--draft", world.draft, "--out", tmp_path / "like_ours.json"]
    return script("harness").options("An engine.").parse_args(list(map(str, words)))


def answered(job) -> dict[str, Any]:
    """What an engine would tell that decodes as we do, round by round."""
    engine = load(job.target, job.draft, precision="fp32")
    told: dict[str, Any] = {"engine": "like ours", "plain": [], "tokens": [], "steps": []}
    for prompt in job.prompts:
        settings = (GREEDY, [0], job.max_tokens)
        *_, (plain,) = Decoder(engine.target).run([prompt], PLAIN, *settings)
        lengths = []
        for (text,) in Decoder(engine.target, engine.drafter("eagle3")).run([prompt], TreeShape.parse(CHAIN), *settings):
            lengths.append(len(text.tokens))
        told["plain"].append(plain.tokens[len(prompt) :])
        told["tokens"].append(text.tokens[len(prompt) :])
        told["steps"].append([after - before for before, after in pairwise(lengths)])
    return told


def test_an_engine_that_decodes_as_we_do_has_our_rounds_and_another_round_is_seen(world, chosen, tmp_path, capsys, monkeypatch):
    harness = script("harness")
    job = harness.make_job(chosen, world.draft)
    place = tmp_path / "work"
    place.mkdir()
    (place / "told.json").write_text(json.dumps(answered(job)))
    child = place / "child.py"
    child.write_text(
        "import json, pathlib, sys\n"
        "job, result = map(pathlib.Path, sys.argv[1:])\n"
        "told = job.with_name('told.json').read_text()\n"
        "assert len(json.loads(job.read_text())['prompts']) == len(json.loads(told)['tokens'])\n"
        "result.write_text(told)\n"
    )
    result = harness.run_child(Path(sys.executable), child, job, place)
    compared = harness.compare(job, result, str(world.draft))
    assert compared["prompts_with_equal_steps"] == compared["texts_equal_plain"] == compared["prompts"] == 3
    assert compared["theirs"] == compared["ours"] and compared["ours"]["rounds"] > 3

    harness.report("like_ours", chosen, job, result, compared)
    row = capsys.readouterr().out.strip()
    assert row.startswith(f"| like ours | fp32 | {CHAIN} | 3 of 3 |")
    monkeypatch.setattr(sys, "argv", ["table.py", str(chosen.out.parent)])
    script("table").main()
    assert row in capsys.readouterr().out.splitlines()

    first, second, *rest = result["steps"][1]
    result["steps"][1] = [first + second, *rest]  # the same tokens in a round less
    compared = harness.compare(job, result, str(world.draft))
    assert compared["prompts_with_equal_steps"] == 2 and compared["theirs"]["rounds"] == compared["ours"]["rounds"] - 1


def test_a_child_that_fails_is_told_with_the_end_of_its_log(world, chosen, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("raise ValueError('no such engine')")
    with pytest.raises(SystemExit, match=r"child.py failed \(1\)(.|\n)*no such engine"):
        script("harness").run_child(Path(sys.executable), child, {}, tmp_path)


def test_engines_that_only_load_a_draft_are_given_logits_and_trees_of_ours(world, chosen):
    harness = script("harness")
    job = harness.make_job(chosen, world.draft)
    cases, ours = harness.draft_on_texts(job, str(world.draft), places=2)
    assert [len(each) for each in ours["logits"]] == [len(cases[f"tokens.{number}"]) - 1 for number in range(3)]
    assert all(len(tree) == 3 for trees in ours["trees"] for tree in trees), "a chain of three has three paths"


def test_every_engine_s_script_can_be_imported():
    for path in sorted(ENGINES.glob("*.py")):
        if path.stem != "vllm_child":  # which is for an environment that has vLLM
            script(path.stem)


# ---- servers ----

SERVER = """
import http.server, json, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"ok": 1}')
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps({"asked": asked}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def test_a_server_answers_while_it_is_needed_and_is_gone_afterwards(tmp_path):
    local = script("local_server")
    with local.server(lambda port: [sys.executable, "-c", SERVER, str(port)], tmp_path / "log", 60) as address:
        assert local.ask(f"{address}/x", {"prompt": [1, 2]}) == {"asked": {"prompt": [1, 2]}}
    with pytest.raises(OSError):
        local.fetch(f"{address}/health", patience=5)


def test_a_server_that_ends_at_once_is_told_with_what_it_said(tmp_path):
    local = script("local_server")
    with (
        pytest.raises(RuntimeError, match=r"exit code 3(.|\n)*no such model"),
        local.server(lambda port: [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], tmp_path / "log", 60),
    ):
        pass


# ---- one engine's words ----


def test_llama_cpp_s_steps_are_cut_where_the_answer_ends():
    cut = script("llama_cpp_child").cut
    assert cut([2, 3], 5) == [2, 3] and cut([2, 3], 4) == [2, 2] and cut([2, 3], 6) == [2, 3, 1]
    with pytest.raises(AssertionError):
        cut([2, 3], 2)


def test_our_side_beside_speculators_trains_every_slot_once_a_turn_and_hands_over_what_it_trained_on(world, tmp_path):
    ours = script("our_trainer")
    settings = TrainSettings(draft_vocab_size=200, unroll_steps=3, step_keep=1.0, sampled_columns=0)
    examples = script("common").examples_of(world.root / "shards")
    side = ours.Ours(world.target, examples, examples, settings)
    turn = side.turn()
    slots = sum(a == b >= 0 for example in examples for a, b in zip(example.answers, example.answers[1:]))
    assert turn.slots == slots < turn.slot_steps and turn.steps == len(side.batches)
    losses, marks, counts, outside = side.losses(examples[0])
    assert len(losses) == 3 and min(losses) > 0 and marks.sum(1).tolist() == counts.tolist() and 0 <= outside <= 1
    ours.hand_over(tmp_path, side, examples, examples[0])
    masks = [tensor for name, tensor in load_file(tmp_path / "conversations.safetensors").items() if name.endswith(".mask")]
    assert sum(int(mask.sum()) for mask in masks) == slots
