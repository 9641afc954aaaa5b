"""`eyas export`, `import`, `serve-command`, `doctor` and `publish` as a user meets them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from eyas.commands import output
from eyas.commands.parser import LAYOUT_NAMES
from eyas.commands.serve_command import gain
from eyas.config import TreeShape
from eyas.files.eagle3_files import config_from_file
from eyas.formats.layouts import LAYOUTS
from tests.commands.words import contents
from tests.tiny import save_tiny_draft, save_tiny_target

LAYERS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    save_tiny_target(root / "target", num_hidden_layers=LAYERS)
    save_tiny_target(root / "other", num_hidden_layers=LAYERS, hidden_size=64)
    save_tiny_draft(root / "draft", root / "target", taps=None)
    save_tiny_draft(root / "modern", root / "target", taps=(1, 3, 6), fc_norm=True, norm_output=True)
    return root


def test_the_help_names_every_layout():
    assert re.split(", | or ", LAYOUT_NAMES) == list(LAYOUTS)


@pytest.mark.parametrize("layout", ["sglang", "vllm", "speculators", "safeailab", "safeailab-bin", "llama_cpp"])
def test_out_to_an_engine_and_back_is_the_same_draft(run, place, tmp_path, layout):
    status, out, _ = run("export", place / "draft", tmp_path / "there", "--to", layout, "--target", place / "target", "--weights", "fp32")
    assert status == 0 and "read back, logits equal ours (0 apart at most); taps (inputs of layers) 2, 4, 5" in out
    assert "serve it with:" in out and str(tmp_path / "there") in out
    status, out, _ = run("import", tmp_path / "there", tmp_path / "back", "--target-layers", LAYERS)
    assert status == 0 and "written as eyas's own; taps (inputs of layers) 2, 4, 5" in out
    assert contents(tmp_path / "back")["model.safetensors"] == contents(place / "draft")["model.safetensors"]
    assert config_from_file(tmp_path / "back") == config_from_file(place / "draft")


def test_a_draft_by_its_hub_name(run, refused, place, monkeypatch):
    def snapshot(name, allow_patterns):
        if name != "someone/draft":
            raise OSError("404 of many\nwords")
        assert "*.safetensors" in allow_patterns
        return str(place / "draft")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    status, out, _ = run("import", "someone/draft", "--dry-run", "--target-layers", LAYERS)
    assert status == 0 and out.startswith(f"{place / 'draft'}: eyas, width")
    assert (
        refused("import", "someone/else", "--dry-run")
        == "could not fetch someone/else from the hub (404 of many); give a local directory or .gguf"
    )


def test_an_import_measures_what_the_files_leave_open(run, place, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "SILENCE", 0.0)
    run("export", place / "draft", tmp_path / "there", "--to", "sglang", "--target", place / "target")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    del config["eagle_aux_hidden_state_layer_ids"]
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    status, out, err = run("import", tmp_path / "there", tmp_path / "back", "--target", place / "target")
    counted = re.findall(r"the draft's readings are measured: (\d) of (\d) readings", err)
    assert counted == [(str(done), counted[0][1]) for done in range(int(counted[0][1]) + 1)] and len(counted) > 2
    assert status == 0 and "layer ids: they name outputs, taps (2, 4, 5) (they name outputs" in out and "tokens a round" in out
    assert "it agrees with this target in none of them, so the file's own reading stands" in out, "a random draft shows nothing"
    own = json.loads((tmp_path / "back" / "config.json").read_text())["eyas"]
    assert own["target"] == "target" and len(own["target_sha256"]) == len(own["chat_template_sha256"]) == 64


def test_a_dry_run_only_says_what_it_is(run, place, tmp_path):
    run("export", place / "draft", tmp_path / "there", "--to", "speculators", "--target", place / "target")
    status, out, _ = run("import", tmp_path / "there", "--dry-run")
    assert status == 0 and "speculators, width 32, 200 draft tokens of 263" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_what_cannot_be_written_or_read_is_refused_in_one_line(refused, run, place, tmp_path):
    there, target = tmp_path / "there", ["--target", place / "target"]
    draft = place / "draft"
    assert "layout 'tensorrt' is unknown; choose sglang, vllm" in refused("export", draft, there, "--to", "tensorrt", *target)
    assert "takes weights as bf16, fp16, fp32, not q8_0" in refused("export", draft, there, "--to", "vllm", "--weights", "q8_0", *target)
    assert "llama.cpp computes neither" in refused("export", place / "modern", there, "--to", "llama_cpp", *target)
    assert "its code reads the inputs of layers 2, 4, 5" in refused("export", place / "modern", there, "--to", "safeailab", *target)
    assert "was not trained for the embedded target" in refused("export", draft, there, "--to", "vllm")
    other = refused("export", draft, there, "--to", "vllm", "--target", place / "other")
    assert "trained for another target: hidden size 32 against the target's 64" in other
    assert "makes one with" in (said := refused("export", draft, there, "--to", "openvino", *target)) or "make one with" in said
    assert "--python ov/bin/python" in said
    assert "no use for it" in refused("export", draft, there, "--to", "vllm", "--target-gguf", "x.gguf", *target)
    assert "chain must be at least 1" in refused("export", draft, there, "--to", "vllm", "--chain", "-3", *target)
    assert "is the draft itself" in refused("export", draft, draft, "--to", "vllm", "--force", *target)
    assert "name a directory to write to" in refused("import", draft)
    assert "does not exist; give a directory, a .gguf file or a hub name" in refused("import", tmp_path / "nothing", there)
    assert not there.exists()
    run("export", draft, there, "--to", "vllm", *target)
    before = contents(there)
    assert "exists; choose another place, or --force" in refused("export", draft, there, "--to", "sglang", *target)
    assert contents(there) == before
    assert run("export", draft, there, "--to", "sglang", "--force", *target)[0] == 0


def test_which_layers_are_read_needs_the_target(run, place, tmp_path):
    run("export", place / "draft", tmp_path / "there", "--to", "safeailab", "--target", place / "target")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    del config["eyas_export"]
    (tmp_path / "there" / "config.json").write_text(json.dumps(config))
    status, _, err = run("import", tmp_path / "there", tmp_path / "back")
    assert status == 2 and "give --target T" in err and err.count("\n") == 1 and not (tmp_path / "back").exists()


@pytest.mark.parametrize("layout", ["safeailab", "speculators", "llama_cpp"])
def test_what_eyas_exported_comes_back_without_a_word_about_its_target(run, place, tmp_path, layout):
    run("export", place / "draft", tmp_path / "there", "--to", layout, "--target", place / "target", "--weights", "bf16")
    assert run("import", tmp_path / "there", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back")["model.safetensors"] == contents(place / "draft")["model.safetensors"]
    assert config_from_file(tmp_path / "back") == config_from_file(place / "draft")


# ---- serving ----


def test_the_number_of_draft_tokens_follows_acceptance_and_cost():
    likely, unlikely = [0.8] * 7, [0.3] * 7
    best = [max(range(1, 8), key=lambda length: gain(shares[:length], 0.1)) for shares in (likely, unlikely)]
    assert best[0] > best[1]
    assert gain([0.5], 0.25) == 1.5 / 1.25
    assert max(gain(unlikely[:length], 1.0) for length in range(1, 8)) < 1, "where a draft step costs a target pass, nothing pays"


def test_a_command_is_printed_with_what_to_do_first(run, place, tmp_path):
    words = ["--target", place / "target"]
    status, out, _ = run("serve-command", place / "draft", "--engine", "vllm", *words)
    assert status == 0 and "vllm serve" in out and "# first" not in out and "expected gain over plain by draft tokens" in out
    status, out, _ = run("serve-command", place / "draft", "--engine", "llama_cpp", *words, "--cost", "1e-9")
    assert status == 0 and "# first: eyas export" in out and "-md OUT/draft.gguf" in out
    status, out, err = run("serve-command", place / "draft", "--engine", "vllm", "--target", place / "other")
    assert status == 2 and "trained for another target" in err and err.count("\n") == 1
    run("export", place / "draft", tmp_path / "there", "--to", "llama_cpp", *words)
    status, out, _ = run("serve-command", tmp_path / "there", "--engine", "llama_cpp", *words)
    assert status == 0 and "llama-server" in out and "# first" not in out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "openvino"])
def test_where_no_draft_token_pays_what_is_pasted_serves_the_target_alone(run, place, layout, monkeypatch):
    monkeypatch.setattr("eyas.commands.serve_command.gain", lambda shares, cost: 0.9)
    _, out, _ = run("serve-command", place / "draft", "--engine", layout, "--target", place / "target")
    pasted = [line for line in out.splitlines() if not line.startswith("#")]
    assert "# none pays at this cost: serve the target alone" in out and len(pasted) == (0 if "safeailab" in layout else 1)
    assert not any("draft" in line or "speculative" in line for line in pasted) and "# with the draft all the same: " in out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "openvino"])
def test_what_is_pasted_sets_the_template_variables_that_were_asked_under(run, place, tmp_path, layout):
    """Whether the draft pays or not, the engine is told the variables, or the user that its prompts must bring them."""
    target, variables = with_moods(place, tmp_path), {"mood": "it's calm"}
    words = ["serve-command", place / "draft", "--engine", layout, "--target", target, "--chat-template-kwargs", json.dumps(variables)]
    for cost in ("1e-9", "9"):
        status, out, _ = run(*words, "--cost", cost)
        assert status == 0
        pasted = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
        options = {"sglang": "--default-chat-template-kwargs", "llama_cpp": "--chat-template-kwargs", "safeailab": None}
        option = options.get(layout.removesuffix("-bin"), "--default-chat-template-kwargs")
        said = "# this command sets no variables of the chat template: render each prompt with" in out
        if option is None:
            assert said and not any(word.endswith("chat-template-kwargs") for line in pasted for word in line)
        else:
            assert not said and [json.loads(line[line.index(option) + 1]) for line in pasted] == [variables]


def test_a_draft_that_was_trained_under_variables_says_so_when_it_is_served_without(run, place, tmp_path):
    config = json.loads((place / "draft" / "config.json").read_text())
    config["eyas"]["chat_template_kwargs"] = {"mood": "calm"}
    shutil.copytree(place / "draft", tmp_path / "draft")
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    words = ["serve-command", tmp_path / "draft", "--engine", "vllm", "--target", with_moods(place, tmp_path)]
    assert '# it was trained under the chat template\'s variables {"mood": "calm"}' in run(*words)[1]
    assert "trained under" not in run(*words, "--chat-template-kwargs", '{"mood": "calm"}')[1]


def with_moods(place: Path, folder: Path) -> Path:
    """The target with a chat template that reads a variable."""
    shutil.copytree(place / "target", folder / "moody")
    path = folder / "moody" / "chat_template.jinja"
    path.write_text("{{ mood }}" + path.read_text())
    return folder / "moody"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_printed_command_survives_a_shell(place, layout):
    """Paths with blanks, quotes and letters of any alphabet come out as they went in."""
    draft, target = Path('/my models/it\'s a "dräft"'), "/targets/o'r $HOME `x`"
    words = shlex.split(LAYOUTS[layout].serve(draft, target, TreeShape.chain(3)))
    held = [word for word in words if str(draft) in word or json.dumps(str(draft), ensure_ascii=False) in word]
    assert len(held) == 1 and (layout in ("llama_cpp", "openvino", "speculators") or target in words)
    if alone := LAYOUTS[layout].serve_alone:
        assert layout in ("llama_cpp", "openvino") or target in shlex.split(alone(target))


def test_every_path_that_is_printed_is_quoted_and_absolute(run, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's here").symlink_to(place)
    _, out, _ = run("export", "it's here/draft", "my export", "--to", "vllm", "--target", "it's here/target")
    words = shlex.split(out.splitlines()[-1])
    assert words[:2] == ["vllm", "serve"] and Path(words[2]).is_absolute() and Path(words[2]).samefile(place / "target")
    assert json.loads(words[4])["model"] == str(tmp_path / "my export")
    _, out, _ = run("serve-command", "my export", "--engine", "llama_cpp", "--target", "it's here/target", "--cost", "1e-9")
    first = next(line for line in out.splitlines() if line.startswith("# first: ")).removeprefix("# first: ")
    imported, exported = (shlex.split(part) for part in first.split(" && "))
    assert imported[:3] == ["eyas", "import", str(tmp_path / "my export")] and exported[:4] == ["eyas", "export", "OWN", "OUT"]
    assert Path(imported[5]).samefile(place / "target") and Path(exported[7]).samefile(place / "target")


# ---- the doctor ----


def test_the_doctor_finds_what_a_config_says_wrongly(run, place, tmp_path):
    run("export", place / "draft", tmp_path / "there", "--to", "sglang", "--target", place / "target")
    path = tmp_path / "there" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 40, "tie_word_embeddings": True}))
    status, out, _ = run("doctor", tmp_path / "there", "--target", place / "target", "--tokens", "16")
    assert status == 1 and "layer count: num_hidden_layers is 40" in out and "tied head: " in out and "better by, standard errors" in out
    status, out, _ = run("doctor", tmp_path / "there", "--target", place / "target", "--tokens", "16", "--json")
    told = json.loads(out)
    assert status == 1 and not told["healthy"] and {"layer count", "tied head"} <= {finding["cause"] for finding in told["findings"]}
    assert len(told["readings"]) > 5 and len(told["acceptance"]) == 3


def test_the_doctor_refuses_what_is_not_there(refused, place, tmp_path):
    assert "does not exist" in refused("doctor", tmp_path / "nothing", "--target", place / "target")
    assert "tokens must be at least 8" in refused("doctor", place / "draft", "--tokens", "2")


# ---- publishing ----


def test_force_replaces_no_draft_that_was_trained(run, place, tmp_path):
    """Nor does `import` over what `train` wrote, which has a record of its training, nor `publish` over the draft itself."""
    target = ["--target", place / "target"]
    assert run("import", place / "draft", tmp_path / "own", *target, "--unmeasured")[0] == 0
    assert run("import", place / "draft", tmp_path / "own", *target, "--unmeasured", "--force")[0] == 0
    (tmp_path / "own" / "training.json").write_text("{}")
    before = contents(tmp_path / "own")
    status, _, err = run("import", place / "draft", tmp_path / "own", *target, "--force")
    assert status == 2 and "training.json; nothing is replaced" in err
    hub = ["--target-name", "us/tiny", "--licence", "mit", *target, "--force"]
    assert "is the draft itself" in run("publish", tmp_path / "own", tmp_path / "own", *hub)[2]
    assert contents(tmp_path / "own") == before
    for _ in range(2):
        assert run("publish", tmp_path / "own", tmp_path / "hub", *hub)[0] == 0
    (tmp_path / "hub" / "checkpoint").write_text("hours of work")
    assert "checkpoint; nothing is replaced" in run("publish", tmp_path / "own", tmp_path / "hub", *hub)[2]


def test_a_folder_for_the_hub_has_a_card_and_reads_back(run, place, tmp_path):
    result = tmp_path / "r.json"
    conditions = {"prompt_file": "mt_bench.jsonl", "prompt_count": 20, "max_new_tokens": 200, "precision": "bf16", "temperature": 0.0}
    measured = {"eagle3": {"tree": "60x7x10", "tau": 2.64, "tau_interval": [2.39, 2.93], "speedup": None}, "plain": {"tau": 1.0}}
    result.write_text(json.dumps({"conditions": conditions, "methods": measured}))
    words = ["publish", place / "draft", tmp_path / "hub", "--target", place / "target", "--target-name", "us/tiny", "--bench", result]
    status, out, _ = run(*words, "--licence", "mit", "--dry-run")
    assert status == 0 and "license: mit" in out and not (tmp_path / "hub").exists()
    status, out, _ = run(*words, "--licence", "mit")
    assert status == 0 and "hf upload" in out
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model: us/tiny" in card and "| mt_bench.jsonl, 20 of them | eagle3 | 60x7x10 | 0 | 2.64 [2.39, 2.93] | - |" in card
    for engine in ("sglang.launch_server --model-path us/tiny", "vllm serve us/tiny", "llama-server -m TARGET.gguf"):
        assert engine in card
    assert str(tmp_path) not in card and str(place) not in (tmp_path / "hub" / "config.json").read_text(), "no paths of this machine"
    assert config_from_file(tmp_path / "hub") == config_from_file(place / "draft")


def test_a_card_needs_a_name_and_a_licence(refused, place, tmp_path):
    words = ["publish", place / "draft", tmp_path / "hub", "--target", place / "target"]
    assert "--target-name owner/model" in refused(*words)
    assert "give one with --licence" in refused(*words, "--target-name", "us/tiny")
    (tmp_path / "bad.json").write_text("{}")
    bad = refused(*words, "--target-name", "us/tiny", "--licence", "mit", "--bench", tmp_path / "bad.json")
    assert "no result of `eyas bench --out`" in bad
    assert not (tmp_path / "hub").exists()
