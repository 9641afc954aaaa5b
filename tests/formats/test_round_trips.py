"""What is written in a layout reads back as the same draft, and an engine that could not run it is told before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from eyas.config import EyasError, TreeShape
from eyas.files.eagle3_files import config_from_file
from eyas.files.gguf import halves_from_pairs
from eyas.files.tensors import read_tensors
from eyas.files.untrusted import Fields, tensors_of
from eyas.formats.export import EXACT, export
from eyas.formats.layouts import LAYOUTS, find
from eyas.formats.llama_cpp import FILE, pairs_from_halves
from eyas.formats.portable import changed, own_draft, probe
from eyas.formats.vllm import is_speculators

READABLE = [name for name in LAYOUTS if name != "openvino"]  # that one needs an environment of its own: benchmarks/engines
OTHER_TAPS = (1, 3, 6)


def written(draft, name, target, out, weights=None, **extra):
    return export(draft, out, name, out / "x", target, weights, force=False, **extra)


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("weights", ["bf16", "fp32", "fp16"])
def test_every_layout_reads_back_as_the_same_draft(name, weights, draft, target, tmp_path):
    check = written(draft, name, target, tmp_path, weights)
    again = find(tmp_path / "x").resolved(draft.target_layers)
    assert again.config == replace(draft.config, max_position_embeddings=again.config.max_position_embeddings)
    assert torch.equal(again.vocab.ids, draft.vocab.ids)
    difference = float((probe(again) - probe(draft)).abs().max())
    assert difference == pytest.approx(check.difference)
    assert difference <= (EXACT if weights != "fp16" else 0.02 * check.spread), "bf16 weights are kept whole but in fp16"


@pytest.mark.parametrize("weights", ["q8_0", "q4_1"])
def test_quantised_weights_are_told_with_what_they_cost(weights, draft, target, tmp_path):
    check = written(draft, "llama_cpp", target, tmp_path, weights)
    assert not check.exact and 0 < check.difference < 3 * check.spread


SETTINGS = [
    {"fc_norm": True, "norm_output": True},
    {"norm_output": True},
    {"norm_before_fc": True},
    {"norm_before_residual": True},
    {"taps": OTHER_TAPS},
    {"rope_theta": 77.0},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}},
    {"draft_vocab_size": 263},
]  # fmt: skip
CANNOT = {
    "sglang": {"norm_before_residual"},
    "vllm": set(),
    "speculators": set(),
    "llama_cpp": {"fc_norm", "norm_output"},
    "safeailab": {"fc_norm", "norm_output", "norm_before_fc", "norm_before_residual", "taps", "rope_scaling"},
    "openvino": {"fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"},
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", [name for name in CANNOT if name != "openvino"])
def test_settings_go_along_or_are_refused_with_the_reason(name, settings, make, place, target, tmp_path):
    rope = {key: settings[key] for key in settings if key.startswith("rope")}
    directory = make(**{key: value for key, value in settings.items() if key not in rope})
    draft = own_draft(directory)
    draft = replace(draft, config=replace(draft.config, **rope))
    if CANNOT[name] & set(settings):
        with pytest.raises(EyasError, match="cannot run this draft"):
            written(draft, name, target, tmp_path)
        assert not (tmp_path / "x").exists()
        return
    check = written(draft, name, target, tmp_path)
    assert check.difference <= EXACT and check.taps == draft.config.taps
    again = find(tmp_path / "x").resolved(draft.target_layers)
    for key, value in settings.items():
        if key not in ("taps", "draft_vocab_size"):
            assert getattr(again.config, key) == value


@pytest.mark.parametrize("name", CANNOT)
def test_what_an_engine_cannot_run_is_refused(name, draft):
    for setting in ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"):
        other = replace(draft, config=replace(draft.config, **{setting: True}))
        assert bool(LAYOUTS[name].refusal(other)) == (setting in CANNOT[name])


@pytest.mark.parametrize("name", CANNOT)
def test_other_than_three_taps_are_refused_by_name(name, make, target, tmp_path):
    """Eyas's own files hold them; no engine here reads any other number."""
    draft = own_draft(make(taps=(0, 1, 2, 4, 6)))
    assert draft.config.taps == (0, 1, 2, 4, 6)
    engine = LAYOUTS[name].title.split()[0].split("/")[0].split(",")[0]
    with pytest.raises(EyasError, match=rf"cannot run this draft: {engine}.* runs three taps, this draft has 5$"):
        written(draft, name, target, tmp_path)
    assert not (tmp_path / "x").exists()


