"""The layout that SafeAILab's code began and SGLang, vLLM and llama.cpp's converter read: config.json beside tensors named `midlayer.*`.

It is read with all that writers made of it (other prefixes, wrong layer counts, missing keys, tables never filled): the tensors count, and
the user is told what had to be inferred. What a config says is read in draft_fields.py; how engines differ in writing the layout is in
their own files. Knows no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import DraftConfig, EyasError, TargetConfig, default_taps
from eyas.files.eagle3_files import FACTS, checked_network, engine_keys, tensors_hash
from eyas.files.tensors import save_tensors, wrapper_of
from eyas.files.untrusted import Fields, tensors_of
from eyas.formats.draft_fields import Said, check_known, layer_names, rotary_of, settings_of, sizes_of, window_of
from eyas.formats.portable import EMBEDDING, HEAD, Draft, Found
from eyas.model.vocab import DraftVocab

NAMES = {  # prefixes of others -> the published ones
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
UNUSED = ("verifier_norm.", "verifier_lm_head.")  # not the draft's own
NEEDED = ("fc.weight", "norm.weight", "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight",
          "midlayer.mlp.gate_proj.weight")  # fmt: skip
MARK = "eyas_export"  # where a config that eyas wrote for an engine keeps what only eyas asks for
EAGLE_1 = "an EAGLE-1 or EAGLE-2 head: its fc reads one feature and one embedding; eyas imports EAGLE-3 heads"


# ---- writing ----


def plain_config(draft: Draft, target: TargetConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of config.json that all engines read alike. Each engine's file adds layer ids, which engines count differently.

    Positions cover the target's: engines size their rotary tables by this number and read past them.
    """
    name = str(dtype).removeprefix("torch.")
    positions = max(draft.config.max_position_embeddings, target.max_position_embeddings)
    return engine_keys(draft.config) | {"max_position_embeddings": positions, "dtype": name, "torch_dtype": name, MARK: marks_of(draft)}


def marks_of(draft: Draft, embedding: Tensor | None = None) -> dict[str, Any]:
    """What `eyas import` needs of an export, so that it does not ask for the target again. `embedding`: the target's, where the layout
    wants it written."""
    marks = {"target_layers": draft.target_layers, **draft.facts}
    return marks if embedding is None else marks | {"embedding_sha256": tensors_hash({EMBEDDING: embedding})}


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
    said = Said()
    weights = renamed(tensors, where)
    if broken := [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]:
        raise EyasError(f"{where}: {broken[0]} holds numbers that are not finite, as a training that failed leaves them; ask for another")
    vocab = vocabulary(weights, shape, where, said)
    fields: dict[str, Any] = {**sizes_of(weights, shape, flags, said, taps), **settings_of(weights, shape, flags, said)}
    rotary, thetas = rotary_of(shape, said)
    doubts: dict[str, list[Any]] = {"rope_theta": thetas} if len(thetas) > 1 else {}
    if fields["norm_output"]:
        doubts["norm_output"] = [True, False]  # SpecForge before its change 879 wrote true for plain EAGLE-3
    if "norm_before_residual" not in flags.raw and flags is not shape:
        doubts["norm_before_residual"] = [False, True]  # speculators' default is one, vLLM's the other
    marks = flags.object(MARK)
    marks.asked.update(marks.raw)
    tied = shape.flag("tie_word_embeddings") | flags.flag("tie_word_embeddings")
    head = settle_shared(weights, fields, tied, marks.text("embedding_sha256"), where, said)
    fields |= {**rotary, "sliding_window": window_of(shape, fields["draft_layers"])}
    fields |= {"vocab_size": vocab.vocab_size, "draft_vocab_size": len(vocab)}
    check_known(flags)
    config = DraftConfig(**fields, taps=tuple(range(taps)))  # checks every size before anything is built
    weights |= missing_biases(weights, config)
    checked_network(config, with_head(weights, config), torch.zeros(1, config.hidden_size), where)
    kept = {name: tensor if tensor.is_floating_point() else tensor.float() for name, tensor in weights.items()}
    more = {"told": said.told, "wrong": said.wrong, "doubts": doubts, "says_head_dim": shape.raw.get("head_dim") is not None}
    notes = {name: value for name in FACTS if (value := marks.text(name)) is not None}
    return Found("", fields, kept, vocab, facts={**(facts or {}), **notes}, head=head, target_layers=marks.size("target_layers", 0), **more)


