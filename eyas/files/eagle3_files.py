"""An EAGLE-3 draft on disk: bfloat16 weights under the published names, and the config.json that SafeAILab, SGLang and vLLM read.

Knows files and what makes a draft fit a target; knows nothing of what the network (model/draft.py) computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import DraftConfig, EyasError, TargetConfig, check_taps, default_taps
from eyas.files.disk import read_json
from eyas.files.tensors import check_tensors, load_strictly, read_tensors, save_tensors
from eyas.model.draft import DraftNetwork
from eyas.model.vocab import DraftVocab

LLAMA, QWEN3 = "LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"  # engines' names of the draft's layer, without and with q/k norms
OWN_KEYS = {"draft_layers": 1, "own_embedding": False}  # what engines see from other fields and tensors -> the value that is not written
# what a draft's config.json says of the target it was trained for
FACTS = ("target", "target_sha256", "chat_template_sha256", "chat_template_kwargs")


def save_draft(
    directory: Path,
    network: DraftNetwork,
    vocab: DraftVocab,
    target_layers: int,
    weights: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (bfloat16; `weights`, or else the network's own) and config.json into an existing directory, in the layout that
    SafeAILab, SGLang and vLLM read. Only the `facts` named in FACTS are written."""
    own = dict(network.named_parameters())
    tensors = {name: (weights or own)[name].detach().to(torch.bfloat16) for name in own} | vocab.as_tensors()
    save_tensors(directory, tensors)
    known = {name: (facts or {})[name] for name in FACTS if name in (facts or {})} | {"weights_sha256": tensors_hash(tensors)}
    (directory / "config.json").write_text(json.dumps(config_to_file(network.config, target_layers, known), indent=1))


