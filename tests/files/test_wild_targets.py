"""Targets as people publish them: text parts of multimodal models, quantised weights, LoRA adapters, layers that predict further tokens."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from eyas.config import EyasError
from eyas.files import lora, notes
from eyas.files.quantised import expanded
from eyas.files.target import load_target, target_config, target_directory
from eyas.model.adapter import AdaptedTarget
from eyas.model.rows import chain_rows
from eyas.model.target import Target
from tests.files.test_same_model import edit, ours, theirs
from tests.tiny import byte_tokenizer, randomize, save_tiny_target

V = 61
TEXT = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 3,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CHUNKED = ["chunked_attention", "chunked_attention", "full_attention", "chunked_attention", "full_attention"]
MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def nothing_said():
    notes.note.cache_clear()


def saved(directory, network):
    randomize(network, 5)
    network.save_pretrained(directory)
    return directory


def rewrite(directory, change):
    """Change a directory's tensors in place."""
    path = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, metadata={"format": "pt"})


# ---- models that read images too ----


def gemma3():
    text = {**TEXT, "sliding_window": 8}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=EYE, mm_tokens_per_image=4, image_token_index=60)
    )


def qwen2_5_vl():
    eye = {"depth": 5, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
    ids = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**eye, "fullatt_block_indexes": [0]}, **ids)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def mistral3():
    eye, text = {"model_type": "pixtral", **EYE, "head_dim": 8}, {"model_type": "mistral", **TEXT, "sliding_window": None}
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(text_config=text, vision_config=eye, image_token_index=60))


def llama4():
    text = {
        **TEXT,
        "attention_chunk_size": 6,
        "layer_types": CHUNKED,
        "moe_layers": [],
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
    }
    eye = {**EYE, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=eye, image_token_index=60))


@pytest.mark.parametrize("make", [gemma3, qwen2_5_vl, mistral3, llama4])
def test_the_text_part_of_a_model_that_reads_images_is_a_target(make, tmp_path):
    """It has as many layers for images as for text, so counting alone would not tell them apart."""
    network = make().eval()
    saved(tmp_path, network)
    tokens = [(7 * i * i + 3 * i + 11) % 53 for i in range(24)]
    with torch.no_grad():  # transformers' Llama 4 around an image model reads no text without an image
        logits = theirs(tmp_path, tokens)[0] if make is llama4 else network(input_ids=torch.tensor([tokens])).logits[0]
    target = load_target(tmp_path, "fp32")
    assert isinstance(target, AdaptedTarget)
    assert (target.config.num_hidden_layers, target.config.hidden_size, target.config.max_position_embeddings) == (5, 32, 128)
    assert not any("vision" in name for name, _ in target.named_parameters())
    assert_close(ours(target.prepare(), tokens), logits, **CLOSE)
    cache = target.new_cache(1, 24)
    for start in (0, 10, 17):
        part = tokens[start : start + (10 if start == 0 else 7)]
        out = target(chain_rows(0, part, start), cache)
        cache.keep(0, range(len(part)))
        assert_close(out.logits, logits[start : start + len(part)], **CLOSE)


# ---- quantised weights ----


