"""`eyas new-draft`: one command from a model to a measured draft with its card, which goes on where it was stopped."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from eyas import cli
from eyas.commands import new_draft
from eyas.commands.output import terminal
from eyas.files.disk import recover_directory
from eyas.train import card, device_writer, forecast, writers
from eyas.train import trainer as training
from tests.commands.words import environment
from tests.own_cache import own_cache
from tests.tiny import save_tiny_draft, save_tiny_target
from tests.train.test_card import TOLD

HOURS = "0.001"  # three seconds: one shard, and the steps that fit


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_target(root / "target", 0, num_hidden_layers=7)
    save_tiny_target(root / "other", 1, num_hidden_layers=7)
    save_tiny_target(root / "shallow", 0, num_hidden_layers=3)
    return root / "target"


@pytest.fixture
def place(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("EYAS_CACHE", own_cache(tmp_path / "cache"))
    monkeypatch.setattr(new_draft, "LEAST_HOURS", 0.001)
    monkeypatch.setattr(new_draft, "METHODS", "plain,eagle3@chain:2")
    monkeypatch.setattr(new_draft, "MEASURED", 3)
    monkeypatch.setattr(writers, "GRACE", 30.0)  # random models say little, and the time here is next to none
    monkeypatch.setattr(card, "FEWEST", 1)  # figures of three questions are luck, and serve here
    return tmp_path


@pytest.fixture
def amounts(place, monkeypatch) -> list[float]:
    """Writing and training end at an amount, so that what comes of them hangs on no clock; the minutes that they were given."""
    given = []

    def tokens_for(minutes: float, **limits: float) -> writers.Limit:
        given.append(minutes)
        return writers.Limit(tokens=300, **limits)

    monkeypatch.setattr(new_draft, "Limit", tokens_for)
    budget = training.Budget
    monkeypatch.setattr(training, "Budget", lambda minutes: (given.append(minutes), budget(steps=3))[1])
    return given


def words(target: Path, out: Path, *more: str) -> list[str]:
    return ["new-draft", str(target), "--hours", HOURS, "--out", str(out), *more]


def test_one_command_makes_a_draft_that_tells_what_it_is(target, place, amounts, writes_here, capsys, monkeypatch):
    out, own = place / "draft", new_draft.run_bench
    monkeypatch.setattr(new_draft, "run_bench", lambda *given: own(*given[:-1]))
    assert cli.main(words(target, out)) == 0
    shares = (new_draft.WRITING, new_draft.TRAINING)
    assert amounts == pytest.approx([60 * float(HOURS) * share for share in shares])
    said = capsys.readouterr().out
    assert said.strip().endswith(f"eyas generate 'Tell me about hawks.' --target {target} --draft {out}")
    told, measured = json.loads((out / "training.json").read_text()), json.loads((out / "bench.json").read_text())
    text = (out / card.CARD).read_text()
    best = max(point["tau"] for point in told["curve"])
    for fact in (f"{told['slots']:,} answer tokens", f"tau, {best:.2f}", f"eyas new-draft {target}", told["target_sha256"][:16]):
        assert fact in text, fact
    tau = measured["methods"]["eagle3@chain:2"]["tau"]
    assert f"| eagle3@chain:2 | chain:2 | {tau:.2f}" in text and tau >= 1
    assert (out / card.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert told["data"]["answer_tokens"] >= 300 and told["data"]["shards"] and told["steps"] == 3
    assert cli.main(["generate", "hi", "--target", str(target), "--draft", str(out), "--max-new-tokens", "4", "--tree", "chain:2"]) == 0
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.main(words(target, out)) == 0
    assert "is finished" in capsys.readouterr().out and (out / "model.safetensors").read_bytes() == before


def test_what_there_is_no_time_to_measure_is_said(target, tmp_path, capsys, monkeypatch):
    """One question is measured, however late it is; the card says how many were left out."""
    out = save_tiny_draft(tmp_path / "draft", target)
    (out / "training.json").write_text(json.dumps(TOLD | {"minutes": 6.0}))
    options = SimpleNamespace(model=str(target), arguments=["new-draft"], first=[], plugins=[])
    words = SimpleNamespace(directory=target, template=SimpleNamespace(chat=True))
    job = SimpleNamespace(out=out, hours=0.2, words=words, studied=SimpleNamespace(chat_template_kwargs=None), device="cpu")
    own, left = new_draft.run_bench, []

    def late(*given):
        left.append((given[-1] - time.monotonic()) / 60)
        return own(*given[:-1], -math.inf)

    monkeypatch.setattr(new_draft, "run_bench", late)
    monkeypatch.setattr(new_draft, "METHODS", "plain,eagle3@chain:2")
    new_draft.finish(options, job, new_draft.Run("", 0.2, "", 5.0), ["One?", "Two?", "Three?"], terminal(stderr=True))
    assert "measured on 1 of 3 held-out questions: the time of --hours is over" in capsys.readouterr().err
    assert left[0] < 1, "of twelve minutes writing took five and training six"
    assert "Too few to say: 1 question of 3 could be asked in the time given" in (out / card.CARD).read_text()


KILLED_HOURS = 0.004
QUICK = make_dataclass("Quick", [("checkpoint_minutes", float, 0.001)], bases=(new_draft.TrainSettings,), frozen=True)
PROGRAM = f"""
import sys
from dataclasses import make_dataclass
from eyas import cli
from eyas.commands import new_draft as n
n.LEAST_HOURS, n.METHODS = 0, "plain,eagle3@chain:2"
field = ("checkpoint_minutes", float, {QUICK.checkpoint_minutes})
n.TrainSettings = make_dataclass("Quick", [field], bases=(n.TrainSettings,), frozen=True)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_where_it_was(target, place, monkeypatch):
    """Killed once while the target writes and once in training: what was written and trained is used, not made again."""
    out = place / "draft"
    command = ["new-draft", str(target), "--hours", str(KILLED_HOURS), "--out", str(out)]

    def killed_when(condition) -> None:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *command], stderr=subprocess.DEVNULL, env=environment())
        while not condition() and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()

    killed_when(lambda: any(place.glob("cache/selfplay/*/*.safetensors")))
    assert json.loads((out / new_draft.RUN).read_text())["written_minutes"] > 0 and not (out / training.CHECKPOINT).exists()
    first = {path.name: path.stat().st_mtime_ns for path in place.glob("cache/selfplay/*/*.safetensors")}
    killed_when(lambda: (out / training.CHECKPOINT).exists())
    shards = sorted(place.glob("cache/selfplay/*/*.safetensors"))
    assert first.items() <= {path.name: path.stat().st_mtime_ns for path in shards}.items(), "what was written is not written again"
    recover_directory(out)  # a kill may fall between the two renames of a save
    before = torch.load(out / training.CHECKPOINT, weights_only=True)["progress"]
    assert not json.loads((out / new_draft.RUN).read_text())["finished"]

    monkeypatch.setattr(new_draft, "TrainSettings", QUICK)
    monkeypatch.setattr(new_draft, "write", lambda *_: pytest.fail("wrote again"))
    resumed = []
    own = training.Trainer.resume
    monkeypatch.setattr(training.Trainer, "resume", lambda self, state: (own(self, state), resumed.append(self.progress.steps)))
    assert cli.main(command) == 0
    told = json.loads((out / "training.json").read_text())
    assert resumed == [before["steps"]] and told["steps"] >= before["steps"] > 0
    assert told["minutes"] >= round(before["minutes"], 2) and before["minutes"] > 0, "the time that was spent counts"
    assert told["data"]["shards"] == [f"{path.parent.name}/{path.name}" for path in shards]
    assert json.loads((out / new_draft.RUN).read_text())["finished"]


