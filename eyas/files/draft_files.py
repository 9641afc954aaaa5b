"""Drafts of every method on disk: weights in bfloat16, the draft vocabulary beside them, and config.json in the form that the method's
authors gave it, with eyas's own facts in words under `eyas`.

Knows files and what makes a draft fit a target; knows no network. EAGLE-3's own files are read in eagle3_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eyas.config import EyasError, TargetConfig, rope_kind, short
from eyas.files.eagle3_files import FACTS, tensors_hash
from eyas.files.tensors import check_tensors, load_strictly, save_tensors
from eyas.files.untrusted import Fields, tensors_of
from eyas.model.protocols import DraftModule
from eyas.model.shared_weights import SharedWeights
from eyas.model.vocab import DraftVocab

Network = TypeVar("Network", bound=SharedWeights)
ConfigOf = Callable[[Any, int], dict[str, Any]]  # network, the target's layers -> config.json without eyas's facts


def saver(method: str, config_of: ConfigOf, named: Callable[[str, int], str] = lambda name, layers: name) -> Callable[..., None]:
    """Make a method's `save`. It writes weights (the network's own, or `weights`) in bfloat16 under the names that `named` gives them, the
    draft vocabulary, and config.json, into an existing directory. Of the facts it keeps those that FACTS names, accuracies,
    and the method that the draft was trained as, which may be a copy of this one under another name."""

    def save(
        directory: Path,
        network: DraftModule,
        vocab: DraftVocab,
        target_layers: int,
        weights: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        own, facts = dict(network.named_parameters()), facts or {}
        half = {named(name, target_layers): (weights or own)[name].detach().to(torch.bfloat16) for name in own} | vocab.as_tensors()
        save_tensors(directory, half)
        known = {name: facts[name] for name in (*FACTS, "accuracies") if name in facts} | {"weights_sha256": tensors_hash(half)}
        config = {**config_of(network, target_layers), "vocab_size": vocab.vocab_size}
        config["eyas"] = {"method": facts.get("method", method), **known}
        (directory / "config.json").write_text(json.dumps(config, indent=1))

    return save


def read(directory: Path, target: TargetConfig, *others: str) -> tuple[Fields, dict[str, Tensor], DraftVocab]:
    """The config, weights and vocabulary of a draft. A draft without `d2t` has the target's whole vocabulary. `others`: further names that
    its file of weights may have."""
    fields, tensors = Fields.of(directory), tensors_of(directory, *others)
    if "d2t" in tensors:
        vocab = DraftVocab.from_tensors({name: tensors.pop(name) for name in ("d2t", "t2d") if name in tensors}, target.vocab_size)
    else:
        vocab = DraftVocab(range(target.vocab_size), target.vocab_size)
    return fields, tensors, vocab


def check_sizes(directory: Path, target: TargetConfig) -> None:
    """Raise `EyasError` for a draft of a target of another width or vocabulary, as far as its config says them."""
    fields = Fields.of(directory)
    sizes = {"hidden size": ("hidden_size", target.hidden_size), "vocabulary": ("vocab_size", target.vocab_size)}
    found = {name: (fields.size(key, own), own) for name, (key, own) in sizes.items()}
    wrong = [f"{name} {said} against the target's {own}" for name, (said, own) in found.items() if said != own]
    if wrong:
        raise EyasError(f"this draft was trained for another target: {'; '.join(wrong)}; use the matching draft")


def shape_keys(shape: TargetConfig) -> dict[str, Any]:
    """A decoder layer's shape under the keys of Hugging Face configs."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling")
    return {"model_type": "llama", "hidden_act": "silu", **{name: getattr(shape, name) for name in names}, "dtype": "bfloat16"}


def shape_of(fields: Fields, target: TargetConfig) -> TargetConfig:
    """The shape that a draft's config says, and where it is silent the target's: one layer without biases or norms of queries and keys."""
    rope = fields.object("rope_parameters")
    theta = rope.number("rope_theta") or fields.number("rope_theta") or target.rope_theta
    heads = fields.size("num_attention_heads", target.num_attention_heads)
    groups, width = fields.size("num_key_value_heads", heads), fields.size("head_dim", target.hidden_size // max(heads, 1))
    if not heads or not groups or heads % groups or width % 2 or not width:
        wrong = f"{heads} heads over {groups} key-value heads of width {width}"
        raise EyasError(f"{fields.where}: {wrong} do not go together: heads come in equal groups, and a head's width is even")
    scaling = fields.object("rope_scaling").raw or rope.raw
    return TargetConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=fields.size("intermediate_size", target.intermediate_size),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=fields.size("max_position_embeddings", target.max_position_embeddings),
        rms_norm_eps=fields.number("rms_norm_eps", target.rms_norm_eps),
        rope_theta=theta,
        rope_scaling=dict(scaling) if scaling and rope_kind(scaling) is not None else None,
    )


def filled(network: Network, tensors: Mapping[str, Tensor], embedding: Tensor, directory: Path, fields: Fields) -> Network:
    """The network, made on the meta device, with these weights: in the target's number format, on its embedding's device."""
    check_tensors(network, tensors, f"draft {directory}")
    network = network.to(embedding.dtype).to_empty(device=embedding.device)
    load_strictly(network, tensors, f"draft {directory}")
    network.accuracies = accuracies_of(fields)
    return network


def accuracies_of(fields: Fields) -> list[list[float]] | None:
    """The measured shares of right guesses, [depth - 1][rank]; None where they were not measured."""
    table = fields.object("eyas").raw.get("accuracies")
    if table is None:
        return None
    rows = table if isinstance(table, list) else [table]
    if not all(isinstance(row, list) and all(isinstance(share, float | int) and 0 <= share <= 1 for share in row) for row in rows):
        raise EyasError(f"{fields.where}: accuracies must be lists of shares from 0 to 1, not {short(table)}")
    return rows


def one_layer(target: TargetConfig) -> TargetConfig:
    """The shape of a draft of one layer for this target: the target's own, without biases or norms of queries and keys."""
    plain = {"attention_bias": False, "attention_out_bias": False, "qk_norm": False, "tie_word_embeddings": False}
    return replace(target, num_hidden_layers=1, eos_token_ids=(), **plain)
