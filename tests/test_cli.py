"""The command line: what each command prints, and that every bad input is one line on stderr, status 2, with nothing lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eyas import cli
from eyas.config import TrainSettings
from eyas.decode.generate import Decoder
from eyas.model import weights
from eyas.train import trainer as training
from tests.tiny import save_tiny_draft, save_tiny_target

JSON_KEYS = ["text", "tokens", "tau", "rounds", "seconds", "seed", "finish_reason"]
TREE = "8x2x3"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello, how are you?"}]}


# ---- what the tests run on ----


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny targets and drafts by name; tests read them only."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_target(root / "target", 0)
    save_tiny_draft(root / "draft", root / "target")
    save_tiny_target(root / "short", 0, max_position_embeddings=64)
    save_tiny_target(root / "wide", 0, hidden_size=64)
    save_tiny_target(root / "wordy", 0, vocab_size=300)
    save_tiny_target(root / "shallow", 0, num_hidden_layers=3)
    return root


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> None:
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(capsys):
    """Run a command here; returns (status, stdout, stderr)."""

    def command(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def refused(run):
    """Run a command that must be refused: its one line, without `eyas: `."""

    def command(*words) -> str:
        status, out, err = run(*words)
        assert status == 2 and out == ""
        assert err.startswith("eyas: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err[len("eyas: ") : -1]

    return command


def generate(models: Path, *words, target="target", draft="draft") -> list:
    drafted = ["--draft", models / draft] if draft else []
    return ["generate", "--target", models / target, *drafted, "--precision", "fp32", "--tree", TREE, "--max-new-tokens", "24", *words]


def train(models: Path, out: Path, data: Path, *words, target="target") -> list:
    shape = ["--taps", "1,2,4", "--draft-vocab", "200", "--unroll", "3", "--workers", "1"]
    return ["train", "--target", models / target, "--out", out, "--data", data, *shape, *words]


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve conversations in both forms."""
    turns = [("Where is the nest?", f"The nest is in tree {number}, high up, and it is made of twigs.") for number in range(12)]
    openai = [{"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]} for ask, say in turns[:6]]
    sharegpt = [{"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]} for ask, say in turns[6:]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*openai, *sharegpt]))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# ---- bad options of generate ----


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([""], "the prompt is empty; give some text"),
        (["  \n "], "the prompt is empty; give some text"),
        ([], "give a PROMPT or --messages F.json, one of the two"),
        (["hi", "--messages", "f.json"], "give a PROMPT or --messages F.json, one of the two"),
        (["hi", "--temperature", "-0.5"], "temperature must be 0 (greedy) or a positive number, not -0.5"),
        (["hi", "--temperature", "nan"], "temperature must be 0 (greedy) or a positive number, not nan"),
        (["hi", "--temperature", "inf"], "temperature must be 0 (greedy) or a positive number, not inf"),
        (["hi", "--top-p", "0"], "top-p must be above 0 and at most 1 (1 is off), not 0.0"),
        (["hi", "--top-p", "1.5"], "top-p must be above 0 and at most 1 (1 is off), not 1.5"),
        (["hi", "--top-k", "-1"], "top-k must be 0 (off) or a positive count, not -1"),
        (["hi", "--min-p", "2"], "min-p must be between 0 (off) and 1, not 2.0"),
        (["hi", "--max-new-tokens", "0"], "max-new-tokens must be at least 1, not 0"),
        (["hi", "--max-new-tokens", "-3"], "max-new-tokens must be at least 1, not -3"),
        (["hi", "--method", "magic"], "method 'magic' is unknown; choose eagle3, lookup, draft-model, plain"),
        (["hi", "--device", "cuda"], "device cuda was asked for, but this PyTorch sees no CUDA device; use --device cpu"),
        (["hi", "--device", "toaster"], "device 'toaster' is unknown; use cpu or cuda"),
        (["hi", "--raw", "--system", "be brief"], "--system needs a chat template, --raw does without one; drop one of the two"),
        *(
            (["hi", "--tree", tree], f"tree shape {tree!r} is not understood; write NODESxDEPTHxTOPK (60x7x10), chain:K (chain:3) or auto")
            for tree in ("60x7", "0x1x1", "5x2x0", "chain:0", "chain:x", "axbxc", "")
        ),
    ],
)
def test_a_bad_option_is_one_line(models, refused, monkeypatch, words, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(*generate(models, *words)) == line


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["hi", "--temperature", "warm"], "argument --temperature: invalid float value: 'warm'; see `eyas generate --help`"),
        (["hi", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["hi", "--sead", "3"], "unrecognized arguments: --sead 3"),
    ],
)
def test_a_word_the_command_line_does_not_know_is_one_line(models, refused, words, reason):
    assert refused(*generate(models, *words)).startswith(reason)


def test_no_command_or_an_unknown_one_is_one_line(refused):
    assert refused() == "the following arguments are required: COMMAND; see `eyas --help`"
    assert "invalid choice: 'fly'" in refused("fly")


def test_a_prompt_longer_than_the_context_is_one_line(models, refused):
    """One line: the tokenizer's own warning about it is not let through."""
    for words in (["--raw", "x" * 64], ["--raw", "x" * 500], ["hello, how are you?"]):
        line = refused(*generate(models, *words, target="short", draft=None))
        assert re.fullmatch(r"the prompt has \d+ tokens, the model reads at most 64; shorten it", line)


def test_a_text_ends_where_the_context_does(models, run):
    status, out, _ = run(*generate(models, "--raw", "x" * 60, "--json", target="short", draft=None))
    assert status == 0 and json.loads(out)["finish_reason"] in ("length", "stop") and len(json.loads(out)["tokens"]) <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a list of messages like"),
        ('{"messages": []}', "must hold a list of messages like"),
        ('[{"role": "user"}]', "must hold a list of messages like"),
        ('[{"role": 3, "content": "hi"}]', "must hold a list of messages like"),
        ('"hi"', "must hold a list of messages like"),
    ],
)
def test_messages_that_cannot_be_read_are_one_line(models, refused, tmp_path, content, reason):
    path = tmp_path / "messages.json"
    if content is not None:
        path.write_text(content)
    line = refused(*generate(models, "--messages", path))
    assert str(path) in line and reason in line


