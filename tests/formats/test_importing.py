"""Drafts as others write them: what their files leave open or say wrongly is decided, told, or refused in one line."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch

from eyas.config import EyasError
from eyas.files.gguf_check import check_gguf
from eyas.files.tensors import read_tensors, save_tensors
from eyas.files.untrusted import tensors_of, unpickled
from eyas.formats import llama_cpp
from eyas.formats.export import export
from eyas.formats.importing import completed, resolve
from eyas.formats.layouts import find
from eyas.formats.llama_cpp import FILE
from eyas.formats.portable import own_draft


@pytest.fixture
def foreign(draft, target, tmp_path):
    """A plain directory as another trainer would leave it; `change(config, tensors)` alters it first."""

    def written(change=lambda config, tensors: None, layout="sglang"):
        folder = tmp_path / "foreign"
        export(draft, tmp_path, layout, folder, target, "fp32", force=True)
        config, tensors = json.loads((folder / "config.json").read_text()), read_tensors(folder)
        change(config, tensors)
        save_tensors(folder, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return written


def drop(*names):
    def change(config, tensors):
        for name in names:
            config.pop(name, None)
            tensors.pop(name, None)

    return change


def wrapped(config, tensors):
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


IDS = ("eagle_aux_hidden_state_layer_ids", "eagle_config")


def test_no_ids_mean_the_default_triple(foreign):
    found = find(foreign(drop(*IDS)))
    assert found.layer_ids is None and found.taps(8) == (2, 4, 5) and found.taps(30) == (2, 15, 27)
    assert "layer ids" not in found.doubts


def test_ids_under_eagle_config_name_outputs_and_ids_at_the_top_inputs(foreign):
    """Traps 2 and 28: the same numbers mean different layers."""
    outputs = find(foreign(drop("eagle_aux_hidden_state_layer_ids")))
    assert (outputs.layer_ids, outputs.counts, outputs.taps(8)) == ((1, 3, 4), "outputs", (2, 4, 5))
    inputs = find(foreign(drop("eagle_config")))
    assert (inputs.layer_ids, inputs.counts, inputs.taps(8)) == ((2, 4, 5), "inputs", (2, 4, 5))
    assert outputs.doubts["layer ids"] == inputs.doubts["layer ids"] == ["inputs", "outputs"], "which is measured where a target is at hand"


def test_both_spellings_that_agree_leave_no_doubt(foreign):
    found = find(foreign())
    assert "layer ids" not in found.doubts and found.taps(8) == (2, 4, 5)
    wrong = find(foreign(lambda config, tensors: config["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[2, 4, 5])))
    assert "layer ids" in wrong.doubts and "do not name the same layers" in " ".join(wrong.wrong)


def test_the_output_of_the_last_layer_is_named(foreign):
    """Some engines hand it to a draft; eyas taps inputs of layers."""

    def ids(place, *numbers):
        def change(config, tensors):
            drop(*IDS)(config, tensors)
            config |= {place: [*numbers]} if place == IDS[0] else {place: {IDS[0]: [*numbers]}}

        return find(foreign(change))

    for place in IDS:
        with pytest.raises(EyasError, match=r"layer ids \[2, 4, 8\] name the output of the last of 8 layers") as refused:
            resolve(ids(place, 2, 4, 8), 8)
        assert "\n" not in str(refused.value)
    with pytest.raises(EyasError, match=r"layer ids \[2, 4, 9\] fit no reading"):
        resolve(ids(IDS[0], 2, 4, 9), 8)


def test_a_missing_theta_is_ten_thousand_and_told(foreign):
    """Trap 9."""
    found = find(foreign(drop("rope_theta", "rope_parameters")))
    assert found.shape["rope_theta"] == 10000.0 and "names no rope theta" in " ".join(found.told)


def test_theta_in_rope_parameters_alone_is_read(foreign):
    """Trap 9: transformers 5 moves it there, and readers of config.rope_theta silently take 10000."""

    def moved(config, tensors):
        del config["rope_theta"]
        config["rope_parameters"]["rope_theta"] = 500.0

    found = find(foreign(moved))
    assert found.shape["rope_theta"] == 500.0
    assert found.doubts["rope_theta"] == [500.0, 10000.0], "such configs are known to lie: measured where a target is at hand"


@pytest.mark.parametrize("prefix", ["model.", "model.layers.0.", "layers.0."])
def test_names_with_other_prefixes_are_the_same_names(foreign, draft, prefix):
    def renamed(config, tensors):
        for name in list(tensors):
            if name.startswith("midlayer.") or prefix == "model.":
                tensors[prefix + name.removeprefix("midlayer.") if "layers" in prefix else prefix + name] = tensors.pop(name)
        if prefix == "model.":  # d2t and t2d never have it
            for name in ("d2t", "t2d"):
                tensors[name] = tensors.pop(f"model.{name}")

    found = find(foreign(renamed))
    assert set(found.weights) == set(draft.weights)


def test_wrong_counts_in_a_config_are_told_and_the_tensors_believed(foreign):
    """Traps 17, 18 and 27."""

    def lies(config, tensors):
        config.update(num_hidden_layers=40, intermediate_size=99, head_dim=3, tie_word_embeddings=True, draft_vocab_size=7)

    found = find(foreign(lies))
    told = " ".join(found.wrong)
    assert found.shape["intermediate_size"] == 48 and found.shape["head_dim"] == 8 and found.shape["draft_vocab_size"] == 200
    assert all(
        words in told for words in ("num_hidden_layers 40", "intermediate_size 99", "head_dim 3", "ties the head", "draft_vocab_size 7")
    )


def test_ids_in_the_place_of_offsets_are_seen_by_the_mask(foreign, draft):
    """Trap 13."""
    found = find(foreign(lambda config, tensors: tensors.update(d2t=draft.vocab.ids.clone())))
    assert torch.equal(found.vocab.ids, draft.vocab.ids) and "holds ids, not offsets" in " ".join(found.wrong)
    with pytest.raises(EyasError, match="is d2t an offset table"):
        find(foreign(lambda config, tensors: (tensors.update(d2t=draft.vocab.ids.clone()), tensors.pop("t2d"))))


def test_a_vocabulary_can_be_had_from_either_table(foreign, draft):
    assert torch.equal(find(foreign(drop("t2d"))).vocab.ids, draft.vocab.ids)
    assert torch.equal(find(foreign(drop("d2t"))).vocab.ids, draft.vocab.ids)
    with pytest.raises(EyasError, match="no d2t to say which"):
        find(foreign(drop("d2t", "t2d")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("fc.weight"), "no EAGLE-3 draft: it lacks fc.weight"),
        (drop("midlayer.mlp.gate_proj.weight"), "lacks midlayer.mlp.gate_proj.weight"),
        (lambda config, tensors: tensors.update({"layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}), "missing layers.1.input_layernorm"),
        (lambda config, tensors: tensors.update({"layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}), r"decoder layers \[0, 2\]"),
        (lambda config, tensors: tensors.update({"midlayer.self_attn.q_proj.weight": torch.zeros(32, 32)}), "EAGLE-1 or EAGLE-2"),
        (lambda config, tensors: tensors.update({"fc.weight": torch.zeros(32, 64)}), "fc reads 64 numbers"),
        (lambda config, tensors: tensors["fc.weight"].view(-1)[3:4].fill_(float("nan")), "fc.weight holds numbers that are not finite"),
        (wrapped, "all its tensors' names begin with _orig_mod., as torch.compile names them"),
        (lambda config, tensors: config.update(num_attention_heads=5), "do not make 5 heads"),
        (lambda config, tensors: config.update(num_attention_heads="4"), "num_attention_heads must be a whole number"),
        (lambda config, tensors: config.update(hidden_act="gelu"), "hidden_act"),
        (lambda config, tensors: config["eagle_config"].update(use_aux_hidden_state=False), "reads one vector of the target"),
        (lambda config, tensors: config.update(rope_theta=-1), "rope_theta must be a number"),
        (lambda config, tensors: config.update(vocab_size=10**30), "vocab_size must be a whole number"),
        (lambda config, tensors: config.update(eagle_aux_hidden_state_layer_ids=[5, 4, 2]), "different layer numbers"),
    ],
)
def test_what_cannot_be_a_draft_is_refused_in_one_line(foreign, change, words):
    folder = foreign(change)
    with pytest.raises(EyasError, match=words) as refused:
        find(folder).resolved(8)
    assert "\n" not in str(refused.value)


def test_a_speculators_head_without_its_flag_is_in_doubt(foreign):
    """Trap 6: vLLM takes an absent norm_before_residual for true, speculators itself for false."""
    found = find(foreign(drop("norm_before_residual"), "speculators"))
    assert found.layout == "speculators" and found.doubts["norm_before_residual"] == [False, True]
    assert "norm_before_residual" not in find(foreign(layout="speculators")).doubts


def test_unmeasured_questions_are_answered_as_the_layout_has_it(foreign):
    draft, told = resolve(find(foreign(drop("eagle_aux_hidden_state_layer_ids"))), 8)
    assert draft.config.taps == (2, 4, 5) and "not measured" in told[0]


# ---- files that are not to be trusted ----


class Runs:
    def __init__(self, marker) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        import os

        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("bare", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, bare):
    path = tmp_path / "pytorch_model.bin"
    if bare:
        path.write_bytes(pickle.dumps(Runs(tmp_path / "executed")))
    else:
        torch.save({"fc.weight": Runs(tmp_path / "executed")}, path)
    with pytest.raises(EyasError) as refused:
        unpickled(path)
    assert not (tmp_path / "executed").exists() and "\n" not in str(refused.value)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(1 << 26))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(EyasError, match="compressed inside"):
        unpickled(path)


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EyasError, match="more than the file holds"):
        tensors_of(tmp_path)


def test_gguf_lengths_are_compared_with_the_file(draft, target, tmp_path):
    export(draft, tmp_path, "llama_cpp", tmp_path / "x", target, None, force=False)
    path = tmp_path / "x" / FILE
    check_gguf(path)
    held = path.read_bytes()
    for place in (8, 16, 24):  # numbers of tensors and fields, length of the first key
        path.write_bytes(held[:place] + (1 << 60).to_bytes(8, "little") + held[place + 8 :])
        with pytest.raises(EyasError, match="cannot be read as GGUF: it claims"):
            check_gguf(path)
    path.write_bytes(held[: len(held) // 2])
    with pytest.raises(EyasError, match="cannot be read as GGUF"):
        find(tmp_path / "x")


def gguf_parts(path):
    """Fields and float32 tensors of a GGUF whose weights are float32."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).reshape(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_a_gguf_without_a_head_takes_its_targets(make, draft, target, tmp_path):
    """As llama.cpp does; of fewer tokens than the target's there is none to take."""
    for folder, each in (("whole", own_draft(make(draft_vocab_size=263))), ("part", draft)):
        export(each, tmp_path, "llama_cpp", tmp_path / folder, target, "fp32", force=False)
    path = tmp_path / "whole" / FILE
    fields, tensors = gguf_parts(path)
    del tensors["output.weight"]
    found = llama_cpp.found_in(path, fields, tensors)
    assert found.head == "the target's" and torch.equal(completed(found, target).weights["lm_head.weight"], target.head())
    fields, tensors = gguf_parts(tmp_path / "part" / FILE)
    del tensors["output.weight"]
    with pytest.raises(EyasError, match=r"holds no output\.weight, and its target's head is none for it"):
        llama_cpp.found_in(path, fields, tensors)


def test_a_field_of_a_gguf_that_nobody_read_is_named(draft, target, tmp_path):
    export(draft, tmp_path, "llama_cpp", tmp_path / "x", target, "fp32", force=False)
    fields, tensors = gguf_parts(tmp_path / "x" / FILE)
    with pytest.raises(EyasError, match=r"does not know the field 'eagle3\.logit_scale'"):
        llama_cpp.found_in(tmp_path, fields | {"eagle3.logit_scale": 0.5}, tensors)


def test_an_openvino_draft_is_not_imported(tmp_path):
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(EyasError, match="import what it was made from"):
        find(tmp_path)