def test_wishes_that_cannot_be_met_are_one_line(target, place, capsys, monkeypatch):
    out = place / "draft"
    out.mkdir()
    (out / "notes.txt").write_text("mine")

    def refused(*words: str) -> str:
        assert cli.main(list(map(str, words))) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("eyas: ")
        return said

    assert "holds other things than a run of new-draft" in refused(*words(target, out))
    (out / "notes.txt").unlink()
    new_draft.Run("another", float(HOURS), "").save(out)
    assert "was begun otherwise (target_sha256 another there" in refused(*words(target, out))
    assert "is too short to train anything" in refused("new-draft", target, "--hours", "0.0001", "--out", place / "x")
    assert "is too short to train anything" in refused("new-draft", target, "--hours", "nan", "--out", place / "x")
    assert "too shallow for the default taps" in refused(*words(target.parent / "shallow", place / "y"))
    assert not (place / "x").exists() and not (place / "y").exists()


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(target, place, capsys, monkeypatch):
    monkeypatch.setattr(forecast.writing_rate, "__defaults__", (0.4,))
    monkeypatch.setattr(forecast.forecast, "__defaults__", (0.4,))
    assert cli.main(words(target, place / "draft", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"the draft trains [\d.]+ million parameters: [\d.]+ GB of memory beside the target's", lines[0])
    told = r"0 minutes of {} at {} answer tokens a second: \d+ thousand, [\d.]+ {}"
    assert re.fullmatch(told.format("writing", r"\d+", "GB of disk"), lines[1])
    assert re.fullmatch(told.format("training", r"[1-9]\d*", "passes over what was written"), lines[2])
    assert "GB are free" in lines[3] and not (place / "draft").exists() and not (place / "cache" / "selfplay").exists()


def test_on_a_card_the_model_writes_tokens_and_reads_them_again(target, place, amounts, capsys, monkeypatch):
    """What a GPU does, by the same steps on this CPU: text as tokens, states kept, a measured draft; and a dry run that tells memory."""
    monkeypatch.setattr(new_draft.Job, "on_card", property(lambda job: True))
    assert cli.main(words(target, place / "draft")) == 0
    told = json.loads((place / "draft" / "training.json").read_text())
    assert told["data"]["answer_tokens"] >= 300 and "shards" not in told["data"] and told["steps"] == 3
    (text,) = told["data"]["texts"]
    assert (place / "cache" / "selfplay" / text["file"]).is_file() and told["data"]["settings"][0]["device"] == "cpu"
    assert (place / "draft" / card.CARD).exists() and json.loads((place / "draft" / "bench.json").read_text())["methods"]
    monkeypatch.setattr(forecast.forecast_on, "__defaults__", (2.0,))
    monkeypatch.setattr(device_writer, "MOST_SLOTS", 16)
    capsys.readouterr()
    assert cli.main(words(target, place / "other", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("on the card: the target takes about 0.0 GB") and "a conversation under way takes" in lines[1]
    assert re.search(r"minutes of writing at [1-9]\d* answer tokens a second", lines[3])
    assert cli.main(["new-draft", str(target), "--hours", HOURS, "--out", str(place / "third"), "--device", "cuda:9"]) == 2


def test_a_model_of_another_family_gets_a_draft_too(place, amounts, writes_here, capsys):
    """A GPT-NeoX, run by transformers, writes, trains its draft and is sped up by it: same text, real rounds."""
    base = save_tiny_target(place / "llama", 0, num_hidden_layers=7)
    torch.manual_seed(0)
    sizes = {"vocab_size": 263, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=256, eos_token_id=257, bos_token_id=261))
    model.save_pretrained(place / "neox")
    for file in base.glob("*token*"):
        (place / "neox" / file.name).write_bytes(file.read_bytes())
    for file in base.glob("chat_template*"):
        (place / "neox" / file.name).write_bytes(file.read_bytes())
    assert cli.main(words(place / "neox", place / "draft")) == 0
    assert json.loads((place / "draft" / "bench.json").read_text())["methods"]["eagle3@chain:2"]["tau"] >= 1
    command = ["generate", "hi", "--target", place / "neox", "--max-new-tokens", "12", "--precision", "fp32", "--json"]
    told = []
    for more in (["--draft", place / "draft", "--tree", "8x2x3"], ["--plain"]):
        capsys.readouterr()
        assert cli.main([*map(str, command), *map(str, more)]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["tokens"] == told[1]["tokens"]
