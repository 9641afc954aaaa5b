"""`eyas train` on text the target writes itself: shards are written, shared between runs, and a run goes on with those it began with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eyas import cli
from eyas.files.disk import file_hash
from eyas.kernels import native
from eyas.train.decontaminate import questions
from eyas.train.features import shard_examples
from eyas.train.template import Template
from eyas.train.texts import pack_text
from eyas.train.writers import writing_precision
from tests.own_cache import own_cache
from tests.tiny import byte_tokenizer, save_tiny_target

TAPS = ["--taps", "1,2,4", "--draft-vocab", "200", "--unroll", "3", "--workers", "1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, writes_here) -> Path:
    """A cache in which a first run of three steps left its shards."""
    root = tmp_path_factory.mktemp("selfplay")
    save_tiny_target(root / "target", 0)
    save_tiny_target(root / "other", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EYAS_CACHE", own_cache(root / "cache"))
        assert cli.main(words(root, "first", "--self-play", "1500", "--steps", "3")) == 0
    return root


@pytest.fixture(autouse=True)
def environment(cache, monkeypatch) -> None:
    monkeypatch.setenv("EYAS_CACHE", str(cache / "cache"))


def words(root: Path, out: str, *more, target: str = "target") -> list[str]:
    return ["train", "--target", str(root / target), "--out", str(root / out), *TAPS, *map(str, more)]


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("cache/selfplay/*/*.safetensors"))


def told(root: Path, out: str) -> dict:
    return json.loads((root / out / "training.json").read_text())


def test_the_target_writes_what_is_wanted_and_the_run_says_what_it_was(cache):
    data = told(cache, "first")["data"]
    assert data["kind"] == "self-written" and data["answer_tokens"] >= 1500
    there = [f"{shard.parent.name}/{shard.name}" for shard in shards(cache)]  # a worker may have been a shard ahead
    assert data["shards"] == there[: len(data["shards"])] and len(data["settings"]) == 1
    assert told(cache, "first")["steps"] == 3


def test_shards_of_an_earlier_run_train_alone_or_beside_new_ones(cache, capsys):
    folder = shards(cache)[0].parent
    before = shards(cache)
    assert cli.main(words(cache, "alone", "--shards", folder, "--steps", "1")) == 0
    assert shards(cache) == before  # nothing was written
    assert told(cache, "alone")["data"]["shards"] == [f"{shard.parent.name}/{shard.name}" for shard in before]
    capsys.readouterr()
    assert cli.main(words(cache, "stranger", "--shards", folder, "--steps", "1", target="other")) == 2
    assert "was written by another target or in another way (target differ)" in capsys.readouterr().err
    assert cli.main(words(cache, "nothing", "--shards", cache, "--steps", "1")) == 2
    assert "is not a folder of self-written shards" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_its_own_shards_where_the_folder_has_grown(cache, capsys):
    began = told(cache, "first")["data"]["shards"]
    assert cli.main(words(cache, "second", "--self-play", "3000", "--steps", "1")) == 0
    assert len(shards(cache)) > len(began)
    assert cli.main(words(cache, "first", "--self-play", "3000", "--steps", "5", "--resume")) == 0
    assert told(cache, "first")["data"]["shards"] == began and told(cache, "first")["steps"] == 5


def test_the_turns_of_a_file_are_answered_anew_each_once(cache, capsys, tmp_path):
    """The target's own answers replace the file's; the shards hold no other question."""
    rows = [{"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Zzz."}]} for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = set(shards(cache))
    assert cli.main(words(cache, "anew", "--data", tmp_path / "mine.jsonl", "--regenerate", "--steps", "1")) == 0
    data = told(cache, "anew")["data"]
    assert data["kind"] == "self-written" and data["settings"][0]["regenerate"] and len(data["shards"]) == 2
    tokenizer, asked = byte_tokenizer(), []
    for path in sorted(set(shards(cache)) - before):
        with safe_open(path, framework="pt") as file:
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths").tolist()
        for part in tokens.split(lengths):
            text = tokenizer.decode(part.tolist())
            asked += re.findall(r"user\n(Question \d+\?)<\|im_end\|>", text)
            assert "Zzz." not in text
    assert 6 <= len(asked) == len(set(asked)) <= 12 and data["conversations"] == len(asked)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--regenerate"], "--regenerate answers anew what a file asks; name it with --data F.jsonl"),
        (["--disk", "0"], "--disk must be above 0 gigabytes, not 0.0"),
        (["--disk", "0.00001", "--self-play", "99999", "--seed-prompts", "q.jsonl"], "ask for fewer, or give more with --disk"),
    ],
)
def test_wishes_about_own_data_that_cannot_be_met_are_one_line(cache, capsys, tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "Who?"}\n')
    assert cli.main(words(cache, "no", *more, "--steps", "1")) == 2
    assert said in (line := capsys.readouterr().err.splitlines()[-1]) and line.startswith("eyas: ")
    assert not (cache / "no").exists()


def test_a_tokenizer_that_does_not_belong_is_refused(tmp_path, capsys):
    small = save_tiny_target(tmp_path / "small", vocab_size=200)
    assert cli.main(["train", "--target", str(small), "--out", str(tmp_path / "draft"), "--taps", "1,2,4", "--draft-vocab", "99"]) == 2
    assert "tokens, its model 200: they do not belong together; put the model's own tokenizer there" in capsys.readouterr().err


def test_a_model_without_a_chat_template_writes_plain_text_and_says_so(tmp_path, capsys, writes_here):
    base = save_tiny_target(tmp_path / "base")
    tokenizer = byte_tokenizer(None)
    for file in base.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(base)
    assert cli.main(words(tmp_path, "draft", "--self-play", "300", "--steps", "1", target="base")) == 0
    assert "no chat template: the target writes plain text instead of conversations" in " ".join(capsys.readouterr().err.split())
    assert told(tmp_path, "draft")["data"]["settings"][0]["template"] == "plain text, no chat template"


def test_what_an_evaluation_asks_is_left_out_of_training(cache, tmp_path):
    """Every self-written conversation whose question meets a prompt of the file; training.json says how many."""
    folder = cache / "cache" / "selfplay" / Path(told(cache, "first")["data"]["shards"][0]).parent
    template = Template(byte_tokenizer(), (257,))
    examples = shard_examples(sorted(folder.glob("*.safetensors")), 1024)
    asked = [turn[:14] for example in examples for turn in questions(example, template)]  # a given opening; behind it may be no text
    texts = [(byte_tokenizer().decode(turn), turn) for turn in asked]
    opening = next(text for text, turn in texts if text.strip() == text and template.tokens(text) == turn and len(turn) == 14)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": opening}) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "nobody asked this of anybody"}) + "\n")
    files = ("--apart", tmp_path / "eval.jsonl", "--apart", tmp_path / "other.jsonl")  # as good as both after one
    assert cli.main(words(cache, "apart", "--shards", folder, *files, "--steps", "1")) == 0
    data = told(cache, "apart")["data"]
    assert data["kept_apart"]["from"] == ["eval.jsonl", "other.jsonl"] and data["kept_apart"]["dropped"] >= 1


def test_text_without_states_trains_the_draft_that_its_shards_train(cache, capsys):
    folder, packed = shards(cache)[0].parent, cache / "text.safetensors"
    pack_text([folder], packed)
    before = shards(cache)
    assert cli.main(words(cache, "of shards", "--shards", folder, "--steps", "3", "--set", "products=fp32")) == 0
    assert cli.main(words(cache, "of text", "--text", packed, "--steps", "3", "--set", "products=fp32")) == 0
    assert shards(cache) == before
    ours, theirs = (told(cache, name) for name in ("of text", "of shards"))
    assert ours["data"]["texts"] == [{"file": "text.safetensors", "sha256": file_hash(packed)}]
    same = ("answer_tokens", "conversations", "settings", "dropped", "looped")
    assert [ours["data"][name] for name in same] == [theirs["data"][name] for name in same]
    if writing_precision() == "bf16" and native.kernel() is not None:
        files = [load_file(cache / name / "model.safetensors") for name in ("of text", "of shards")]
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_a_run_on_text_goes_on_with_that_text_alone(cache, capsys):
    packed, other = cache / "text.safetensors", cache / "other.safetensors"
    pack_text([shards(cache)[0].parent], packed)
    with safe_open(packed, framework="pt") as file:
        save_file(load_file(packed), other, {"text": file.metadata()["text"] + " "})
    assert cli.main(words(cache, "goes on", "--text", packed, "--steps", "2")) == 0
    assert cli.main(words(cache, "goes on", "--text", packed, "--steps", "4", "--resume")) == 0
    assert told(cache, "goes on")["steps"] == 4
    for more, said in (
        (("goes on", "--text", other, "--steps", "5", "--resume"), "the run was trained on other text; resume with the same --text"),
        (("both", "--text", packed, "--self-play", "99", "--steps", "1"), "--text brings text that the target wrote before"),
    ):
        assert cli.main(words(cache, *more)) == 2 and said in capsys.readouterr().err
    assert cli.main(words(cache, "stranger", "--text", packed, "--steps", "1", target="other")) == 2
    assert "was written by another target or in another way (target differ)" in capsys.readouterr().err
