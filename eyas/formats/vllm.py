"""vLLM, two layouts: the plain directory, and speculators' (`layers.0.*`, every flag written), which `vllm serve DIR` takes alone.

Layer ids name the layers whose *input* is read, as eyas's taps do. Read in version 0.32: the norm settings default differently by layout,
so all are written.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from eyas.config import EyasError, TreeShape
from eyas.files.disk import read_json
from eyas.files.eagle3_files import layer_ids
from eyas.files.tensors import save_tensors
from eyas.files.untrusted import Fields, tensors_of
from eyas.formats.plain import MARK, found_in, marks_of, plain_config, write_plain
from eyas.formats.portable import (
    BIASES,
    MORE_LAYERS,
    OTHER_WIDTH,
    OWN_EMBEDDING,
    PARTIAL,
    QK_NORM,
    WINDOW,
    Draft,
    Found,
    TargetFiles,
    unusual,
)

TITLE = "vLLM 0.32"
VARIABLES = "--default-chat-template-kwargs"  # of the chat template, for requests that set none
WEIGHTS = ("bf16", "fp16", "fp32")
SPECULATIVE_TOKENS = 3
OUTER = ("architectures", "draft_vocab_size", "target_hidden_size", "fc_norm", "norm_output", "norm_before_fc", "norm_before_residual",
         "own_embedding", "qk_norm", "draft_layers", MARK)  # fmt: skip


def refusal(draft: Draft) -> str | None:
    config = draft.config
    if config.qk_norm and (config.attention_bias or config.mlp_bias):
        return "vLLM's draft layer with norms of queries and keys (Qwen3's) has no biases, this draft's has both"
    return unusual(draft, "vLLM", (MORE_LAYERS, OTHER_WIDTH, OWN_EMBEDDING, QK_NORM, BIASES, WINDOW, PARTIAL))


def write(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    write_plain(work, draft, plain_config(draft, target.config, dtype) | layer_ids(draft.config), dtype)


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    settings = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": shape.levels}
    return f"{serve_alone(target)} {shlex.join(['--speculative-config', json.dumps(settings, ensure_ascii=False)])}"


def serve_alone(target: str) -> str:
    return shlex.join(["vllm", "serve", target])


# ---- speculators' layout ----


def write_speculators(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    """Write speculators' layout. Where the draft has no embedding of its own it holds the target's, since speculators' own model class
    needs it; vLLM sees that it is the target's and shares it."""
    config, name = draft.config, str(dtype).removeprefix("torch.")
    layer = {key: value for key, value in plain_config(draft, target.config, dtype).items() if key not in OUTER}
    verifier = read_json(target.directory / "config.json")
    weights = {key.replace("midlayer.", "layers.0."): tensor.to(dtype) for key, tensor in draft.weights.items()}
    shared = None if config.own_embedding else target.embedding().to(dtype)
    told = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size if config.target_hidden_size != config.hidden_size else None,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": config.own_embedding,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "tie_word_embeddings": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": name_for(target), "architectures": verifier.get("architectures", [])},
        },
        "dtype": name,
        "torch_dtype": name,
        MARK: marks_of(draft, shared),
    }
    save_tensors(work, weights | ({} if shared is None else {"embed_tokens.weight": shared}) | draft.vocab.as_tensors())
    (work / "config.json").write_text(json.dumps(told, indent=1) + "\n")


def name_for(target: TargetFiles) -> str:
    """The name or path by which vLLM loads the verifier; it does not read GGUF files here."""
    return str(target.directory) if target.name.endswith(".gguf") else target.name


def is_speculators(path: Path) -> bool:
    return (path / "config.json").exists() and "speculators_model_type" in Fields.of(path).raw


def read_speculators(path: Path) -> Found:
    flags = Fields.of(path)
    kind = flags.text("speculators_model_type")
    if kind != "eagle3":
        raise EyasError(f"{path} is a {kind} head of speculators; eyas imports eagle3")
    layer = flags.object("transformer_layer_config")
    flags.given("model_type")  # of speculators' own class; the layer's stands with the layer
    verifier = flags.object("speculators_config").object("verifier").text("name_or_path")
    ids = flags.layers("eagle_aux_hidden_state_layer_ids")
    found = found_in(tensors_of(path), layer, flags, str(path), {"target": verifier} if verifier else {}, len(ids or (0, 0, 0)))
    doubts = found.doubts | ({"layer ids": ["inputs", "outputs"]} if ids else {})
    return replace(found, layout="speculators", layer_ids=ids, counts="inputs", doubts=doubts)


def serve_speculators(draft: Path, target: str, shape: TreeShape) -> str:
    return serve_alone(str(draft))
