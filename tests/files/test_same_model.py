"""A directory is the same model here as in transformers: logits, context and ends, for whatever its config.json may say."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from eyas.config import EyasError
from eyas.files import notes
from eyas.files.adaptable import adapted_config
from eyas.files.hf_config import SUPPORTED
from eyas.files.target import load_target, target_config
from eyas.files.tensors import INDEX, read_tensors, save_tensors
from eyas.model.adapter import AdaptedTarget
from eyas.model.rows import chain_rows
from eyas.model.target import Target
from tests.tiny import randomize, save_tiny_target

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
TOKENS = [(7 * i * i + 3 * i + 11) % 61 for i in range(48)]

# family, what the config says beside SHAPE, what is edited in config.json afterwards, the context that comes of it
MATRIX = {
    **{kind: (kind, {}, {}, 64) for kind in SUPPORTED if kind != "mistral"},
    **{f"{kind} tied": (kind, {"tie_word_embeddings": True}, {}, 64) for kind in SUPPORTED if kind != "mistral"},
    **{f"{kind} of one key head": (kind, {"num_key_value_heads": 1}, {}, 64) for kind in SUPPORTED if kind != "mistral"},
    **{f"{kind} of wide heads": (kind, {"head_dim": 20}, {}, 64) for kind in SUPPORTED if kind != "mistral"},
    "llama biases": ("llama", {"attention_bias": True}, {}, 64),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, {}, 64),
    "heads of width 6": ("llama", {"head_dim": 6}, {}, 64),
    "seven heads": ("qwen2", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56}, {}, 64),
    "a large base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, 64),
    "an old base": ("llama", {}, {"rope_parameters": None, "rope_theta": 5e5}, 64),
    "old linear": ("llama", {}, {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
    "linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, {}, 160),
    "yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, {}, 256),
    "yarn whose context was raised": ("qwen2", {"max_position_embeddings": 256, "rope_parameters": {**YARN, "rope_theta": 1e6}}, {}, 256),
    "yarn of no original length": ("qwen2", {}, {"rope_scaling": {"type": "yarn", "factor": 3.0}}, 192),
    "yarn with mscale": ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 1.0}}, {}, 256),
    "yarn with vLLM's factor": ("qwen2", {}, {"rope_scaling": {**YARN, "attn_factor": 0.9}}, 256),
    "rope_scaling beside rope_parameters": ("qwen2", {}, {"rope_scaling": YARN}, 256),
    "the same with a base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_scaling": YARN}, 256),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {}, 64),
    "dynamic": ("llama", {}, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 64),
    "mistral without a window": ("mistral", {"sliding_window": None}, {}, 64),
    "mistral with a wide window": ("mistral", {"sliding_window": 64}, {}, 64),
    "mistral with a window": ("mistral", {"sliding_window": 7}, {}, 64),
    "mistral with a window and a scaled base": ("mistral", {"sliding_window": 40}, {"rope_scaling": YARN}, 256),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, {}, 64),
    "qwen2 with a window that is off": ("qwen2", {}, {"sliding_window": 9, "use_sliding_window": False}, 64),
    "no key heads named": ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": None}, 64),
    "no ends named": ("llama", {}, {"eos_token_id": ..., "bos_token_id": ...}, 64),
    "several ends": ("llama", {"eos_token_id": [3, 5]}, {}, 64),
    "a field that is known to be harmless": ("llama", {}, {"torch_dtype": "float32", "unsloth_version": "2025.1", "pretraining_tp": 2}, 64),
    "what SmolLM2 says": ("llama", {}, {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}, 64),
    "what DeepSeek's Qwen says": ("qwen2", {}, {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096}, 64),
}
SOME = ["sliding_attention", "full_attention", "sliding_attention"]
ADAPTED = {
    "a Mistral with layers of two kinds": (
        "mistral",
        {"sliding_window": 9},
        {"layer_types": SOME},
        64,
        "a model that transformers takes for ministral",
    ),
    "an MLP with biases": ("llama", {"mlp_bias": True}, {}, 64, "mlp_bias True"),
    "another activation": ("qwen2", {"hidden_act": "gelu"}, {}, 64, "hidden_act 'gelu'"),
    "a window in some layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        {},
        64,
        "layers of different kinds (full_attention, sliding_attention)",
    ),
}


@pytest.fixture(autouse=True)
def nothing_said():
    notes.note.cache_clear()


def saved(directory, kind, changes, edits):
    """A random model as transformers saves it, whose config.json is then edited; `...` takes a field out."""
    network = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **{**SHAPE, **changes}))
    randomize(network, 5)
    network.save_pretrained(directory)
    edit(directory, **edits)
    return directory


def edit(directory, **edits):
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **edits}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def theirs(directory, tokens=TOKENS):
    """Logits of transformers' own forward, and the ids at which its `generate` ends."""
    network = hf.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    ends = network.generation_config.eos_token_id
    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0], tuple(ends if isinstance(ends, list) else [] if ends is None else [ends])


