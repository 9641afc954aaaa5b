"""SafeAILab's own runtime (the paper's published code): plain layout, taps fixed in its code, only the paper's arithmetic."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from eyas.config import TreeShape, rope_kind
from eyas.files.untrusted import PICKLED
from eyas.formats.draft_fields import THETA
from eyas.formats.plain import default_ids, own_width, plain_config, write_plain
from eyas.formats.portable import OTHER_WIDTH, OWN_EMBEDDING, Draft, TargetFiles, unusual

TITLE = "SafeAILab/EAGLE"
WEIGHTS = ("bf16", "fp16", "fp32")


def refusal(draft: Draft) -> str | None:
    if why := unusual(draft, "SafeAILab's code", (OTHER_WIDTH, OWN_EMBEDDING)):
        return why
    config = draft.config
    if not default_ids(draft):
        n = draft.target_layers
        return f"its code reads the inputs of layers 2, {n // 2}, {n - 3} and no others; this draft reads {list(config.taps)}"
    if config.fc_norm or config.norm_output or config.norm_before_fc or config.norm_before_residual:
        return "its code knows neither fc_norm, norm_output nor the other norms; SGLang and vLLM do"
    kind = rope_kind(config.rope_scaling or {})
    if kind is not None and (kind not in ("linear", "dynamic") or config.rope_theta != THETA):
        return f"its code scales rotary embeddings only linearly or dynamically, and then of base {THETA:g}"
    if not own_width(config):
        return f"its code ignores head_dim and takes {config.hidden_size} / {config.num_attention_heads}; this draft's is {config.head_dim}"
    return None


def config_for(draft: Draft, target: TargetFiles, dtype: torch.dtype) -> dict[str, Any]:
    """No layer ids; rotary scaling names its kind `type`. target_hidden_size stands where the embedding is in the file, and only there."""
    config, scaling = plain_config(draft, target.config, dtype), draft.config.rope_scaling or {}
    config["rope_scaling"] = {**scaling, "type": kind} if (kind := rope_kind(scaling)) is not None else None
    return config | ({"target_hidden_size": draft.config.target_hidden_size} if draft.config.own_embedding else {})


def write(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    write_plain(work, draft, config_for(draft, target, dtype), dtype)


def write_pickled(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    """Write pytorch_model.bin, which SafeAILab's loader looks for first, and config.json."""
    config = config_for(draft, target, dtype)
    torch.save({name: tensor.to(dtype) for name, tensor in draft.weights.items()} | draft.vocab.as_tensors(), work / PICKLED)
    (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    """The command that loads SafeAILab's class, in a checkout of its code. The target's weights must lie in shards with an index, by which
    the class finds the embedding."""
    settings = f"total_token={shape.nodes}, depth={max(shape.depth, 0)}, top_k={shape.top_k}"
    paths = "base_model_path=sys.argv[1], ea_model_path=sys.argv[2]"  # as words of their own: they may hold quotes
    code = f"import sys; from eagle.model.ea_model import EaModel; model = EaModel.from_pretrained({paths}, use_eagle3=True, {settings})"
    return f'python -c "{code}" {shlex.join([target, str(draft)])}'
