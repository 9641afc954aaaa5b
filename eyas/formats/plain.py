"""The layout that SafeAILab's code began and SGLang, vLLM and llama.cpp's converter read: config.json beside tensors named `midlayer.*`.

It is read with all that writers made of it (other prefixes, wrong layer counts, missing keys): the tensors count, and the user is told what
had to be inferred. How engines differ in writing it is in their own files. Knows no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import DraftConfig, EyasError, TargetConfig, default_taps, rope_kind, short
from eyas.files.eagle3_files import checked_network, engine_keys
from eyas.files.tensors import save_tensors
from eyas.files.untrusted import Fields, tensors_of
from eyas.formats.portable import Draft, Found
from eyas.model.vocab import DraftVocab

NAMES = {  # prefixes of others -> the published ones
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
UNUSED = ("verifier_norm.", "verifier_lm_head.", "rotary_emb.inv_freq", "midlayer.self_attn.rotary_emb.inv_freq")  # not the draft's own
NEEDED = ("fc.weight", "norm.weight", "lm_head.weight", "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight",
          "midlayer.mlp.gate_proj.weight")  # fmt: skip
EAGLE_1 = "an EAGLE-1 or EAGLE-2 head: its fc reads one feature and one embedding; eyas imports EAGLE-3 heads"
THETA = 10000.0  # where a config names none; SafeAILab's trainer used it whatever the config said


# ---- writing ----


def plain_config(config: DraftConfig, target: TargetConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of config.json that all engines read alike. Each engine's file adds layer ids, which engines count differently.

    Positions cover the target's: engines size their rotary tables by this number and read past them.
    """
    name = str(dtype).removeprefix("torch.")
    positions = max(config.max_position_embeddings, target.max_position_embeddings)
    return engine_keys(config) | {"max_position_embeddings": positions, "dtype": name, "torch_dtype": name}