def test_messages_are_a_conversation(models, run, tmp_path):
    """A list or an object that holds one; a system message goes before it; the same text as the string it amounts to."""
    turns = [{"role": "user", "content": "Where is the nest?"}]
    paths = [tmp_path / "list.json", tmp_path / "object.json"]
    paths[0].write_text(json.dumps(turns))
    paths[1].write_text(json.dumps({"messages": turns}))
    plain = ["--plain", "--json"]
    wanted = json.loads(run(*generate(models, turns[0]["content"], *plain))[1])["tokens"]
    for path in paths:
        assert json.loads(run(*generate(models, "--messages", path, *plain))[1])["tokens"] == wanted
    asked = json.loads(run(*generate(models, turns[0]["content"], "--system", "Be brief.", *plain))[1])["tokens"]
    assert asked == json.loads(run(*generate(models, "--messages", paths[0], "--system", "Be brief.", *plain))[1])["tokens"] != wanted


# ---- models that do not fit ----


def test_a_target_that_is_none_is_one_line(models, refused, tmp_path):
    absent = tmp_path / "absent"
    assert refused(*generate(models.parent, "hi", target=absent, draft=None)) == (
        f"target {absent} is neither a directory, a .gguf file nor a hub name like owner/model"
    )
    assert refused(*generate(models.parent, "hi", target=tmp_path, draft=None)) == f"{tmp_path / 'config.json'} does not exist"
    assert refused("generate", "hi", "--target", tmp_path / "no.gguf") == f"{tmp_path / 'no.gguf'} does not exist"


