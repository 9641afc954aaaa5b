"""Why a draft accepts little: looks at its files, then measures it as it is and with each usual mistake undone.

A mistake in a file shows in one of two ways: a fact contradicts another (two spellings of theta, a vocabulary and its mask), or the draft
agrees better with its target when it is read in another way (taps one layer off, halves swapped). Measuring costs one pass of the target,
and a second or so for each reading. Knows layouts through formats/layouts.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError, default_taps, short
from eyas.files.disk import directory_hash, read_json
from eyas.files.eagle3_files import LLAMA, QWEN3, tensors_hash
from eyas.files.tokenizer import chat_template_hash
from eyas.files.untrusted import Fields, tensors_of
from eyas.formats.importing import completed
from eyas.formats.layouts import find
from eyas.formats.portable import Draft, Found, TargetFiles, changed
from eyas.measure.agreement import Agreement, Evidence, agreement
from eyas.model.vocab import DraftVocab
from eyas.train.card import best_point

MEANINGLESS = {"vocabulary", "not finite", "zero weights"}  # where one of these is found, a reading agrees better only by chance
LOW = 0.25  # acceptance of the first step under which a draft is called weak
FALLEN = 0.7  # share of the figure that training measured; below it something has happened since


class Finding(NamedTuple):
    """One thing that is wrong, or that explains a low figure."""

    cause: str  # a name to tell causes apart by
    says: str  # what was seen
    do: str  # the way out


@dataclass(frozen=True)
class Reading:
    """Another reading of the draft: what it would mean, and the draft read so."""

    cause: str
    says: str
    do: str
    draft: Draft
    late: int = 0  # tokens that the feature lags behind


@dataclass(frozen=True)
class Diagnosis:
    findings: list[Finding]
    draft: Draft | None = None  # None where the files could not be read
    as_is: Agreement | None = None
    measured: list[tuple[str, float, float]] = field(default_factory=list)  # other readings: words, tau, better by standard errors

    @property
    def healthy(self) -> bool:
        return not self.findings


def diagnose(
    path: Path,
    target: TargetFiles,
    evidence: Evidence,
    embedding: Tensor,
    variables: Mapping[str, Any] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Everything that is wrong with the draft at `path`, for a target that is asked under these variables of its chat template. Files are
    looked at first; the draft is measured only where they can be read. `report` gets how many of how many readings are measured."""
    findings: list[Finding] = []
    try:
        findings += file_findings(path, target)
        findings += variable_findings(path, variables)
        found = completed(find(path), target)
        draft = found.resolved(target.config.num_hidden_layers)
        network = draft.network(embedding)
    except EyasError as error:
        return Diagnosis([*findings, unreadable(str(error))])
    findings += draft_findings(draft, found, target)
    as_is = agreement(network, draft.vocab, evidence)
    measured, best = [], None
    others = list(readings(draft, target))
    for number, reading in enumerate(others, 1):
        report(number, 1 + len(others))
        score = agreement(reading.draft.network(embedding), reading.draft.vocab, evidence, reading.late)
        measured.append((reading.says, score.tau, score.beats(as_is)))
        if score.overrules(as_is) and (best is None or float(score.log_q.mean()) > float(best[1].log_q.mean())):
            best = reading, score
    if best and not MEANINGLESS & {finding.cause for finding in findings}:
        told = f"{best[0].says}: read so it has tau {best[1].tau:.2f}, as it is {as_is.tau:.2f}"
        findings.append(Finding(best[0].cause, told, best[0].do))
    if not findings:
        findings += weakness(path, as_is)
    return Diagnosis(findings, draft, as_is, measured)


CAUSES = {  # words of a refusal -> the cause it is
    "lacks": "a part is missing",
    "missing": "a part is missing",
    "unknown": "a tensor has no place",
    "does not exist": "no draft there",
    "expected": "shapes do not fit",
    "d2t": "vocabulary",
    "draft vocabulary": "vocabulary",
    "trained for another target": "another target",
    "damaged": "damaged file",
    "not finite": "not finite",
}


