"""A GGUF model written as a Hugging Face directory: bfloat16 safetensors, config, tokenizer, chat template.

Knows llama.cpp's names of tensors and fields, and how it orders the rows of queries and keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import EyasError, short
from eyas.files.disk import atomic_directory
from eyas.files.hf_config import SUPPORTED
from eyas.files.tensors import save_tensors

GGUF_NAMES = {  # llama.cpp's name of a block's tensor -> Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


FIELDS = (  # those under the architecture's name that are read
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type",
)  # fmt: skip
HARMLESS_FIELDS = ("vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")
HARMLESS_FIELDS_AT: dict[str, tuple[Any, ...]] = {  # others, at values at which they change nothing
    "expert_count": (0,), "expert_used_count": (0,), "nextn_predict_layers": (0,), "attention.causal": (True,), "pooling_type": (0,),
    "rope.scaling.factor": (0.0, 1.0), "rope.scaling.attn_factor": (1.0,), "rope.scale_linear": (1.0,), "logit_scale": (1.0,),
    "embedding_scale": (1.0,), "residual_scale": (1.0,), "use_parallel_residual": (False,),
}  # fmt: skip
GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(path: Path, final: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write a GGUF model as a Hugging Face directory: bfloat16 safetensors, config, tokenizer, chat template."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from eyas.files.gguf_check import check_gguf
    from eyas.files.gguf_tokenizer import tokenizer_from_gguf

    try:
        check_gguf(path)
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:  # IndexError: the file ends early
        raise EyasError(f"{path} cannot be read as GGUF ({error})") from None
    kind = fields.get("general.architecture")
    if kind not in SUPPORTED:
        raise EyasError(f"{path} is a {kind!r} model; eyas runs {', '.join(SUPPORTED)} (Llama-shaped) targets")
    if fields.get("split.count", 0) > 1:
        raise EyasError(f"{path} is one of {fields['split.count']} parts of a model; join them with llama.cpp's gguf-split --merge")
    config = gguf_config(fields, {tensor.name for tensor in reader.tensors})
    tokenizer = tokenizer_from_gguf(fields)  # before minutes of conversion
    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        name = gguf_to_hugging_face(tensor.name)
        if name is None:  # rope_freqs and the like are derived from the config
            continue
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(tuple(int(n) for n in tensor.shape[::-1]))
        if kind == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config["num_attention_heads"] if ".q_proj" in name else config["num_key_value_heads"]
            value = halves_from_pairs(value, heads)
        tensors[name] = value.to(torch.bfloat16)
        progress(done + 1, len(reader.tensors))
    with atomic_directory(final) as work:
        save_tensors(work, tensors)
        (work / "config.json").write_text(json.dumps(config, indent=1))
        tokenizer.save_pretrained(work)


def gguf_to_hugging_face(name: str) -> str | None:
    """Hugging Face's name of a tensor, `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`; None for tensors that a config
    implies."""
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in GGUF_NAMES:
        return f"model.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
    if parts[0] in GGUF_TOP:
        return f"{GGUF_TOP[parts[0]]}.{parts[1]}"
    if parts[0].startswith("rope_"):
        return None
    raise EyasError(f"GGUF tensor {name} has no place in a Llama-shaped model")


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring pairs, Hugging Face rotates halves: put each head's rows back in halves order."""
    rows = weight.shape[0] // heads
    return weight.view(heads, rows // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def gguf_config(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The Hugging Face config.json made from a GGUF's fields."""
    kind = fields["general.architecture"]

    def of(key: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{key}", default)

    heads, hidden = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", hidden // heads)
    ends = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot") if f"tokenizer.ggml.{name}_token_id" in fields]
    theta = float(of("rope.freq_base", 10000.0))
    check_fields(fields, kind, head_dim)
    if of("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names:
        raise EyasError("this GGUF scales its rotary embedding, which the file describes only in part; use the Hugging Face directory")
    return {
        "architectures": [
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
        ],
        "model_type": kind,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(of("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(set(ends)) if len(set(ends)) > 1 else (ends or [None])[0],
        "dtype": "bfloat16",
    }


def check_fields(fields: Mapping[str, Any], kind: str, head_dim: int) -> None:
    """Raise `EyasError` where a GGUF sets a field of its architecture that changes what the model computes and that is not read here."""
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    known = {*FIELDS, *HARMLESS_FIELDS}
    wrong = {name for name, value in own.items() if name not in known and value not in HARMLESS_FIELDS_AT.get(name, ())}
    wrong |= {name for name in ("rope.dimension_count", "attention.value_length") if own.get(name, head_dim) != head_dim}
    context = own.get("context_length", 0)
    wrong |= {name for name in ("attention.sliding_window",) if 0 < own.get(name, 0) < context}
    if wrong:
        values = ", ".join(f"{kind}.{name} ({short(own[name])})" for name in sorted(wrong))
        raise EyasError(f"this GGUF sets {values}, which eyas does not compute from a GGUF; use the Hugging Face directory")