def test_a_draft_that_is_none_is_one_line(models, refused, tmp_path):
    end = "is not a directory with a config.json; give one that `eyas train` wrote, or `bundled`"
    assert refused(*generate(models, "hi", draft=tmp_path / "absent")) == f"draft {tmp_path / 'absent'} {end}"
    (tmp_path / "file").write_text("")
    assert refused(*generate(models, "hi", draft=tmp_path / "file")) == f"draft {tmp_path / 'file'} {end}"
    assert "is not a draft of eyas's making" in refused(*generate(models, "hi", draft=models / "target"))
    assert refused(*generate(models, "hi", "--method", "eagle3", draft=None)) == (
        "no draft for target; name one with --draft, train one with `eyas train`, or use --method plain"
    )


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("wide", "hidden size 32 against the target's 64"),
        ("wordy", "vocabulary 263 against the target's 300"),
        ("shallow", "taps (1, 2, 4) of a target with 3 layers"),
    ],
)
def test_a_draft_for_another_target_is_one_line(models, refused, target, reason):
    line = refused(*generate(models, "hi", target=target))
    assert line == f"this draft was trained for another target: {reason}; use the matching draft"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("fc.weight", None, "missing fc.weight"),
        ("d2t", None, "missing d2t"),
        ("extra.weight", torch.zeros(2), "unknown extra.weight"),
        ("midlayer.self_attn.q_proj.weight", torch.zeros(3, 5), "midlayer.self_attn.q_proj.weight is (3, 5), expected (32, 64)"),
    ],
)
def test_a_missing_surplus_or_misshaped_tensor_is_listed(models, refused, tmp_path, name, change, reason):
    files = contents(models / "draft")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({name: change} if change is not None else {}), tmp_path / "model.safetensors")
    assert refused(*generate(models, "hi", draft=tmp_path)) == f"draft {tmp_path} does not fit: {reason}"