def unreadable(message: str) -> Finding:
    cause = next((cause for words, cause in CAUSES.items() if words in message), "config")
    return Finding(cause, message, "eyas cannot measure it as it is; mend that, or take the files from where they were made")


# ---- what the files say ----


def file_findings(path: Path, target: TargetFiles) -> Iterator[Finding]:
    """Keys of config.json that engines read and eyas does not, and facts that contradict each other."""
    if not (path / "config.json").exists():
        return
    fields = Fields.of(path)
    layer = fields.object("transformer_layer_config") if "transformer_layer_config" in fields.raw else fields
    names, plain, parts = fields.raw.get("architectures"), layer is fields, names_in(path)
    right = QWEN3 if any(name.endswith("self_attn.k_norm.weight") for name in parts) else LLAMA
    if plain and names != [right]:
        told = f"architectures is {short(names)}: engines would load another layer than the draft's"
        yield Finding("architecture", told, f'write ["{right}"]')
    held = max(len({found[1] or found[2] for name in parts if (found := re.search(r"layers\.(\d+)\.|(midlayer)\.", name))}), 1)
    if parts and layer.size("num_hidden_layers", held) != held:
        said = layer.raw["num_hidden_layers"]
        told = f"num_hidden_layers is {said}: engines build so many, the files hold {'one' if held == 1 else held}"
        yield Finding("layer count", told, f"write {held}")
    if fields.flag("tie_word_embeddings") or layer.flag("tie_word_embeddings"):
        yield Finding("tied head", "tie_word_embeddings is true: SGLang then says the embedding's tokens, not the draft's", "write false")
    rope = layer.object("rope_parameters")
    thetas = {value for value in (layer.number("rope_theta"), rope.number("rope_theta")) if value is not None}
    trained = fields.object("eyas").number("rope_theta_trained_with")
    if len(thetas | ({trained} if trained else set())) > 1:
        told = f"rope_theta {layer.raw.get('rope_theta')}, rope_parameters {rope.raw.get('rope_theta')}, trained with {trained}"
        yield Finding("rope theta", f"the rotary base is told differently: {told}", f"write {trained or max(thetas):g} everywhere")
    if not plain and "norm_before_residual" not in fields.raw:
        told = "norm_before_residual is not written: vLLM then takes true, speculators false"
        yield Finding("norm_before_residual", told, "write which it was trained with (false for EAGLE-3)")
    if (layer.flag("attention_bias") or layer.flag("mlp_bias")) and parts and not any(name.endswith(".bias") for name in parts):
        yield Finding("bias", "it claims biases, and its files hold none", "write attention_bias and mlp_bias false")
    positions = layer.size("max_position_embeddings", 0)
    if positions < target.config.max_position_embeddings:
        most = target.config.max_position_embeddings
        told = f"max_position_embeddings is {positions}, the target reads {most}: engines read past their rotary table there"
        yield Finding("position limit", told, f"write {most}")
    yield from own_findings(path, fields, target)