def renamed(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under the published names. Raises `EyasError`, which names its kind, for a draft of another kind."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if found := re.fullmatch(r"additional_layers\.(\d{1,3})\.(.*)", name):  # SGLang's earlier name for the layers behind the first
            name = f"layers.{int(found[1]) + 1}.{found[2]}"
        if name.startswith(UNUSED) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name in weights:
            raise EyasError(f"{where} holds {name} twice, under two spellings")
        weights[name] = tensor
    if "fc.weight" in weights and not any(name.startswith(("midlayer.self_attn.q_proj", "norm.")) for name in weights):
        raise EyasError(f"{where} is {EAGLE_1}")
    if missing := [name for name in NEEDED if name not in weights]:
        if wrapper := wrapper_of(weights):
            raise EyasError(f"{where}: {wrapper}")
        raise EyasError(f"{where} is no EAGLE-3 draft: it lacks {', '.join(missing[:4])}")
    if flat := [name for name in NEEDED if weights[name].dim() != (1 if name == "norm.weight" else 2)]:
        raise EyasError(f"{where}: {flat[0]} has shape {tuple(weights[flat[0]].shape)}")
    if any(weights[name].dim() != 2 for name in (HEAD, EMBEDDING) if name in weights):
        raise EyasError(f"{where}: lm_head and embed_tokens must be tables")
    width = weights["norm.weight"].shape[0]
    if weights["midlayer.self_attn.q_proj.weight"].shape[1] == width:
        raise EyasError(f"{where} is {EAGLE_1}")
    return one_norm_a_layer(weights, where)


def one_norm_a_layer(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The layers behind the first have one norm before their attention: vLLM reads it as input_layernorm, SGLang as hidden_norm."""
    for layer in layer_names(weights, where)[1:]:
        theirs, ours = weights.pop(f"{layer}.hidden_norm.weight", None), weights.get(f"{layer}.input_layernorm.weight")
        if theirs is None:
            continue
        if ours is not None and not torch.equal(ours, theirs):
            both = f"{layer} has an input_layernorm, which vLLM reads, and another hidden_norm, which SGLang reads"
            raise EyasError(f"{where}: {both}; take out of a copy which it was not trained with")
        weights[f"{layer}.input_layernorm.weight"] = theirs
    return weights


def missing_biases(weights: Mapping[str, Tensor], config: DraftConfig) -> dict[str, Tensor]:
    """Zeros for the biases that a layer leaves out where others are there: Qwen's has those of q, k and v alone."""
    names = [f"self_attn.{part}_proj" for part in "qkvo"] * config.attention_bias
    names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")] * config.mlp_bias
    every = [f"{layer}.{name}" for layer in layer_names(weights) for name in names]
    absent = [name for name in every if f"{name}.bias" not in weights and f"{name}.weight" in weights]
    return {f"{name}.bias": torch.zeros(weights[f"{name}.weight"].shape[0]) for name in absent}


def settle_shared(weights: dict[str, Tensor], fields: dict[str, Any], tied: bool, targets: str | None, where: str, said: Said) -> str:
    """Settle whether embedding and head are the draft's own or the target's; returns whose the head is, as `Found.head` has it. The
    embedding is the target's where an export of eyas's wrote its hash down (`targets`)."""
    if EMBEDDING in weights and targets == tensors_hash({EMBEDDING: weights[EMBEDDING]}):
        del weights[EMBEDDING]
    fields["own_embedding"] = EMBEDDING in weights
    width, wide = fields["hidden_size"], fields["target_hidden_size"]
    if not fields["own_embedding"] and width != wide:
        raise EyasError(f"{where} is {width} wide and its target {wide}, so it needs an embedding of its own, which the file does not hold")
    if HEAD in weights:
        if tied:
            said.wrong.append(
                "its config ties the head to the embedding, which would say other tokens; it has its own head, and that counts"
            )
        return "own"
    if tied and fields["own_embedding"]:
        weights[HEAD] = weights[EMBEDDING].clone()
        said.told.append("its head is tied to the embedding that it brings")
        return "own"
    if width != wide:
        raise EyasError(f"{where} has no head, and the target's, which then counts, is {wide} wide, not {width}")
    return "the target's, tied" if tied else "the target's"


def with_head(weights: Mapping[str, Tensor], config: DraftConfig) -> dict[str, Tensor]:
    """The weights as they will be once the target's head stands in for one that the file does not hold."""
    return {HEAD: torch.empty(config.draft_vocab_size, config.hidden_size, device="meta"), **weights}


# ---- the vocabulary ----


def vocabulary(weights: dict[str, Tensor], shape: Fields, where: str, said: Said) -> DraftVocab:
    """The draft vocabulary, from `d2t` (offsets, as published) and `t2d`, either of which may be missing or never filled. Where the head
    has a row for every token of the target, engines read neither."""
    mask, offsets = weights.pop("t2d", None), weights.pop("d2t", None)
    if any(table is not None and table.dim() != 1 for table in (mask, offsets)):
        raise EyasError(f"{where}: d2t and t2d must be lists of numbers")
    head, table, claimed = weights.get(HEAD), weights.get(EMBEDDING), shape.size("vocab_size", 0)
    size = len(mask) if mask is not None else table.shape[0] if table is not None else claimed or (0 if head is None else head.shape[0])
    rows = size if head is None else head.shape[0]
    for name, value in (("vocab_size", claimed), ("target_vocab_size", shape.size("target_vocab_size", 0))):
        if value and value != size:
            said.wrong.append(f"its config says {name} {value}, its tensors {size}: {size} is right")
    if rows == size and not (offsets is not None and offsets.any()) and (mask is None or not mask.any() or bool(mask.all())):
        if mask is None or not mask.any():
            why = "it has no d2t" if offsets is None and mask is None else "its tables were never filled"
            said.told.append(f"{why}: its vocabulary is the target's whole one")
        return DraftVocab(torch.arange(rows), size)
    return partial_vocabulary(rows, size, offsets, mask, where, said)


def partial_vocabulary(rows: int, size: int, offsets: Tensor | None, mask: Tensor | None, where: str, said: Said) -> DraftVocab:
    """A vocabulary of some of the target's tokens."""
    if mask is not None and not mask.any():
        if offsets is None or not offsets.any():
            raise EyasError(f"{where}: d2t and t2d were never filled, so nothing says which {rows} of {size} tokens it has")
        said.told.append("its t2d was never filled: d2t counts")
        mask = None
    if offsets is None and mask is None:
        raise EyasError(f"{where} has {rows} draft tokens of {size} and no d2t to say which; ask for the whole checkpoint")
    marked = None if mask is None else mask.bool().nonzero()[:, 0]
    if offsets is None or (marked is not None and not offsets.any()):
        assert marked is not None  # neither of the two: said above
        if len(marked) != rows:
            raise EyasError(f"{where}: t2d marks {len(marked)} tokens, lm_head has {rows} rows")
        if offsets is None:
            said.told.append("it has no d2t; the vocabulary is what t2d marks")
        elif int(marked[-1]) != rows - 1:
            said.wrong.append("its d2t was never filled, so engines take the first tokens; the vocabulary is what t2d marks")
        return DraftVocab(marked, size)
    if len(offsets) != rows:
        raise EyasError(f"{where}: d2t names {len(offsets)} tokens, lm_head has {rows} rows")
    if marked is None and not offsets.any():
        said.told.append(f"its d2t is all zeros: its vocabulary is the target's first {rows} tokens")
    if rows > 1 and marked is not None and torch.equal(marked, offsets.long()):
        said.wrong.append("its d2t holds ids, not offsets as published: t2d says so")
        return DraftVocab(offsets.long(), size)
    return DraftVocab.from_tensors({"d2t": offsets, **({} if mask is None else {"t2d": mask})}, size)


def default_ids(draft: Draft) -> bool:
    return draft.config.taps == default_taps(draft.target_layers)
