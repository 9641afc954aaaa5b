"""`eyas train` on conversations of the user's: it writes a draft, loses nothing, and every trouble is one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from eyas.commands.train import ONLY_OF
from eyas.config import PRODUCTS, TrainSettings
from eyas.files import disk
from eyas.files.eagle3_files import config_from_file
from eyas.methods import METHODS, trained
from eyas.train import trainer as training
from eyas.train.losses import LOSSES
from tests.commands.words import GOOD, contents, generate, train
from tests.tiny import CHATML


def test_train_writes_a_draft_that_generate_uses(models, run, data, tmp_path):
    out = tmp_path / "draft"
    status, said, _ = run(*train(models, out, data, "--steps", "3"))
    assert status == 0 and said.startswith(f"draft written to {out}; try: eyas generate 'Tell me about hawks.' --target ")
    assert said.endswith(f"--draft {out}\n")
    told = json.loads((out / "training.json").read_text())
    assert told["steps"] == 3 and told["target_sha256"] == disk.directory_hash(models / "target") and told["curve"][-1]["step"] == 3
    rest = {"answer_tokens_cut": 0, "kept_apart": {"from": [], "prompts": 0, "dropped": 0}}
    assert told["data"] == {"kind": "conversations", "file": "data.jsonl", "skipped": 0, "duplicates_dropped": 0, **rest}
    assert told["settings"]["draft_vocab_size"] == 200 and told["versions"].keys() == {"eyas", "torch", "python"}
    assert told["taps_are_inputs_of_layers"] == [1, 2, 4] and "hours" in told
    drafted, plain = (json.loads(run(*generate(models, "Where?", "--json", *more, draft=out))[1]) for more in ([], ["--plain"]))
    assert drafted["tokens"] == plain["tokens"] and drafted["rounds"] <= plain["rounds"]


def test_text_of_others_is_measured_on_what_the_target_itself_answers(models, run, data, tmp_path):
    status, _, told = run(*train(models, tmp_path / "draft", data, "--steps", "3"))
    assert status == 0
    (line,) = [line for line in told.splitlines() if line.startswith("on the target's own answers to held-out questions")]
    assert float(line.split("tau ")[1].split()[0]) >= 1 and "trees 60x7x10" in line


def test_variables_of_the_template_are_recorded_and_told_on(models, run, data, tmp_path):
    """In training.json, the draft's config.json and the command that uses it; a resumed run has the same."""
    thoughtful, out = tmp_path / "thoughtful", tmp_path / "draft"
    shutil.copytree(models / "target", thoughtful)
    (thoughtful / "chat_template.jinja").write_text(
        CHATML + "{{ '<think></think>' if add_generation_prompt and enable_thinking is false }}"
    )
    words = [word if word != models / "target" else thoughtful for word in train(models, out, data, "--steps", "1")]
    variables = ["--chat-template-kwargs", '{"enable_thinking": false}']
    status, said, _ = run(*words, *variables)
    assert status == 0 and "--chat-template-kwargs '{\"enable_thinking\": false}'" in said
    recorded = {"enable_thinking": False}
    assert json.loads((out / "training.json").read_text())["chat_template_kwargs"] == recorded
    assert json.loads((out / "config.json").read_text())["eyas"]["chat_template_kwargs"] == recorded
    assert "other chat-template-kwargs" in run(*words, "--resume")[2]


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