def config_to_file(config: DraftConfig, target_layers: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json: engines' keys, and eyas's own facts in words under `eyas`."""
    keys = engine_keys(config) | {name: getattr(config, name) for name, usual in OWN_KEYS.items() if getattr(config, name) != usual}
    keys |= {
        "eyas": {
            "taps_are_inputs_of_layers": list(config.taps),
            "target_layers": target_layers,
            "rope_theta_trained_with": config.rope_theta,
            "state_fed_back": "after the final norm" if config.norm_output else "before the final norm",
            **(facts or {}),
        },
    }
    if config.taps != default_taps(target_layers) or config.norm_before_fc:  # all engines read the default taps alike
        keys |= layer_ids(config)
    return keys


def layer_ids(config: DraftConfig) -> dict[str, Any]:
    """The layer ids in both spellings, so that the folder is right in either engine: vLLM reads the first, which names layers by input,
    SGLang the second, which names them by output."""
    taps = list(config.taps)
    if taps[0] == 0:  # it is the output of no layer, so the second spelling cannot name it
        return {"eagle_aux_hidden_state_layer_ids": taps}
    eagle: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps], "use_aux_hidden_state": True}
    if config.norm_before_fc:
        eagle["norm_before_fc"] = True  # where SGLang looks for it
    return {"eagle_aux_hidden_state_layer_ids": taps, "eagle_config": eagle}


def engine_keys(config: DraftConfig) -> dict[str, Any]:
    """The draft's shape under the keys that all engines share. Layer ids are not here, since engines count them differently.

    target_hidden_size only where it is another width: SafeAILab takes its presence for "the embedding is in this file".
    """
    usual = {"qk_norm": False, "partial_rotary_factor": 1, "sliding_window": None, "target_hidden_size": config.hidden_size}
    left_out = {"taps", "rope_scaling", *OWN_KEYS} | {name for name, value in usual.items() if getattr(config, name) == value}
    partial = {} if config.partial_rotary_factor == 1 else {"partial_rotary_factor": config.partial_rotary_factor}
    windows = {"layer_types": ["sliding_attention"] * config.draft_layers, "use_sliding_window": True}
    return {
        "architectures": [QWEN3 if config.qk_norm else LLAMA],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "num_hidden_layers": config.draft_layers,
        "hidden_act": "silu",
        **{key: value for key, value in asdict(config).items() if key not in left_out},
        **({} if config.sliding_window is None else windows),
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta, **partial},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' names, shapes and bytes, however they are spread over files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_from_file(directory: Path) -> DraftConfig:
    path = directory / "config.json"
    raw = read_json(path)
    own = raw["eyas"] if isinstance(raw.get("eyas"), dict) else {}
    if (method := own.get("method", "eagle3")) != "eagle3":
        raise EyasError(f"{directory} is a draft for method {method}; what was asked for is made for eagle3's drafts only")
    if "draft_vocab_size" not in raw or not own:
        raise EyasError(f"{directory} is not a draft of eyas's making (its config.json lacks draft_vocab_size or eyas); see `eyas import`")
    told = {"target_hidden_size": raw.get("hidden_size")} | {each.name: raw[each.name] for each in fields(DraftConfig) if each.name in raw}
    try:
        return DraftConfig(**{**told, "taps": tuple(own["taps_are_inputs_of_layers"])})
    except (TypeError, KeyError) as error:
        raise EyasError(f"{path} lacks what a draft's config must say ({error}); take it from the original") from None
    except EyasError as error:
        raise EyasError(f"{path}: {error}") from None


def load_draft(directory: Path, embedding: Tensor, dtype: torch.dtype) -> tuple[DraftNetwork, DraftVocab]:
    """The network and vocabulary of a saved draft, on the embedding's device. Raises `EyasError` for any tensor too few or too many."""
    config, tensors = config_from_file(directory), read_tensors(directory)
    vocab = vocab_of(tensors, config, f"draft {directory}")
    return network_of(config, tensors, embedding, dtype, f"draft {directory}"), vocab


def vocab_of(tensors: dict[str, Tensor], config: DraftConfig, what: str) -> DraftVocab:
    """Take `d2t` and `t2d` out of the tensors, and return the vocabulary they hold. A draft that eyas wrote has both."""
    if missing := [name for name in ("d2t", "t2d") if name not in tensors]:
        raise EyasError(f"{what} does not fit: missing {', '.join(missing)}")
    vocab = DraftVocab.from_tensors({name: tensors.pop(name) for name in ("d2t", "t2d")}, config.vocab_size)
    if len(vocab) != config.draft_vocab_size:
        raise EyasError(f"{what} does not fit: d2t names {len(vocab)} tokens, its config {config.draft_vocab_size}")
    return vocab


def checked_network(config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, what: str) -> DraftNetwork:
    """A network on the meta device, once these weights fit it by name and shape. A config may claim any size, so no memory is taken
    before."""
    with torch.device("meta"):
        network = DraftNetwork(config, embedding)
    check_tensors(network, tensors, what)
    return network


def network_of(config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, dtype: torch.dtype, what: str) -> DraftNetwork:
    """A network with these weights."""
    network = checked_network(config, tensors, embedding, what).to(dtype).to_empty(device=embedding.device)
    load_strictly(network, tensors, what)
    return network


def check_fits(config: DraftConfig, target: TargetConfig) -> None:
    """Raise `EyasError`, which names the differences, for a draft of another target."""
    pairs = {
        "hidden size": (config.target_hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
    }
    wrong = [f"{name} {draft} against the target's {own}" for name, (draft, own) in pairs.items() if draft != own]
    if not config.own_embedding and config.hidden_size != config.target_hidden_size == target.hidden_size:  # it reads the target's
        wrong.append(f"its own width {config.hidden_size} against the target's {target.hidden_size}")
    try:
        check_taps(config.taps, target.num_hidden_layers)
    except EyasError:
        wrong.append(f"taps {config.taps} of a target with {target.num_hidden_layers} layers")
    if wrong:
        raise EyasError(f"this draft was trained for another target: {'; '.join(wrong)}; use the matching draft")