def fp8_blocks(tensors, block=16):
    """Products' weights as FP8 in blocks with a scale each, as DeepSeek publishes them."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        parts = tensors[name].view(rows // block, block, columns // block, block)
        scale = parts.abs().amax((1, 3)) / 448
        found[name] = (parts / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_fp8_weights_are_widened_as_transformers_widens_them(kind, tmp_path, capsys):
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    saved(tmp_path, hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **TEXT, **moe)))
    exact = theirs(tmp_path)[0]
    rewrite(tmp_path, fp8_blocks)
    edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"})
    target = load_target(tmp_path, "fp32")
    assert isinstance(target, Target if kind == "llama" else AdaptedTarget)
    dequantised = theirs(tmp_path)[0]  # on a CPU transformers widens them itself
    assert_close(ours(target), dequantised, **CLOSE)
    assert (ours(target) - exact).abs().max() > 1e-3 and "weights of 8 bits (fp8) are widened at loading" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "int8", "q4"])
def test_fp8_weights_serve_every_precision(precision, tmp_path):
    save_tiny_target(tmp_path)
    rewrite(tmp_path, fp8_blocks)
    edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    assert ours(load_target(tmp_path, precision)).isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5,), (5, 1), (3, 2), (5, 3)])
def test_scales_of_whole_weights_rows_and_blocks_multiply_their_own_numbers(shape):
    """The last block of a row or column may be cut off."""
    scale, weight = torch.rand(shape) + 0.5, torch.randn(5, 9)
    block = [2, 5] if shape == (3, 2) else None
    whole = scale.reshape(()) if scale.numel() == 1 else scale[:, None] if scale.dim() == 1 else scale
    wanted = weight.clone()
    for i in range(5):
        for j in range(9):
            row, column = (i // 2, j // 5) if shape == (3, 2) else (i, j // 3) if shape == (5, 3) else (i, 0)
            wanted[i, j] *= whole if whole.dim() == 0 else whole[row, column]
    assert_close(weight * expanded(scale, weight.shape, block, "w"), wanted)


def test_scales_that_do_not_go_with_their_weight_are_one_line():
    with pytest.raises(EyasError, match=r"w is \(5, 9\) and its scales \(2, 2\)"):
        expanded(torch.ones(2, 2), torch.Size((5, 9)), [3, 3], "w")
    assert_close(expanded(torch.tensor([[126, 129]], dtype=torch.uint8), torch.Size((1, 2)), None, "w"), torch.tensor([[0.5, 4.0]]))


@pytest.mark.parametrize(("form", "dtype"), [("float-quantized", torch.float8_e4m3fn), ("int-quantized", torch.int8)])
def test_compressed_tensors_of_8_bits_are_widened(form, dtype, tmp_path):
    save_tiny_target(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")

    def quantised(tensors):
        found = dict(tensors)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = tensors[name].abs().amax(1, keepdim=True) / 120
            whole = (tensors[name] / scale).round() if dtype == torch.int8 else tensors[name] / scale
            found |= {name: whole.to(dtype), f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.ones(1)}
            plain[name] = whole.to(dtype).float() * scale
        return found

    rewrite(tmp_path, quantised)
    edit(tmp_path, quantization_config={"quant_method": "compressed-tensors", "format": form})
    quantised_logits = ours(load_target(tmp_path, "fp32"))
    rewrite(tmp_path, lambda tensors: plain)
    edit(tmp_path, quantization_config=...)
    assert_close(quantised_logits, ours(load_target(tmp_path, "fp32")), **CLOSE)


def test_mxfp4_experts_are_widened_by_transformers(tmp_path):
    config = hf.GptOssConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    saved(tmp_path, hf.AutoModelForCausalLM.from_config(config))

    def packed(tensors):
        found, draw = dict(tensors), torch.Generator().manual_seed(0)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors[name].shape
            found[f"{name}_blocks"] = torch.randint(256, (experts, outputs, -(-inputs // 32), 16), generator=draw, dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(124, 127, (experts, outputs, -(-inputs // 32)), generator=draw, dtype=torch.uint8)
            del found[name]
        return found

    edit(tmp_path, intermediate_size=64)
    config.intermediate_size = 64
    saved(tmp_path, hf.AutoModelForCausalLM.from_config(config))
    rewrite(tmp_path, packed)
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    settings = {"quantization_config": hf.Mxfp4Config(dequantize=True), "dtype": torch.float32, "attn_implementation": "eager"}
    network = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()
    tokens = list(range(20))
    with torch.no_grad():
        assert_close(ours(load_target(tmp_path, "fp32"), tokens), network(torch.tensor([tokens])).logits[0], **CLOSE)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised with awq, 4 bits"),
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"quantised with compressed-tensors \(pack-quantized\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"quantised with modelopt \(NVFP4\)"),
        ({"group_size": 64, "bits": 4}, "quantised with mlx, 4 bits"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_other_quantised_weights_are_refused_by_name(kind, settings, named, tmp_path):
    hf.AutoConfig.for_model(kind, **TEXT).save_pretrained(tmp_path)
    edit(tmp_path, quantization_config=settings)
    with pytest.raises(EyasError, match=named) as caught:
        target_config(tmp_path)
    assert "give the model that it was made from" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("edits", [{}, {"quantization_config": {"quant_method": "fp8"}}])
def test_packed_weights_are_named_whatever_the_config_says(edits, tmp_path):
    save_tiny_target(tmp_path)
    edit(tmp_path, **edits)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4)})
    with pytest.raises(EyasError, match=r"holds model\.layers\.0\.mlp\.up_proj\.qweight, as quantised weights of fewer bits are stored"):
        load_target(tmp_path, "fp32")
    rewrite(tmp_path, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items() if "qweight" not in name})
    with pytest.raises(EyasError, match="in 8 bits without a scale"):
        load_target(tmp_path, "fp32")


# ---- layers that predict further tokens ----


@pytest.mark.parametrize(
    "config",
    [
        lambda: hf.Glm4MoeConfig(**TEXT, **MOE),
        lambda: hf.DeepseekV3Config(
            **{**TEXT, "num_key_value_heads": 4},
            **MOE,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=6,
        ),
        lambda: hf.Qwen2Config(**TEXT),
    ],
    ids=["glm4_moe", "deepseek_v3", "qwen2"],
)
def test_layers_that_predict_further_tokens_are_left_out_and_said(config, tmp_path, capsys):
    """DeepSeek's config here names another head width than the rotated one, as some published ones do."""
    saved(tmp_path, hf.AutoModelForCausalLM.from_config(config()))
    plain = ours(load_target(tmp_path, "fp32"))
    more = {"model.layers.5.eh_proj.weight": torch.zeros(32, 64), "model.layers.5.self_attn.q_proj.weight": torch.zeros(32, 32)}
    rewrite(tmp_path, lambda tensors: tensors | more | {"model.mtp_layers.0.norm.weight": torch.ones(32)})
    edit(tmp_path, num_nextn_predict_layers=1)
    assert_close(ours(load_target(tmp_path, "fp32")), plain, **CLOSE)
    assert "layers that predict further tokens are left out (3 tensors)" in capsys.readouterr().err
    edit(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(EyasError, match=r"unknown model\.layers\.5\.eh_proj\.weight"):
        load_target(tmp_path, "fp32")


# ---- LoRA ----


def adapter(directory, base):
    directory.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    draw, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(5):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors |= {f"{name}_{side}.weight": torch.randn(shape, generator=draw) for side, shape in (("A", (4, 32)), ("B", (32, 4)))}
    save_file(tensors, directory / "adapter_model.safetensors")
    return tensors


def test_an_adapter_without_peft_says_what_it_is_and_how_to_merge_it(tmp_path, monkeypatch):
    adapter(tmp_path / "adapter", "owner/base")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EyasError, match=r"is a LORA adapter of owner/base, not a whole model; pip install 'eyas\[lora\]'.*merge_and_unload"
    ) as caught:
        target_directory(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_text(""), "beside a whole model"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no base_model_name_or_path"),
        (lambda folder: None, "its base cannot be had: target .*gone is neither a directory"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(spoil, said, tmp_path, monkeypatch):
    adapter(tmp_path / "adapter", tmp_path / "gone")
    spoil(tmp_path / "adapter")
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(EyasError, match=said):
        target_directory(tmp_path / "adapter")


def test_an_adapter_is_merged_onto_its_base_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    base = save_tiny_target(tmp_path / "base")
    edit(base, architectures=["LlamaForCausalLM"])
    tensors = adapter(tmp_path / "adapter", base)
    merged = target_directory(tmp_path / "adapter")
    assert "merging" in capsys.readouterr().err and target_directory(tmp_path / "adapter") == merged
    (base / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text() + " ")
    again = target_directory(tmp_path / "adapter")
    assert again != merged and (again / "chat_template.jinja").read_text().endswith(" ")
    assert (merged / "tokenizer_config.json").exists() and len(byte_tokenizer()) == target_config(merged).vocab_size

    def by_hand(weights):
        for layer in range(5):
            low, high = (tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
            weights[f"model.layers.{layer}.self_attn.q_proj.weight"] += 8 / 4 * high @ low
        return weights

    found = ours(load_target(merged, "fp32"))
    rewrite(base, by_hand)
    assert_close(found, ours(load_target(base, "fp32")), rtol=1e-4, atol=1e-4)