def test_conversations_that_ask_what_an_evaluation_asks_are_left_out(models, run, data, tmp_path):
    """A shared run of 13 tokens (bytes here) in a user turn; where nothing is left, that is said."""
    whole = data.read_text()
    data.write_text(whole + whole.replace("Where is the nest?", "Who built it?"))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "Tell me: where is the nest"}) + "\n")
    apart = ("--steps", "1", "--apart", tmp_path / "eval.jsonl")
    assert run(*train(models, tmp_path / "draft", data, *apart))[0] == 0
    told = json.loads((tmp_path / "draft" / "training.json").read_text())["data"]
    assert told["kept_apart"] == {"from": ["eval.jsonl"], "prompts": 1, "dropped": 12}
    data.write_text(whole)
    status, _, err = run(*train(models, tmp_path / "none", data, *apart))
    assert status == 2 and err.endswith("holds no conversation with an answer to learn from; all of them ask what --apart's files ask\n")


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
    assert all(line.startswith(("skipped", "these answers")) for line in err.splitlines()[:-1])
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
        (["--taps", "2,1"], "taps must be different layers in ascending order between 0 and 4, not (2, 1)"),
        (["--taps", "1,2,5"], "taps must be different layers in ascending order between 0 and 4, not (1, 2, 5)"),
        (["--taps", "low"], "--taps must be layers like 2,15,27, not 'low'"),
    ],
)
def test_a_bad_setting_of_train_is_one_line(models, refused, data, tmp_path, words, line):
    assert refused(*train(models, tmp_path / "draft", data, *words)) == line
    assert not (tmp_path / "draft").exists()


def test_a_target_too_shallow_for_the_default_taps_is_one_line(models, refused, data, tmp_path):
    line = refused("train", "--target", models / "target", "--out", tmp_path / "draft", "--data", data, "--draft-vocab", "9")
    assert line == "a target of 5 layers is too shallow for the default taps; name others with `eyas train --taps L,M,H`"


def test_train_overwrites_nothing(models, refused, data, tmp_path):
    """Not a draft, not a file, not a directory with something in it."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("years of work")
    end = "exists and is not an empty directory; choose a new one as --out"
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

    def interrupted(self, *batch):
        losses = steps(self, *batch)
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


def test_two_processes_train_as_one_does(models, run, data, tmp_path):
    """torchrun with gloo: the loss of every step, the weights and the curve are those of one process on the same batches."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    more = ["--steps", "6", "--set", "measure_steps=2"]
    assert run(*train(models, alone, data, *more, "--workers", "2"))[0] == 0
    words = [*map(str, train(models, together, data, *more, "--workers", "1"))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eyas", *words]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("draft written to") == 1
    ours, theirs = (json.loads((out / "training.json").read_text()) for out in (alone, together))
    without_clock = [[{**point, "minutes": 0} for point in told["curve"]] for told in (ours, theirs)]
    assert without_clock[0] == without_clock[1] and [point["step"] for point in ours["curve"]] == [2, 4, 6]
    assert ours["slots"] == theirs["slots"]
    one, two = (load_file(out / "model.safetensors") for out in (alone, together))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_any_setting_of_training_can_be_named(models, run, data, tmp_path):
    out = tmp_path / "draft"
    wanted = ["--set", "loss=lk-lambda", "--set", "norm_output=true", "--set", "betas=0.8,0.9", "--set", "step_keep=1"]
    assert run(*train(models, out, data, "--steps", "2", *wanted))[0] == 0
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert (settings["loss"], settings["norm_output"], settings["betas"], settings["step_keep"]) == ("lk-lambda", True, [0.8, 0.9], 1.0)
    assert json.loads((out / "config.json").read_text())["norm_output"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=9", "there is no setting 'speed'; there are unroll_steps, "),
        ("clip=much", "clip is 1.0 by default; give one like it"),
        ("loss=best", "loss must be one of soft, lk-alpha, lk-lambda"),
        ("products=fp16", "products must be one of auto, fp32, bf16"),
        ("fc_norm=maybe", "fc_norm is False by default; give one like it"),
    ],
)
def test_a_setting_that_does_not_exist_is_one_line(models, run, data, tmp_path, text, said):
    status, _, err = run(*train(models, tmp_path / "draft", data, "--set", text))
    assert status == 2 and err.startswith(f"eyas: --set {text}: {said}") and err.count("\n") == 1


FLAGS = [name for name, default in asdict(TrainSettings()).items() if isinstance(default, bool)]
CHOICES = [("eagle3", "soft", "auto"), ("eagle1", "lk-alpha", "bf16"), ("medusa", "lk-lambda", "bf16"), ("mtp", "soft", "bf16")]
CHOICES += [("eagle3", "lk-alpha", "bf16"), ("eagle3", "lk-lambda", "fp32")]