def variable_findings(path: Path, variables: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Compare the variables of the chat template that a draft was trained under with those that its target is asked under."""
    own = Fields.of(path).object("eyas") if (path / "config.json").exists() else None
    if own is not None and "chat_template_kwargs" in own.raw:
        trained, asked = dict(own.object("chat_template_kwargs").raw), dict(variables or {})
        if trained != asked:
            told = (
                f"it was trained under the chat template's variables {json.dumps(trained)}, the target is asked under {json.dumps(asked)}"
            )
            yield Finding("chat template variables", told, "serve, and ask here, with --chat-template-kwargs as it was trained")


def names_in(path: Path) -> list[str]:
    """The names of its tensors; none where they cannot be read, which is told elsewhere."""
    try:
        return list(tensors_of(path))
    except EyasError:
        return []


def own_findings(path: Path, fields: Fields, target: TargetFiles) -> Iterator[Finding]:
    """Compare what eyas noted when it trained the draft with what the files say now."""
    own = fields.object("eyas")
    if not own.raw:
        return
    taps, layers = own.layers("taps_are_inputs_of_layers"), own.size("target_layers", 0)
    inputs, eagle = fields.layers("eagle_aux_hidden_state_layer_ids"), fields.object("eagle_config")
    outputs = eagle.layers("eagle_aux_hidden_state_layer_ids")
    said = [ids for ids in (inputs, tuple(number + 1 for number in outputs) if outputs else None) if ids]
    if layers > 5 and any(ids != taps for ids in said or [default_taps(layers)]):
        there = [list(ids) for ids in said] or "nothing (the default)"
        told = f"trained on the inputs of layers {list(taps or ())}, its layer ids say {there}"
        yield Finding("layer ids", told, f"write {list(taps or ())} at the top and each less one under eagle_config")
    fed = own.text("state_fed_back")
    if fed is not None and fields.flag("norm_output") != (fed == "after the final norm"):
        yield Finding("norm_output", f"norm_output is {fields.flag('norm_output')}, it was trained with the state {fed}", "put it back")
    if (known := own.text("target_sha256")) and known != directory_hash(target.directory):
        told = f"it was trained for {own.text('target') or 'another target'} ({known[:12]}), the target has other weights"
        yield Finding("another target", told, "serve it with that target, or train one for this")
    template = own.text("chat_template_sha256")
    if template and template != chat_template_hash(target.directory):
        told = "the target's chat template is not the one it was trained on: what it reads then is not what it knows"
        yield Finding("chat template", told, "serve with the template it was trained on, or train on this one")
    if (known := own.text("weights_sha256")) and known != tensors_hash(tensors_of(path)):
        yield Finding("weights changed", "its weights are not those that training wrote", "take the files from where they were made")


# ---- what the tensors say ----


def draft_findings(draft: Draft, found: Found, target: TargetFiles) -> Iterator[Finding]:
    for name, tensor in draft.weights.items():
        if not bool(torch.isfinite(tensor).all()):
            told = f"{name} holds numbers that are not finite (a float16 overflow, say)"
            yield Finding("not finite", told, "convert it again in bf16 or fp32")
        elif not bool(tensor.any()) and not name.endswith(".bias"):
            yield Finding("zero weights", f"{name} is all zeros: it was never filled", "take the files from where they were made")
    size = len(draft.vocab)
    if size < draft.config.vocab_size and torch.equal(draft.vocab.ids, torch.arange(size)):
        told = f"its vocabulary is the first {size} tokens of the target: d2t is lost or zero"
        yield Finding("vocabulary", told, "take d2t from where it was made; without it a draft says other tokens than it means")
    ends = [token for token in target.config.eos_token_ids if not bool((draft.vocab.ids == token).any())]
    if ends and len(ends) == len(target.config.eos_token_ids):
        told = f"its vocabulary holds no token that ends an answer ({ends}): every end is a miss"
        yield Finding("end of turn", told, "train with the end of turn counted into the vocabulary, as `eyas train` does")
    config = draft.config
    usual = config.hidden_size // config.num_attention_heads
    if not found.says_head_dim and config.head_dim != usual:
        told = f"head_dim is not written: engines then take {usual}, its heads are {config.head_dim} wide"
        yield Finding("head width", told, f"write head_dim {config.head_dim}")
    for line in found.wrong:
        yield Finding("config against tensors", line, "write what is right into its config: engines believe it")


# ---- read otherwise ----


def readings(draft: Draft, target: TargetFiles) -> Iterator[Reading]:
    """The draft with each usual mistake undone, one at a time."""
    config, layers = draft.config, target.config.num_hidden_layers
    for step, meaning in ((-1, "its ids were counted one layer too late"), (1, "its ids were counted one layer too early")):
        taps = tuple(tap + step for tap in config.taps)
        if taps[0] >= 0 and taps[-1] < layers:
            do = f"its features are the inputs of layers {list(taps)}: vLLM's ids are these, SGLang's each less one"
            yield Reading("layer ids", meaning, do, changed(draft, taps=taps))
    if layers > 5 and len(config.taps) == 3 and config.taps != default_taps(layers):
        do = f"its features are the inputs of layers {list(default_taps(layers))}: leave ids out or write these"
        yield Reading("layer ids", "it was trained on the default layers", do, changed(draft, taps=default_taps(layers)))
    do = "it was trained on features one place off and is of no use served right: train it again with f_j beside t_(j+1)"
    yield Reading("feature late", "it was trained with the feature of the token before", do, draft, late=1)
    yield Reading(
        "norm_output",
        f"it was trained with the state fed back {'before' if config.norm_output else 'after'} the final norm",
        f"write norm_output {not config.norm_output}",
        changed(draft, norm_output=not config.norm_output),
    )
    yield Reading(
        "norm_before_residual",
        f"it was trained with {'the bare' if config.norm_before_residual else 'the normed'} feature as residual",
        f"write norm_before_residual {not config.norm_before_residual}",
        changed(draft, norm_before_residual=not config.norm_before_residual),
    )
    for theta in sorted({10000.0, float(target.config.rope_theta)} - {config.rope_theta}):
        do = f"write rope_theta {theta:g}, and the same in rope_parameters"
        yield Reading("rope theta", f"it was trained with a rotary base of {theta:g}", do, changed(draft, rope_theta=theta))
    yield from weight_readings(draft)
    yield from vocabulary_readings(draft)


def weight_readings(draft: Draft) -> Iterator[Reading]:
    again = "convert it again from where it was made"
    usual, count = ("low", "middle", "high"), len(draft.config.taps)
    names = usual if count == 3 else [f"tap {tap}" for tap in draft.config.taps]
    parts = draft.weights["fc.weight"].chunk(count, 1)
    for order in permutations(range(count)) if count <= 3 else [tuple(range(count))[::-1]]:
        if order != tuple(range(count)):
            told = f"the columns of fc are those of {', '.join(names[part] for part in order)}"
            fc = torch.cat([parts[order.index(place)] for place in range(count)], 1)
            yield Reading("order of features", told, again, reweighed(draft, {"fc.weight": fc}))
    halves = {
        name: torch.cat(tensor.chunk(2, 1)[::-1], 1)
        for name, tensor in draft.weights.items()
        if re.fullmatch(r"midlayer\.self_attn\.[qkv]_proj\.weight", name)
    }
    told = "attention's columns are feature first, embedding second"
    yield Reading("order of halves", told, again, reweighed(draft, halves))
    e, g = "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"
    told = "input_layernorm and hidden_norm have each other's weights"
    yield Reading("norms swapped", told, again, reweighed(draft, {e: draft.weights[g], g: draft.weights[e]}))


def vocabulary_readings(draft: Draft) -> Iterator[Reading]:
    """The draft with d2t read as ids. d2t should hold offsets; where a file holds ids instead, reading it adds each one's index to it."""
    ids = draft.vocab.ids - torch.arange(len(draft.vocab))
    if len(ids) > 1 and bool((ids[1:] > ids[:-1]).all()):
        do = "write d2t as offsets: the target's id less the draft's"
        yield Reading("vocabulary", "its d2t holds ids, not offsets", do, replace(draft, vocab=DraftVocab(ids, draft.config.vocab_size)))


def reweighed(draft: Draft, weights: Mapping[str, Tensor]) -> Draft:
    return replace(draft, weights={**draft.weights, **weights})


# ---- nothing wrong, and yet ----


def weakness(path: Path, as_is: Agreement) -> Iterator[Finding]:
    """Findings for a draft with nothing wrong in it that accepts little, or less than when it was trained."""
    first = as_is.acceptance[0]
    told = path / "training.json"
    best = best_point(read_json(told)) if path.is_dir() and told.exists() else None
    kept = best["accept_1"] if best else math.nan
    if first < FALLEN * kept:
        says = f"its first guess is right {first:.0%} of the time; when it was trained, {kept:.0%}"
        yield Finding("fallen", says, "what it reads here is not what it was trained on: target, template or files")
    elif first < LOW:
        says = f"its first guess is right {first:.0%} of the time, and no usual mistake explains it"
        yield Finding(
            "weak", says, "it was trained too little, on too few texts, or on text that this target did not write; train it further"
        )