def ours(target, tokens=TOKENS):
    with torch.no_grad():
        return target(chain_rows(0, tokens, 0), target.new_cache(1, len(tokens))).logits


@pytest.mark.parametrize("name", MATRIX)
def test_logits_context_and_ends_are_those_of_transformers(name, tmp_path):
    kind, changes, edits, context = MATRIX[name]
    saved(tmp_path, kind, changes, edits)
    target, (logits, ends) = load_target(tmp_path, "fp32"), theirs(tmp_path)
    assert isinstance(target, Target)
    for model in (target, target.prepare()):
        assert_close(ours(model), logits, rtol=1e-5, atol=1e-5)
    assert (target.config.max_position_embeddings, target.config.eos_token_ids) == (context, ends)
    through = adapted_config(tmp_path)
    assert (through.max_position_embeddings, through.eos_token_ids) == (context, ends)


@pytest.mark.parametrize("name", ADAPTED)
def test_what_our_blocks_lack_goes_through_transformers_and_says_so(name, tmp_path, capsys):
    kind, changes, edits, context, said = ADAPTED[name]
    target = load_target(saved(tmp_path, kind, changes, edits), "fp32")
    assert isinstance(target, AdaptedTarget) and target.config.max_position_embeddings == context
    assert_close(ours(target), theirs(tmp_path)[0], rtol=1e-5, atol=1e-5)
    assert f"own blocks do not compute {said}; it runs through transformers, which is slower" in capsys.readouterr().err
    with pytest.raises(EyasError, match="runs through transformers: use bf16 or fp32"):
        load_target(tmp_path, "int8")


def test_longrope_is_right_as_long_as_its_frequencies_hold(tmp_path):
    saved(tmp_path, "llama", {"rope_parameters": {**LONGROPE, "rope_theta": 1e4}}, {})
    target = load_target(tmp_path, "fp32")
    assert target.config.max_position_embeddings == 32
    assert_close(ours(target, TOKENS[:32]), theirs(tmp_path, TOKENS[:32])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "edits", "named"),
    [
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping (30.0)"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor (0.5)"),
        ("llama", {"is_causal": False}, "is_causal (False)"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling (8.0)"),
        ("llama", {"sliding_window": 8}, "sliding_window (8)"),
        ("llama", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window (False)"),
        ("qwen2", {"tomorrow": "x"}, "tomorrow ('x')"),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "ramp": 3}}, "rope_parameters' ramp (3)"),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor (0.5)"),
    ],
)
def test_a_field_that_nobody_computes_is_refused_by_name(kind, edits, named, tmp_path):
    saved(tmp_path, kind, {"sliding_window": None} if kind == "mistral" else {}, edits)
    with pytest.raises(EyasError) as caught:
        target_config(tmp_path)
    assert named in str(caught.value) and str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("edits", [{"attn_logit_softcapping": None}, {"partial_rotary_factor": 1.0}, {"sliding_window": 64}])
def test_a_field_at_a_value_that_changes_nothing_is_no_obstacle(edits, tmp_path):
    assert isinstance(load_target(saved(tmp_path, "llama", {}, edits), "fp32"), Target)


