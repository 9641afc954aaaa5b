"""Models that are none, or do not fit: one line each, with what to do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.words import contents, generate


def test_a_target_that_is_none_is_one_line(models, refused, tmp_path):
    absent = tmp_path / "absent"
    assert refused(*generate(models.parent, "hi", target=absent, draft=None)) == (
        f"target {absent} is neither a directory, a .gguf file nor a hub name like owner/model"
    )
    assert "target ./absent is neither" in refused("generate", "hi", "--target", "./absent")  # no name of a hub's
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


@pytest.mark.parametrize("command", ["export", "publish", "train", "serve-command"])
def test_what_is_made_for_eagle3_alone_names_the_method_of_another_draft(models, refused, data, tmp_path, command):
    draft, out, target = tmp_path / "medusa", tmp_path / "out", ("--target", models / "target")
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "eyas": {"method": "medusa"}}))
    words = {
        "export": (draft, out, "--to", "vllm", *target),
        "publish": (draft, out, "--target-name", "owner/model", *target),
        "train": ("--from", draft, "--data", data, "--out", out, "--steps", "1", "--taps", "1,2,4", "--draft-vocab", "99", *target),
        "serve-command": (draft, "--engine", "vllm", *target),
    }
    line = refused(command, *words[command])
    assert line == f"{draft} is a draft for method medusa; what was asked for is made for eagle3's drafts only"
    assert not out.exists()


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