@pytest.mark.parametrize(("method", "loss", "products"), CHOICES)
def test_every_choice_that_set_offers_trains_whatever_the_cpu_has(models, run, data, tmp_path, method, loss, products):
    """All of a method's flags are set; those of other methods are refused in one line."""
    assert {name for _, name, _ in CHOICES} == set(LOSSES) and {name for *_, name in CHOICES} == set(PRODUCTS)
    words = [*train(models, tmp_path / "draft", data, "--method", method, "--steps", "1", "--unroll", "2"), "--set", "tree_every=0"]
    own = [name for name in FLAGS if ONLY_OF[name] == method]
    for name in set(FLAGS) - set(own):
        status, _, err = run(*words, "--set", f"{name}=true")
        assert status == 2 and err == f"eyas: --set {name} is for method {ONLY_OF[name]}, not for {method}\n"
    flags = [word for name in own for word in ("--set", f"{name}=true")]
    status, _, err = run(*words, *flags, "--set", f"loss={loss}", "--set", f"products={products}")
    assert status == 0, err
    chosen = json.loads((tmp_path / "draft" / "training.json").read_text())["settings"]["products"]
    assert chosen == products if products != "auto" else chosen in PRODUCTS[1:]


def test_what_a_run_begins_with_and_stays_apart_from_is_checked_first(models, refused, data, tmp_path, monkeypatch):
    monkeypatch.setattr("eyas.commands.train.data_of", lambda *_: pytest.fail("data was written"))
    out = tmp_path / "draft"
    for words, said in (
        (["--from", tmp_path / "none"], "does not exist; give a directory, a .gguf file or a hub name"),
        (["--from", "bundled"], "this draft was trained for another target: hidden size 576 against the target's 32"),
        (
            ["--from", models / "draft", "--draft-vocab", "100"],
            "is of another shape (draft vocabulary 200 there, 100 here); ask for the same",
        ),
        (["--apart", tmp_path / "none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
    ):
        assert said in refused(*train(models, out, data, *words)) and not out.exists()


def test_a_budget_that_was_spent_before_is_said(models, run, data, tmp_path):
    words = train(models, tmp_path / "draft", data, "--steps", "2")
    assert run(*words)[0] == 0
    status, _, err = run(*words, "--resume")
    assert status == 0 and "the budget of 2 steps was spent before (2 steps, " in err and "nothing is trained; ask for more" in err


def test_only_the_top_layer_means_that_the_others_never_weigh(models, run, data, tmp_path):
    out = tmp_path / "draft"
    assert run(*train(models, out, data, "--steps", "3", "--set", "top_layer_only=true"))[0] == 0
    fc = load_file(out / "model.safetensors")["fc.weight"]
    width = fc.shape[1] // 3
    assert not fc[:, : 2 * width].any() and fc[:, 2 * width :].any()


def test_a_draft_is_trained_further_on_other_data(models, run, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*train(models, first, data, "--steps", "2"))[0] == 0
    lines = data.read_text().splitlines()
    (other := tmp_path / "other.jsonl").write_text("\n".join(lines[:6]))
    assert run(*train(models, second, other, "--steps", "1", "--from", first, "--set", "learning_rate=1e-9"))[0] == 0
    one, two = (load_file(out / "model.safetensors") for out in (first, second))
    assert json.loads((second / "training.json").read_text())["from"]["steps"] == 2  # its lineage stays on record
    assert torch.equal(one["d2t"], two["d2t"])
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-5) for name in one)
    status, _, err = run(*train(models, tmp_path / "third", other, "--steps", "1", "--from", first, "--set", "fc_norm=true"))
    assert status == 2 and err.splitlines()[-1] == f"eyas: {first} is of another shape (fc_norm False there, True here); ask for the same"