def write_plain(work: Path, draft: Draft, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write model.safetensors, with the weights in `dtype` and the vocabulary, and config.json."""
    save_tensors(work, {name: tensor.to(dtype) for name, tensor in draft.weights.items()} | draft.vocab.as_tensors())
    (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def own_width(config: DraftConfig) -> bool:
    """Whether all heads together have the model's width, which readers that ignore head_dim assume."""
    return config.num_attention_heads * config.head_dim == config.hidden_size


# ---- reading ----


def read_plain(directory: Path) -> Found:
    """Read a plain directory. Where the layer ids stand in the config tells which layers they mean."""
    fields = Fields.of(directory)
    inputs = fields.layers("eagle_aux_hidden_state_layer_ids")
    eagle = fields.object("eagle_config")
    outputs = eagle.layers("eagle_aux_hidden_state_layer_ids")
    if eagle.flag("use_aux_hidden_state", True) is False:
        raise EyasError(f"{directory} reads one vector of the target (use_aux_hidden_state false); eyas imports heads that read several")
    found = found_in(tensors_of(directory), fields, fields, str(directory), taps=len(inputs or outputs or default_taps(0)))
    wrong, doubts = list(found.wrong), dict(found.doubts)
    agree = inputs is not None and outputs is not None and tuple(number + 1 for number in outputs) == inputs
    if inputs and outputs and not agree:
        wrong.append(f"layer ids {list(inputs)} at the top and {list(outputs)} under eagle_config do not name the same layers")
    if (inputs or outputs) and not agree:
        doubts["layer ids"] = ["inputs", "outputs"]
    layer_ids, counts = (outputs, "outputs") if outputs and not inputs else (inputs, "inputs")
    return replace(found, layout="plain (SafeAILab, SGLang, vLLM)", layer_ids=layer_ids, counts=counts, wrong=wrong, doubts=doubts)


def found_in(
    tensors: dict[str, Tensor], shape: Fields, flags: Fields, where: str, facts: Mapping[str, Any] | None = None, taps: int = 3
) -> Found:
    """A draft from its tensors, the fields of its decoder layer (`shape`), its EAGLE settings (`flags`) and how many layers it reads."""
    weights = renamed(tensors, where)
    embedding = weights.pop("embed_tokens.weight", None)
    told: list[str] = []
    wrong: list[str] = []
    vocab = vocabulary(weights, shape, embedding, where, told, wrong)
    sizes = sizes_of(weights, shape, where, wrong, taps)
    settings = settings_of(weights, shape, flags, told, wrong)
    scaling = next((held for held in (shape.object(key).raw for key in ("rope_parameters", "rope_scaling")) if scales(held)), {})
    said = [value for value in (shape.object("rope_parameters").number("rope_theta"), shape.number("rope_theta")) if value is not None]
    theta = said[0] if said else THETA
    if not said:
        told.append(f"its config names no rope theta; {THETA:g}, which engines then take")
    if len(set(said)) > 1:
        wrong.append(f"its config names two rope thetas, {said[0]:g} in rope_parameters and {said[1]:g} at the top")
    candidates = list(dict.fromkeys([*said, THETA]))
    doubts: dict[str, list[Any]] = {"rope_theta": candidates} if len(candidates) > 1 else {}
    if settings["norm_output"]:
        doubts["norm_output"] = [True, False]  # SpecForge before its change 879 wrote true for plain EAGLE-3
    if "norm_before_residual" not in flags.raw and flags is not shape:
        doubts["norm_before_residual"] = [False, True]  # speculators' default is one, vLLM's the other
    shape_fields = {
        **sizes,
        **settings,
        "vocab_size": vocab.vocab_size,
        "draft_vocab_size": len(vocab),
        "rope_theta": theta,
        "rope_scaling": {key: value for key, value in scaling.items() if key != "rope_theta"} or None,
    }
    config = DraftConfig(**shape_fields, taps=tuple(range(taps)))  # checks every size before anything is built
    checked_network(config, weights, torch.zeros(1, config.hidden_size), where)
    kept = {name: tensor if tensor.is_floating_point() else tensor.float() for name, tensor in weights.items()}
    more = {"told": told, "wrong": wrong, "doubts": doubts, "says_head_dim": shape.raw.get("head_dim") is not None}
    return Found("", shape_fields, kept, vocab, embedding=embedding, facts=dict(facts or {}), **more)


def scales(rope: Mapping[str, Any]) -> bool:
    """Whether this describes a scaled rotary embedding; transformers 5 writes an object for plain ones too."""
    return rope_kind(rope) is not None


def renamed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under the published names. Raises `EyasError`, which names its kind, for a draft of another kind."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if name.startswith(UNUSED):
            continue
        if name in weights:
            raise EyasError(f"{where} holds {name} twice, under two spellings")
        weights[name] = tensor
    more = sorted({name.split(".")[1] for name in weights if name.startswith(("layers.", "additional_layers."))})
    if more:
        raise EyasError(f"{where} has {len(more) + 1} decoder layers; engines disagree on such heads, and eyas imports those with one")
    if "fc.weight" in weights and not any(name.startswith(("midlayer.self_attn.q_proj", "norm.")) for name in weights):
        raise EyasError(f"{where} is {EAGLE_1}")
    if missing := [name for name in NEEDED if name not in weights]:
        raise EyasError(f"{where} is no EAGLE-3 draft: it lacks {', '.join(missing[:4])}")
    if flat := [name for name in NEEDED if weights[name].dim() != (1 if name == "norm.weight" else 2)]:
        raise EyasError(f"{where}: {flat[0]} has shape {tuple(weights[flat[0]].shape)}")
    width = weights["norm.weight"].shape[0]
    if weights["midlayer.self_attn.q_proj.weight"].shape[1] == width:
        raise EyasError(f"{where} is {EAGLE_1}")
    return weights


def vocabulary(
    weights: dict[str, Tensor], shape: Fields, embedding: Tensor | None, where: str, told: list[str], wrong: list[str]
) -> DraftVocab:
    """The draft vocabulary, from `d2t` (offsets, as published) and `t2d`, either of which may be missing."""
    rows = weights["lm_head.weight"].shape[0]
    mask, offsets = weights.pop("t2d", None), weights.pop("d2t", None)
    if any(table is not None and table.dim() != 1 for table in (mask, offsets)):
        raise EyasError(f"{where}: d2t and t2d must be lists of numbers")
    claimed = shape.size("vocab_size", 0)
    size = len(mask) if mask is not None else embedding.shape[0] if embedding is not None else claimed or rows
    if claimed and claimed != size:
        wrong.append(f"its config says vocab_size {claimed}, its tensors {size}: {size} is right")
    if mask is None and offsets is None:
        if rows != size:
            raise EyasError(f"{where} has {rows} draft tokens of {size} and no d2t to say which; ask for the whole checkpoint")
        told.append("it has no d2t: its vocabulary is the target's whole one")
        return DraftVocab(torch.arange(rows), size)
    if offsets is None:
        assert mask is not None  # neither of the two: said above
        told.append("it has no d2t; the vocabulary is what t2d marks")
        return DraftVocab(mask.bool().nonzero()[:, 0], size)
    if len(offsets) != rows:
        raise EyasError(f"{where}: d2t names {len(offsets)} tokens, lm_head has {rows} rows")
    if rows > 1 and mask is not None and torch.equal(mask.bool().nonzero()[:, 0], offsets.long()):
        wrong.append("its d2t holds ids, not offsets as published: t2d says so")
        return DraftVocab(offsets.long(), size)
    return DraftVocab.from_tensors({"d2t": offsets, **({} if mask is None else {"t2d": mask})}, size)


def sizes_of(weights: Mapping[str, Tensor], shape: Fields, where: str, wrong: list[str], taps: int) -> dict[str, int]:
    """Widths and heads as the tensors have them; the user is told where the config says otherwise."""
    width, fused = weights["norm.weight"].shape[0], weights["fc.weight"].shape[1]
    if fused % taps:
        raise EyasError(f"{where}: fc reads {fused} numbers, which is not {taps} features of the target")
    heads = shape.size("num_attention_heads")
    kv_heads = shape.size("num_key_value_heads", heads)
    rows, kv_rows = (weights[f"midlayer.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
    if not heads or not kv_heads or rows % heads or kv_rows * heads != rows * kv_heads:
        raise EyasError(f"{where}: {rows} query rows and {kv_rows} key rows do not make {heads} heads and {kv_heads} key-value heads")
    found = {
        "hidden_size": width,
        "intermediate_size": weights["midlayer.mlp.gate_proj.weight"].shape[0],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rows // heads,
        "target_hidden_size": fused // taps,
    }
    said = found | {"num_hidden_layers": 1, "draft_vocab_size": weights["lm_head.weight"].shape[0]}
    for name, value in said.items():
        if shape.raw.get(name) is not None and shape.size(name) != value:
            wrong.append(f"its config says {name} {shape.raw[name]}, its tensors {value}: {value} is right")
    found["max_position_embeddings"] = shape.size("max_position_embeddings", 2048)
    return found


def settings_of(weights: Mapping[str, Tensor], shape: Fields, flags: Fields, told: list[str], wrong: list[str]) -> dict[str, Any]:
    """The settings that the arithmetic depends on, which tensors show only in part."""
    normed, fused = "fc_norm.0.weight" in weights, "input_norm.weight" in weights
    eagle = shape.object("eagle_config")  # where SGLang looks for norm_before_fc
    for name, there in (("fc_norm", normed), ("norm_before_fc", fused)):
        if there != (said := flags.flag(name, eagle.flag(name, there))):
            wrong.append(f"its config says {name} {said}, its tensors {there}: {there} is right")
    if shape.flag("tie_word_embeddings"):
        wrong.append("its config ties the head to the embedding, which would say other tokens; it has a head of its own, and that counts")
    if (activation := shape.text("hidden_act") or "silu") != "silu":
        raise EyasError(f"{shape.where}: hidden_act {short(activation)}; eyas's draft layer computes silu")
    if shape.raw.get("rms_norm_eps") is None:
        told.append("its config names no rms_norm_eps; 1e-06, which engines then take")
    return {
        "rms_norm_eps": shape.number("rms_norm_eps", 1e-6),
        "fc_norm": normed,
        "norm_before_fc": fused,
        "norm_output": flags.flag("norm_output"),
        "norm_before_residual": flags.flag("norm_before_residual"),
    }


def default_ids(draft: Draft) -> bool:
    return draft.config.taps == default_taps(draft.target_layers)