@pytest.mark.parametrize("part", ["target", "draft"])
def test_truncated_weights_are_one_line(models, refused, tmp_path, part):
    for file, content in contents(models / part).items():
        (tmp_path / file).write_bytes(content[: len(content) // 2] if file.endswith(".safetensors") else content)
    line = refused(*generate(models, "hi", **{part: tmp_path}))
    assert line.startswith(f"{tmp_path / 'model.safetensors'} is damaged or cut short") and line.endswith("copy or download it again")


# ---- generate ----


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_method_gives_the_same_tokens(models, run, temperature):
    found = {}
    for method in ("plain", "eagle3", "lookup", "draft-model"):
        words = ["Tell me", "--seed", "7", "--temperature", temperature, "--json", "--method", method]
        status, out, err = run(*generate(models, *words))
        assert status == 0 and err == ""
        found[method] = json.loads(out)
        assert list(found[method]) == JSON_KEYS and found[method]["seed"] == 7
    assert len({tuple(result["tokens"]) for result in found.values()}) == len({result["text"] for result in found.values()}) == 1
    assert found["plain"]["tau"] == 1.0 and found["eagle3"]["rounds"] <= found["plain"]["rounds"]
    short = json.loads(run(*generate(models, "Tell me", "--seed", "7", "--temperature", temperature, "--json", "--plain"))[1])
    assert short["tokens"] == found["plain"]["tokens"]


def test_generate_streams_the_text_of_the_json_object(models, run):
    words = ["Tell me", "--seed", "3", "--temperature", "1"]
    result = json.loads(run(*generate(models, *words, "--json"))[1])
    status, out, err = run(*generate(models, *words))
    assert status == 0 and out == result["text"]
    assert re.fullmatch(r"\n\[\d+ tokens, \d+ rounds, tau \d\.\d\d, [\d.]+ tokens/s, seed 3\]\n", err)


def test_a_seed_is_drawn_and_reported(models, run):
    first, second = (json.loads(run(*generate(models, "hi", "--temperature", "1", "--json"))[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(run(*generate(models, "hi", "--temperature", "1", "--json", "--seed", first["seed"]))[1])
    assert again["tokens"] == first["tokens"]


def interrupt_round(monkeypatch, number: int) -> None:
    """Ctrl-C as round `number` begins."""
    calls, own = [], Decoder.round

    def interrupted(self, *words):
        calls.append(words)
        if len(calls) == number:
            raise KeyboardInterrupt
        return own(self, *words)

    monkeypatch.setattr(Decoder, "round", interrupted)


def test_ctrl_c_in_generate_keeps_the_text_so_far(models, run, monkeypatch):
    words = generate(models, "Tell me", "--plain")
    whole = run(*words)[1]
    interrupt_round(monkeypatch, 12)
    status, out, err = run(*words)
    assert status == 130 and err == "\neyas: interrupted\n"
    assert len(out) > 3 and out.endswith("\n") and whole.startswith(out[:-1]) and len(out) < len(whole)


# ---- chat and trace ----


def chat(models: Path, *words) -> list:
    return ["chat", *generate(models, *words)[1:]]


def test_chat_answers_every_line_and_ends_with_its_input(models, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is the nest?\nAnd now?\n"))
    status, out, err = run(*chat(models, "--max-new-tokens", "12"))
    assert status == 0 and out.count("> ") == 3
    assert len(re.findall(r"\[\d+ tokens, \d+ rounds, tau \d\.\d\d", err)) == 2
    first = json.loads(run(*generate(models, "Where is the nest?", "--max-new-tokens", "12", "--json"))[1])["text"]
    assert out.startswith(f"> {first}")


def test_chat_survives_ctrl_c_and_a_full_context(models, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" + "x" * 300 + "\nand now\n\nnever read\n"))
    interrupt_round(monkeypatch, 3)
    status, _, err = run(*chat(models, "--max-new-tokens", "8", "--plain"))
    assert status == 0
    assert "\n[stopped]\n" in err and err.count("tokens/s") == 1
    assert re.search(r"^eyas: the prompt has \d+ tokens, the model reads at most 256; shorten it$", err, re.MULTILINE)


def test_trace_tells_the_rounds_in_order(models, run):
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "2"]
    status, out, err = run(*words)
    assert status == 0 and err == ""
    order = [
        "The target reads the prompt",
        "low l, middle m, high h",
        "into one vector g: g_",
        "the target draws",
        "Round 1",
        "Step 1: the draft",
    ]
    order += ["reads g_", "makes a_", "its head guesses", "Step 2:", "does not exist", "stands in", "The tree", "target draws", "The walk"]
    order += ["bonus token", "Cache rows of the path stay", "Round 2", "Step 1", "The tree", "The walk", "Written in 2 rounds"]
    place = 0
    for words in order:
        assert words in out[place:], f"{words!r} is missing behind {out[:place][-60:]!r}"
        place = out.index(words, place) + len(words)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["", "--rounds", "2"], "the prompt is empty; give some text"),
        (["hi", "--rounds", "0"], "rounds must be at least 1, not 0"),
        (["hi", "--tree", "7x"], "tree shape '7x' is not understood; write NODESxDEPTHxTOPK (60x7x10), chain:K (chain:3) or auto"),
    ],
)
def test_trace_refuses_in_one_line(models, refused, words, line):
    assert refused("trace", *words, "--target", models / "target", "--draft", models / "draft") == line


def test_trace_without_a_draft_says_how_to_get_one(models, refused):
    assert refused("trace", "hi", "--target", models / "target") == (
        "no draft for target; name one with --draft, train one with `eyas train`, or use --method plain"
    )


# ---- train ----


def test_train_writes_a_draft_that_generate_uses(models, run, data, tmp_path):
    out = tmp_path / "draft"
    status, said, _ = run(*train(models, out, data, "--steps", "3"))
    assert status == 0 and said.startswith(f"draft written to {out}; try: eyas generate 'Tell me about hawks.' --target ")
    assert said.endswith(f"--draft {out}\n")
    told = json.loads((out / "training.json").read_text())
    assert told["steps"] == 3 and told["target_sha256"] == weights.directory_hash(models / "target") and told["curve"][-1]["step"] == 3
    assert told["data"] == {"kind": "conversations", "file": "data.jsonl", "skipped": 0, "duplicates_dropped": 0}
    assert told["settings"]["draft_vocab_size"] == 200 and told["versions"].keys() == {"eyas", "torch", "python"}
    assert told["taps_are_inputs_of_layers"] == [1, 2, 4] and "hours" in told
    drafted, plain = (json.loads(run(*generate(models, "Where?", "--json", *more, draft=out))[1]) for more in ([], ["--plain"]))
    assert drafted["tokens"] == plain["tokens"] and drafted["rounds"] <= plain["rounds"]


def test_a_broken_line_is_named_and_the_rest_goes_on(models, run, data, tmp_path):
    lines = data.read_text().splitlines()
    lines[2:2] = ['{"messages": [', '{"messages": [{"role": "user", "content": "hi"}]}']
    data.write_text("\n".join(lines))
    status, _, err = run(*train(models, tmp_path / "draft", data, "--steps", "1"))
    assert status == 0
    assert re.search(r"^skipped: line 3: not JSON \(.*\)$", err, re.MULTILINE)
    assert re.search(r"^skipped: line 4: no assistant turn in it$", err, re.MULTILINE)
    assert "skipped 2 of 14 conversations" in err
    assert json.loads((tmp_path / "draft" / "training.json").read_text())["data"]["skipped"] == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no conversation could be read (the file is empty)"),
        ("{\n[1]\n", "no conversation could be read (line 1: not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "no conversation with an answer"),
        (json.dumps(GOOD), "one conversation is too little to train on and measure with; give at least two"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_data_without_a_conversation_is_one_line(models, run, tmp_path, content, reason):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    status, _, err = run(*train(models, tmp_path / "draft", path, "--steps", "1"))
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("eyas: ") and reason in last
    assert all(line.startswith("skipped") for line in err.splitlines()[:-1])
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", "0"], "--steps must be above 0, not 0"),
        (["--tokens", "-5"], "--tokens must be above 0, not -5"),
        (["--minutes", "nan"], "--minutes must be above 0, not nan"),
        (["--workers", "-1"], "--workers must be above 0, not -1"),
        (["--unroll", "0"], "--unroll must be at least 1, not 0"),
        (["--learning-rate", "0"], "--learning-rate must be above 0, not 0.0"),
        (["--draft-vocab", "0"], "--draft-vocab must be at least 1, not 0"),
        (["--draft-vocab", "264"], "a draft vocabulary of 264 is larger than the target's 263; lower --draft-vocab"),
        (["--taps", "1,2"], "taps must be three different layers in ascending order between 0 and 4, not (1, 2)"),
        (["--taps", "1,2,5"], "taps must be three different layers in ascending order between 0 and 4, not (1, 2, 5)"),
        (["--taps", "low"], "--taps must be three layers like 2,15,27, not 'low'"),
    ],
)
def test_a_bad_setting_of_train_is_one_line(models, refused, data, tmp_path, words, line):
    assert refused(*train(models, tmp_path / "draft", data, *words)) == line
    assert not (tmp_path / "draft").exists()


def test_a_target_too_shallow_for_the_default_taps_is_one_line(models, refused, data, tmp_path):
    line = refused("train", "--target", models / "target", "--out", tmp_path / "draft", "--data", data, "--draft-vocab", "9")
    assert line == "a target of 5 layers is too shallow for the default taps; name three of its layers with --taps L,M,H"


def test_train_overwrites_nothing(models, refused, data, tmp_path):
    """Not a draft, not a file, not a directory with something in it."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("years of work")
    end = "exists and a draft's directory is replaced as a whole; choose a new or an empty directory as --out"
    assert refused(*train(models, out, data)) == f"{out} {end}"
    assert refused(*train(models, out / "notes.txt", data)) == f"{out / 'notes.txt'} {end}"
    assert contents(out) == {"notes.txt": b"years of work"}
    before = contents(models / "draft")
    line = refused(*train(models, models / "draft", data))
    assert line == f"{models / 'draft'} holds a draft already; go on with --resume, or choose another --out"
    assert contents(models / "draft") == before


def test_resume_without_a_checkpoint_is_one_line(models, refused, data, tmp_path):
    for out in (tmp_path / "absent", models / "draft"):
        assert refused(*train(models, out, data, "--resume")) == f"{out} holds no checkpoint to resume from; train without --resume"


def test_a_place_that_cannot_be_written_is_said_before_any_work(models, refused, data, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(*train(models, tmp_path / "file" / "draft", data))
    assert re.fullmatch(r"cannot write .*/file/draft \(Not a directory\); choose another --out|cannot write .*File exists.*", line)


def test_an_unwritable_result_of_bench_is_one_line(models, refused, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hi"}\n')
    line = refused("bench", "--prompts", prompts, "--target", models / "target", "--methods", "plain", "--out", tmp_path / "no" / "r.json")
    assert "r.json" in line and "No such file or directory" in line


def test_a_full_disk_at_the_end_of_training_is_one_line_and_keeps_the_older_draft(models, run, data, tmp_path, monkeypatch):
    out = tmp_path / "draft"
    assert run(*train(models, out, data, "--steps", "1"))[0] == 0
    before = contents(out)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    status, _, err = run(*train(models, out, data, "--steps", "2", "--resume"))
    assert status == 2 and contents(out) == before
    assert err.splitlines()[-1] == f"eyas: cannot write {out}: No space left on device; what was there before is untouched"


def test_any_other_trouble_with_files_is_one_line(models, refused, monkeypatch):
    def locked(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/locked/config.json")

    monkeypatch.setattr("eyas.engine.target_config", locked)
    assert refused(*generate(models, "hi")) == "Permission denied: /locked/config.json"


def test_a_checkpoint_of_other_settings_is_refused(models, run, data, tmp_path):
    out = tmp_path / "draft"
    assert run(*train(models, out, data, "--steps", "1"))[0] == 0
    status, _, err = run(*train(models, out, data, "--steps", "2", "--resume", "--learning-rate", "0.5", "--taps", "0,1,2"))
    end = f"(learning_rate {TrainSettings.learning_rate} there, 0.5 here; other taps); resume with the same or choose another --out"
    assert status == 2 and err.splitlines()[-1] == f"eyas: {out} was trained otherwise {end}"


def test_ctrl_c_in_train_saves_and_says_how_to_go_on(models, run, data, tmp_path, monkeypatch):
    out, steps = tmp_path / "my draft", training.Trainer.step

    def interrupted(self, batch):
        losses = steps(self, batch)
        if self.progress.steps == 2:
            raise KeyboardInterrupt
        return losses

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    words = train(models, out, data, "--steps", "4")
    status, said, err = run(*words)
    assert status == 130 and said == "" and err.endswith("\neyas: interrupted\n")
    (line,) = [line for line in err.splitlines() if "Go on with" in line]
    again = shlex.split(line.split("Go on with: eyas ")[1])
    assert again == [*map(str, words), "--resume"]
    assert torch.load(out / training.CHECKPOINT, weights_only=True)["progress"]["steps"] == 2
    monkeypatch.undo()
    assert run(*again)[0] == 0
    assert json.loads((out / "training.json").read_text())["steps"] == 4


# ---- as a process ----


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def eyas(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "eyas", *map(str, words)], capture_output=True, text=True, env=environment(), timeout=120)


def test_the_process_has_the_status_and_the_line(models):
    result = eyas(*generate(models, "hi", "--top-p", "0"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "eyas: top-p must be above 0 and at most 1 (1 is off), not 0.0\n"


def test_help_and_import_need_no_torch():
    code = "import sys, eyas, eyas.cli; eyas.cli.parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_real_ctrl_c_in_train_leaves_a_checkpoint(models, data, tmp_path):
    """The signal comes while it trains; --minutes alone would end it."""
    out = tmp_path / "draft"
    words = [sys.executable, "-m", "eyas", *map(str, train(models, out, data, "--minutes", "2"))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    for line in process.stderr:
        if "held out" in line:  # printed just before the first step
            break
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
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