def test_a_draft_trained_further_keeps_its_shape_without_being_asked(models, run, data, tmp_path):
    """Its vocabulary's table above all: rows of its head stand for these tokens, whatever the new data says."""
    first, second = tmp_path / "first", tmp_path / "second"
    shape = ["--draft-vocab", "30", "--taps", "1,2,3,4", "--set", "draft_layers=2", "--set", "norm_output=true"]
    assert run(*train(models, first, data, "--steps", "1", *shape))[0] == 0
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"zyxwv {n}"}]} for n in range(4)]
    (other := tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "train",
        "--target",
        models / "target",
        "--out",
        second,
        "--data",
        other,
        "--steps",
        "1",
        "--from",
        first,
        "--set",
        "tree_every=0",
    ]
    assert run(*words)[0] == 0
    one, two = (load_file(out / "model.safetensors") for out in (first, second))
    assert len(one["d2t"]) == 30 and torch.equal(one["d2t"], two["d2t"]) and torch.equal(one["t2d"], two["t2d"])
    assert config_from_file(second) == config_from_file(first)


def test_a_draft_vocabulary_larger_than_what_was_said_is_filled_up_and_said_so(models, run, data, tmp_path):
    status, _, err = run(*train(models, tmp_path / "draft", data, "--steps", "1"))
    assert status == 0 and re.search(
        r"the answers use \d+ different tokens; the draft vocabulary of 200 is filled up with unused ones", err
    )
    assert len(load_file(tmp_path / "draft" / "model.safetensors")["d2t"]) == 200


@pytest.mark.parametrize(
    "shape", [["--taps", "0,1,2,3,4"], ["--taps", "3", "--set", "top_layer_only=true"], ["--set", "draft_layers=2"]], ids=" ".join
)
def test_a_draft_of_another_shape_trains_and_drafts_plain_text(models, run, data, tmp_path, shape):
    out = tmp_path / "draft"
    assert run(*train(models, out, data, "--steps", "2", *shape))[0] == 0
    words = ["--target", models / "target", "--max-new-tokens", "8", "--seed", "1"]
    told, plain = (json.loads(run("generate", "hi", *words, *more, "--json")[1]) for more in (["--draft", out], ["--plain"]))
    assert told["tokens"] == plain["tokens"] and told["rounds"] > 0
    status, said, _ = run("trace", "hi", *words, "--draft", out, "--rounds", "1")
    assert status == 0 and f"states before layer{'s' * ('3' not in shape)} " in said
    assert run(*train(models, out, data, "--steps", "3", *shape, "--resume"))[0] == 0


@pytest.mark.parametrize("method", [name for name in trained() if name != "eagle3"])
def test_train_makes_a_draft_of_any_method_that_generate_uses(models, run, data, tmp_path, method):
    out = tmp_path / "draft"
    status, said, _ = run(*train(models, out, data, "--method", method, "--steps", "2"))
    assert status == 0 and said.startswith(f"draft written to {out}; try: eyas generate")
    assert json.loads((out / "config.json").read_text())["eyas"]["method"] == method
    assert json.loads((out / "training.json").read_text())["method"] == method
    words = ["--target", models / "target", "--draft", out, "--max-new-tokens", "8", "--seed", "1", "--json"]
    told, plain = (json.loads(run("generate", "hi", *words, "--method", name)[1]) for name in (method, "plain"))
    assert told["tokens"] == plain["tokens"]
    status, _, err = run(*train(models, out, data, "--steps", "3", "--resume"))
    assert status == 2 and "another method" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "lookup"], f"method lookup has no draft to train; choose {', '.join(trained())}"),
        (["--method", "eagle9"], f"method 'eagle9' is unknown; choose {', '.join(METHODS)}"),
        (["--set", "token_left_out=true"], "--set token_left_out is for method eagle1, not for eagle3"),
        (["--method", "mtp", "--set", "top_layer_only=true"], "--set top_layer_only is for method eagle3, not for mtp"),
    ],
)
def test_a_method_that_cannot_be_trained_so_is_one_line(models, refused, data, tmp_path, words, line):
    assert refused(*train(models, tmp_path / "draft", data, *words)) == line
