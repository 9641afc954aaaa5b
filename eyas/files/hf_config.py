"""A target's shape from its Hugging Face config.json, where our own blocks compute it; and which ids end an answer.

Knows config.json and generation_config.json; reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eyas.config import EyasError, TargetConfig, rope_kind
from eyas.files.disk import read_json

SUPPORTED = {  # model_type -> flags that its config leaves unsaid
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}


def has_own_blocks(directory: Path) -> bool:
    """Whether our own blocks compute this model; others go through transformers (model/adapter.py)."""
    raw = read_json(directory / "config.json")
    return raw.get("model_type") in SUPPORTED and not raw.get("mlp_bias") and raw.get("hidden_act", "silu") == "silu"


def own_config(directory: Path) -> TargetConfig:
    """The shape of a target that our own blocks compute."""
    raw = read_json(directory / "config.json")
    kind = raw["model_type"]
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if absent := [key for key in needed if key not in raw]:
        raise EyasError(f"{directory / 'config.json'} lacks {', '.join(absent)}")
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    rope = raw.get("rope_parameters") or {}  # transformers 5 puts theta and scaling here
    scaling = rope or raw.get("rope_scaling")
    window = raw.get("sliding_window") if kind == "mistral" or raw.get("use_sliding_window") else None
    positions = raw.get("max_position_embeddings", 2048)
    return TargetConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        max_position_embeddings=min(positions, window) if window else positions,  # inside the window full attention is the same
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        rope_scaling=scaling if scaling and rope_kind(scaling) is not None else None,
        attention_bias=raw.get("attention_bias", False) or SUPPORTED[kind].get("attention_bias", False),
        attention_out_bias=kind in ("llama", "qwen3") and raw.get("attention_bias", False),
        qk_norm=SUPPORTED[kind].get("qk_norm", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_ids=end_of_turn_ids(directory, raw),
    )


def end_of_turn_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: those of config.json and generation_config.json."""
    ids: set[int] = set()
    generation = directory / "generation_config.json"
    for source in (raw, read_json(generation) if generation.exists() else {}):
        found = source.get("eos_token_id")
        ids |= set(found if isinstance(found, list) else [] if found is None else [found])
    return tuple(sorted(ids))
