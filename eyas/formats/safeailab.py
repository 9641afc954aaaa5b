"""SafeAILab's own runtime (the paper's published code): plain layout, taps fixed in its code, only the paper's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from eyas.formats.files import PICKLED
from eyas.formats.plain import default_ids, own_width, plain_config, read_plain, write_plain
from eyas.formats.portable import Draft, Found, TargetFiles

TITLE = "SafeAILab/EAGLE"
WEIGHTS = ("bf16", "fp16", "fp32")


def refusal(draft: Draft) -> str | None:
    config = draft.config
    if not default_ids(draft):
        n = draft.target_layers
        return f"its code reads the inputs of layers 2, {n // 2}, {n - 3} and no others; this draft reads {list(config.taps)}"
    if config.fc_norm or config.norm_output or config.norm_before_fc or config.norm_before_residual:
        return "its code knows neither fc_norm, norm_output nor the other norms; SGLang and vLLM do"
    if config.rope_scaling and config.rope_scaling.get("rope_type", config.rope_scaling.get("type")) not in ("linear", "dynamic"):
        return "its code scales rotary embeddings only linearly or dynamically"
    if not own_width(config):
        return f"its code ignores head_dim and takes {config.hidden_size} / {config.num_attention_heads}; this draft's is {config.head_dim}"
    return None


def write(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    write_plain(work, draft, plain_config(draft.config, target.config, dtype), dtype)


def write_pickled(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    """pytorch_model.bin, which its loader looks for first."""
    config = plain_config(draft.config, target.config, dtype)
    torch.save({name: tensor.to(dtype) for name, tensor in draft.weights.items()} | draft.vocab.as_tensors(), work / PICKLED)
    (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read(path: Path) -> Found:
    return read_plain(path)


def serve(draft: Path, target: str, shape: Any) -> str:
    return (
        f"python -m eagle.evaluation.gen_ea_answer_llama3chat --ea-model-path {draft} --base-model-path {target} "
        f"--use_eagle3 --total-token {shape.nodes} --depth {shape.depth} --top-k {shape.top_k}"
    )