def test_a_base_that_rope_scaling_hides_is_said_once(tmp_path, capsys):
    saved(tmp_path, "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_scaling": YARN})
    assert target_config(tmp_path).rope_theta == target_config(tmp_path).rope_theta == 10_000.0
    said = "so base 10000.0 is taken and not 500000.0, as in transformers; write rope_theta into rope_scaling"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to"),
        ({"vocab_size": -1}, "vocab_size must be"),
        ({"num_key_value_heads": 3}, "4 heads over 3 key-value heads do not go together"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4", "rope_theta": 1e4}}, "factor must be a number"),
        ({"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}}, "rope_type must be text"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta must be a number"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'ntk' is known neither to eyas nor"),
        ({"rms_norm_eps": "1e-5"}, "Validation error for field 'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float, got str"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"model_type": ["llama"]}, "model"),
    ],
)
def test_a_value_that_no_model_has_is_one_line(edits, named, tmp_path):
    saved(tmp_path, "llama", {}, edits)
    with pytest.raises(EyasError, match=named) as caught:
        target_config(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# ---- weights ----


def test_model_safetensors_goes_before_an_index_beside_it(tmp_path):
    """As in transformers: an index may be left over from before the shards were joined."""
    save_tiny_target(tmp_path, seed=1)
    save_tiny_target(tmp_path / "old", seed=2)
    save_tensors(tmp_path, read_tensors(tmp_path / "old"), largest_file=20_000)
    assert (tmp_path / INDEX).exists()
    assert_close(ours(load_target(tmp_path, "fp32")), theirs(tmp_path)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_checkpoint_of_torch_save_is_read(kind, parts, tmp_path):
    changes = {"num_key_value_heads": ...} if kind == "gpt_neox" else {}
    config = hf.AutoConfig.for_model(kind, **{name: value for name, value in {**SHAPE, **changes}.items() if value is not ...})
    network = hf.AutoModelForCausalLM.from_config(config)
    randomize(network, 5)
    network.save_pretrained(tmp_path)
    logits = theirs(tmp_path)[0]
    (tmp_path / "model.safetensors").unlink()
    tensors = network.state_dict()
    names = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin" for i in range(parts)]
    for number, file in enumerate(names):
        torch.save({name: tensors[name] for name in list(tensors)[number::parts]}, tmp_path / file)
    if parts > 1:
        where = {name: names[place % parts] for place, name in enumerate(tensors)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert_close(ours(load_target(tmp_path, "fp32")), logits, rtol=1e-5, atol=1e-5)
    if parts > 1:
        (tmp_path / names[1]).unlink()
        with pytest.raises(EyasError, match=names[1]):
            load_target(tmp_path, "fp32")


def test_a_model_saved_without_its_head_has_no_head_but_a_tied_one(tmp_path):
    config = hf.AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=True)
    network = hf.AutoModel.from_config(config)
    randomize(network, 5)
    network.save_pretrained(tmp_path)
    assert_close(ours(load_target(tmp_path, "fp32")), theirs(tmp_path)[0], rtol=1e-5, atol=1e-5)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(EyasError, match=r"missing lm_head\.weight"):
        load_target(tmp_path, "fp32")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tied_matrices_that_differ_are_two_and_one_alone_is_both(kind, tmp_path, capsys):
    """Some checkpoints tie by their config and store a head of their own; transformers takes it."""
    saved(tmp_path, kind, {"tie_word_embeddings": True}, {})
    tensors = read_tensors(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding.flip(0), False)):
        save_tensors(tmp_path, tensors | {"lm_head.weight": head})
        target = load_target(tmp_path, "fp32")
        assert target.config.tie_word_embeddings == tied
        assert_close(ours(target.prepare()), theirs(tmp_path)[0], rtol=1e-5, atol=1e-5)
    assert "two different ones are stored" in capsys.readouterr().err
    save_tensors(tmp_path, {name: tensor for name, tensor in tensors.items() if "embed" not in name} | {"lm_head.weight": embedding})
    assert_close(ours(load_target(tmp_path, "fp32")), theirs(tmp_path)[0], rtol=1e-5, atol=1e-5)


def test_float16_weights_that_bfloat16_would_round_are_said(tmp_path, capsys):
    saved(tmp_path, "llama", {}, {"dtype": "float16"})
    load_target(tmp_path, "fp32")
    assert "float16" not in capsys.readouterr().err
    load_target(tmp_path, "bf16")
    assert "its weights are float16, of whose 11 bits bf16 keeps fewer; --precision fp32" in capsys.readouterr().err