LAYERS_OF_OTHERS = {  # what heads of others have -> the engines that run it
    "layers": ({"draft_layers": 2}, {"sglang", "vllm", "speculators"}, "runs drafts of one layer, this one has 2"),
    "norms": ({"qk_norm": True}, {"vllm", "speculators"}, "knows no norms of queries and keys"),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {"vllm", "speculators"}, "knows no biases in a draft"),
    "both": ({"qk_norm": True, "attention_bias": True}, set(), "knows no|has no biases, this draft's has both"),
    "window": ({"sliding_window": 5, "draft_layers": 2}, {"vllm", "speculators"}, "sees 5 positions|of one layer"),
    "rotary": ({"partial_rotary_factor": 0.5}, {"vllm", "speculators"}, "rotates whole heads"),
    "embedding": ({"own_embedding": True}, {"vllm", "speculators", "safeailab", "llama_cpp"}, "embedding, and this one brings another"),
    "width": ({"own_embedding": True, "hidden_size": 16}, {"sglang", "vllm", "speculators", "llama_cpp"}, "as wide as|takes 16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS_OF_OTHERS)
@pytest.mark.parametrize("name", CANNOT)
def test_what_heads_of_others_have_goes_where_engines_run_it(name, kind, make, place, target, tmp_path):
    settings, runs, words = LAYERS_OF_OTHERS[kind]
    draft = own_draft(make(**settings))
    if name not in runs:
        with pytest.raises(EyasError, match=f"cannot run this draft: .*({words})"):
            written(draft, name, target, tmp_path)
        return
    assert written(draft, name, target, tmp_path).difference <= EXACT
    again = find(tmp_path / "x").resolved(draft.target_layers)
    assert again.config == replace(draft.config, max_position_embeddings=again.config.max_position_embeddings)


def test_engines_find_what_they_ask_for_in_heads_of_others(make, target, tmp_path):
    """As vLLM 0.32, SGLang 0.5.23 and SafeAILab's code read them."""
    two, norms, own = (own_draft(make(**settings)) for settings in ({"draft_layers": 2}, {"qk_norm": True}, {"own_embedding": True}))
    for number, (draft, name) in enumerate(((two, "sglang"), (norms, "vllm"), (norms, "speculators"), (own, "safeailab"))):
        written(draft, name, target, tmp_path / str(number))
    tensors, config = read_tensors(tmp_path / "0" / "x"), Fields.of(tmp_path / "0" / "x").raw
    assert config["num_hidden_layers"] == 2
    assert torch.equal(tensors["layers.1.hidden_norm.weight"], tensors["layers.1.input_layernorm.weight"]), "the first is SGLang's name"
    config = Fields.of(tmp_path / "1" / "x").raw
    assert (config["architectures"], config["model_type"]) == (["Eagle3Qwen3ForCausalLM"], "qwen3")
    assert Fields.of(tmp_path / "2" / "x").raw["transformer_layer_config"]["model_type"] == "qwen3", "by which vLLM chooses the layer"
    assert Fields.of(tmp_path / "3" / "x").raw["target_hidden_size"] == 32, "which tells SafeAILab that the embedding is in the file"
    assert "embed_tokens.weight" in read_tensors(tmp_path / "3" / "x")


def test_layer_ids_are_written_as_each_engine_counts_them(make, target, tmp_path):
    """Trap 2: SGLang names a layer by its output, vLLM, speculators and llama.cpp by its input."""
    draft = own_draft(make(taps=OTHER_TAPS))
    for name in ("sglang", "vllm", "speculators", "llama_cpp"):
        export(draft, tmp_path, name, tmp_path / name, target, None, force=False)
    for name in ("sglang", "vllm"):
        fields = Fields.of(tmp_path / name)
        assert fields.layers("eagle_aux_hidden_state_layer_ids") == OTHER_TAPS
        assert fields.object("eagle_config").layers("eagle_aux_hidden_state_layer_ids") == tuple(tap - 1 for tap in OTHER_TAPS)
    assert Fields.of(tmp_path / "speculators").layers("eagle_aux_hidden_state_layer_ids") == OTHER_TAPS
    from gguf import GGUFReader

    assert GGUFReader(tmp_path / "llama_cpp" / FILE).fields["eagle3.target_layers"].contents() == list(OTHER_TAPS)


def test_speculators_layout_says_every_flag_and_carries_the_embedding(draft, target, tmp_path):
    """Traps 6 and 27: an absent norm_before_residual means true to vLLM; engines build as many layers as the config says."""
    written(draft, "speculators", target, tmp_path)
    assert is_speculators(tmp_path / "x")
    told, tensors = json.loads((tmp_path / "x" / "config.json").read_text()), read_tensors(tmp_path / "x")
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "tie_word_embeddings")
    assert [told[flag] for flag in flags] == [False] * 5
    layer = told["transformer_layer_config"]
    assert layer["num_hidden_layers"] == 1 and layer["head_dim"] == draft.config.head_dim and layer["vocab_size"] == draft.config.vocab_size
    assert told["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert told["speculators_config"]["verifier"]["name_or_path"] == str(target.directory)
    assert torch.equal(tensors["embed_tokens.weight"], target.embedding().to(torch.bfloat16))
    assert {"layers.0.hidden_norm.weight", "d2t", "t2d"} <= set(tensors) and not [name for name in tensors if "midlayer" in name]


def test_plain_configs_say_what_engines_read(draft, target, tmp_path):
    """Traps 9, 17, 18, 19: theta in both spellings, an untied head, the head's width, positions as far as the target's."""
    short = replace(draft, config=replace(draft.config, max_position_embeddings=16))
    written(short, "sglang", target, tmp_path)
    told = json.loads((tmp_path / "x" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLMEagle3"] and told["num_hidden_layers"] == 1
    assert told["tie_word_embeddings"] is False and told["head_dim"] == draft.config.head_dim
    assert told["rope_theta"] == told["rope_parameters"]["rope_theta"] == draft.config.rope_theta
    assert told["max_position_embeddings"] == target.config.max_position_embeddings > 16


def test_gguf_rows_are_in_pairs_order_and_d2t_holds_ids(draft, target, tmp_path):
    """llama.cpp rotates neighbouring pairs, and reads absolute ids where other files hold offsets (trap 13)."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    written(draft, "llama_cpp", target, tmp_path, "fp32")
    held = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x" / FILE).tensors}
    assert held["d2t"].data.tolist() == draft.vocab.ids.tolist()
    q = draft.weights["midlayer.self_attn.q_proj.weight"].float()
    there = torch.from_numpy(dequantize(held["blk.0.attn_q.weight"].data, held["blk.0.attn_q.weight"].tensor_type).copy())
    half = draft.config.head_dim // 2
    assert torch.equal(there[0], q[0]) and torch.equal(there[1], q[half]), "entry c pairs with c + half"
    assert torch.equal(halves_from_pairs(pairs_from_halves(q, 4), 4), q)


def test_gguf_carries_the_targets_tokenizer(draft, target, tmp_path):
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from eyas.files.gguf_tokenizer import tokenizer_from_gguf

    written(draft, "llama_cpp", target, tmp_path)
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "x" / FILE).fields.items()}
    assert len(fields["tokenizer.ggml.tokens"]) == target.config.vocab_size
    again, own = tokenizer_from_gguf(fields), AutoTokenizer.from_pretrained(target.directory)
    for text in ("Where is the nest?", "x = 17\n\tif é", "<|im_start|>user\nhi<|im_end|>"):
        assert again(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    copied = tmp_path / "copied"
    export(draft, tmp_path, "llama_cpp", copied, target, None, force=False, target_gguf=tmp_path / "x" / FILE)
    assert GGUFReader(copied / FILE).fields["tokenizer.ggml.tokens"].contents() == fields["tokenizer.ggml.tokens"]


def test_an_export_that_would_compute_otherwise_is_not_kept(draft, target, tmp_path, monkeypatch):
    from eyas.formats import layouts, sglang

    def wrong(work, draft, target, weights):
        sglang.write(
            work, replace(draft, weights={**draft.weights, "norm.weight": draft.weights["norm.weight"] * 2}), target, torch.bfloat16
        )

    monkeypatch.setitem(layouts.LAYOUTS, "sglang", replace(layouts.LAYOUTS["sglang"], write=wrong))
    with pytest.raises(EyasError, match=r"computes other logits .* not kept"):
        written(draft, "sglang", target, tmp_path)
    assert not (tmp_path / "x").exists()


def test_an_export_with_other_taps_is_not_kept(draft, target, tmp_path, monkeypatch):
    """The comparison of logits cannot see taps: they are compared by themselves."""
    from eyas.formats import layouts, sglang

    def wrong(work, draft, target, weights):
        sglang.write(work, changed(draft, taps=OTHER_TAPS), target, torch.bfloat16)

    monkeypatch.setitem(layouts.LAYOUTS, "sglang", replace(layouts.LAYOUTS["sglang"], write=wrong))
    with pytest.raises(EyasError, match=r"reads back as another draft .* not kept"):
        written(draft, "sglang", target, tmp_path)


def test_what_exists_is_replaced_only_when_asked_and_only_by_something_whole(draft, target, tmp_path, monkeypatch):
    from eyas.formats import layouts

    out = tmp_path / "x"
    written(draft, "vllm", target, tmp_path)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(EyasError, match="exists; choose another place, or --force"):
        written(draft, "vllm", target, tmp_path)

    def fails(work, draft, target, weights):
        (work / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(layouts.LAYOUTS, "vllm", replace(layouts.LAYOUTS["vllm"], write=fails))
    with pytest.raises(EyasError, match="No space left"):
        export(draft, tmp_path, "vllm", out, target, None, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_every_layout_may_be_written_anew_over_itself(draft, target, tmp_path):
    for name, layout in LAYOUTS.items():
        if layout.read is not None:
            for force in (False, True):
                export(draft, tmp_path, name, tmp_path / name, target, None, force)


FOREIGN = {
    "a note": ({"notes.txt": "mine"}, "notes.txt"),
    "a folder": ({"old/model.safetensors": "mine"}, "old/"),
    "settings of something else": ({"config.json": "{}"}, "config.json (no draft's)"),
    "settings that are no JSON": ({"config.json": "port = 80"}, "config.json (it cannot be read)"),
    "a target": ({"config.json": '{"model_type": "llama"}', "model.safetensors": "x"}, "config.json (no draft's)"),
    "a draft that was fetched": ({"config.json": '{"draft_vocab_size": 9}', "model.safetensors": "x"}, "config.json (a draft of others)"),
    "a trained draft": ({"config.json": '{"draft_vocab_size": 9, "eyas": {}}'}, "config.json (a draft of eyas's own)"),
    "a run's checkpoint": ({"config.json": '{"draft_vocab_size": 9}', "checkpoint": "x"}, "checkpoint"),
    "another model's GGUF": ({"draft.gguf": "GGUF llama"}, "draft.gguf"),
    "much": ({f"{number}.txt": "mine" for number in range(5)}, "0.txt, 1.txt, 2.txt and 2 more"),
}


@pytest.mark.parametrize("name", ["vllm", "llama_cpp"])
@pytest.mark.parametrize("held", FOREIGN)
def test_what_eyas_did_not_write_is_never_replaced(draft, target, tmp_path, held, name):
    files, told = FOREIGN[held]
    out = tmp_path / "x"
    for file, text in files.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(text)
    if name == "llama_cpp":  # which writes no config.json
        told = told.split(" ")[0] if held != "much" else told
    with pytest.raises(EyasError, match="holds something else than a draft") as caught:
        export(draft, tmp_path, name, out, target, None, force=True)
    assert told in str(caught.value) and "nothing is replaced" in str(caught.value)
    assert all((out / file).read_text() == text for file, text in files.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_a_command_to_serve_it(name, tmp_path):
    text = LAYOUTS[name].serve(tmp_path / "draft", "owner/model", TreeShape.chain(5))
    assert str(tmp_path / "draft") in text
    assert name == "speculators" or "5" in text or "6" in text


def test_own_drafts_carry_their_facts(place):
    own = json.loads((place / "draft" / "config.json").read_text())["eyas"]
    assert own["taps_are_inputs_of_layers"] == [2, 4, 5] and own["target_layers"] == 8
    assert own["rope_theta_trained_with"] == 10000.0 and own["state_fed_back"] == "before the final norm"
    assert len(own["weights_sha256"]) == 64
    assert config_from_file(place / "draft").taps == (2, 4, 5)
    assert set(tensors_of(place / "draft")) == set(own_draft(place / "draft").weights) | {"d2t", "t2d"}
