"""Settles what a draft's files leave open: by the layout's convention, or by measuring where a target is at hand.

A draft may leave its head to the target, and may bring an embedding that is the target's or its own. Layer ids may name layers by input or
by output, the rotary base may not be the one of training, and two flags have had two meanings. Each reading is measured on the target's own
text, and the one that agrees better is kept. Knows the questions; knows no layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError
from eyas.files.eagle3_files import check_fits
from eyas.formats.portable import EMBEDDING, HEAD, Draft, Found, TargetFiles
from eyas.measure.agreement import CLEAR_ERRORS, Agreement, Evidence, agreement

READS = {"inputs": 0, "outputs": 1}


def completed(found: Found, target: TargetFiles) -> Found:
    """The draft with the target's head, where its files bring none, and without an embedding that is the target's."""
    shape, weights, told = dict(found.shape), dict(found.weights), list(found.told)
    check_fits(found.untapped(), target.config)
    if EMBEDDING in weights:
        alike = shape["hidden_size"] == shape["target_hidden_size"] and same(weights[EMBEDDING], target.embedding())
        if alike:
            del weights[EMBEDDING]
            shape["own_embedding"] = False
        told.append("the embedding that it brings is the target's" if alike else "it brings an embedding of its own, and keeps it")
    if found.head != "own":
        if found.head == "the target's, tied" and not target.config.tie_word_embeddings:
            two = "its config ties the head, which is not in the file, to the embedding; vLLM takes the target's head, SGLang its embedding"
            raise EyasError(f"{two}, and these differ in {target.name}: write tie_word_embeddings false for the head")
        weights[HEAD] = target.head()
        told.append("it has no head of its own: the target's is taken over")
    return replace(found, shape=shape, weights=weights, told=told, head="own")


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tables hold the same numbers, once rounded as the first is or as drafts are kept."""
    return one.shape == other.shape and any(torch.equal(one.to(dtype), other.to(dtype)) for dtype in (one.dtype, torch.bfloat16))


class Resolved(NamedTuple):
    draft: Draft
    told: list[str]  # how each open question was decided


@dataclass(frozen=True)
class Reading:
    """One way to read an open fact."""

    words: str
    changes: Mapping[str, Any]  # arguments of Found.resolved
    as_said: bool  # whether the file itself says so


def readings(found: Found, target_layers: int) -> Iterator[tuple[str, list[Reading]]]:
    """Each open question with its possible readings, the file's own first."""
    for name, values in found.doubts.items():
        if name == "layer ids":
            ids = found.layer_ids or ()
            options = [
                Reading(f"they name {counts}, taps {taps}", {"taps": taps}, counts == found.counts)
                for counts, taps in ((counts, tuple(number + READS[counts] for number in ids)) for counts in READS)
                if all(0 <= tap < target_layers for tap in taps)
            ]
        else:
            options = [Reading(f"{name} {value}", {name: value}, value == found.shape[name]) for value in values]
        if not options:
            ids = list(found.layer_ids or ())
            if last_output(found, target_layers):
                what = f"layer ids {ids} name the output of the last of {target_layers} layers"
                raise EyasError(f"{what}, which some engines hand to a draft and eyas does not: it taps inputs of layers")
            raise EyasError(f"layer ids {ids} fit no reading of a target with {target_layers} layers")
        yield name, sorted(options, key=lambda option: not option.as_said)


def last_output(found: Found, target_layers: int) -> bool:
    """Whether one reading of the layer ids has the output of the last layer, which is no layer's input, as their greatest."""
    return any(max(found.layer_ids or (0,)) + more == target_layers for more in READS.values())


def resolve(
    found: Found,
    target_layers: int,
    evidence: Evidence | None = None,
    embedding: Tensor | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Resolved:
    """The draft, with every open question decided.

    With `evidence` (the target's text and states) every question is measured in turn, and the file's own reading is given up only where
    another is clearly better. Without evidence the file's own reading stands. `report` gets how many readings are measured, and of how
    many, before the first and after each.
    """
    changes: dict[str, Any] = {}
    told = []
    questions = list(readings(found, target_layers))
    done, total = 0, sum(len(options) for _, options in questions)
    report(done, total)
    for name, options in questions:
        if evidence is None or embedding is None:
            told.append(f"{name}: {options[0].words}, as its layout has it; not measured (give --target)")
            changes |= options[0].changes
            continue
        scores: list[Agreement] = []
        for option in options:
            scores.append(measured(found, target_layers, changes | dict(option.changes), evidence, embedding))
            done += 1
            report(done, total)
        best = max(range(len(options)), key=lambda number: float(scores[number].log_q.mean()))
        if best and not scores[best].overrules(scores[0]):
            best = 0
        changes |= options[best].changes
        told.append(f"{name}: {verdict(options, scores, best)}")
        if name == "layer ids" and len(options) == 1 and last_output(found, target_layers):
            other = "the output of the target's last layer, which engines hand out and eyas does not"
            told.append(f"layer ids: by the other reading one of them is {other}; if its guesses are poor, that is why")
    return Resolved(found.resolved(target_layers, **changes), told)


def measured(found: Found, target_layers: int, changes: Mapping[str, Any], evidence: Evidence, embedding: Tensor) -> Agreement:
    draft = found.resolved(target_layers, **changes)
    return agreement(draft.network(embedding), draft.vocab, evidence)


def verdict(options: list[Reading], scores: list[Agreement], best: int) -> str:
    beside = [f"{option.words}: {score.tau:.2f}" for option, score in zip(options, scores, strict=True)]
    others = [abs(scores[best].beats(score)) for number, score in enumerate(scores) if number != best]
    if not others:
        return f"{options[best].words} (the only reading that fits the target)"
    sure = (
        f"{min(others):.0f} standard errors apart" if min(others) >= CLEAR_ERRORS else "no clear difference, the file's own reading stands"
    )
    if not scores[best].telling:
        sure = "it agrees with this target in none of them, so the file's own reading stands"
    return f"{options[best].words} ({'; '.join(beside)} tokens a round; {sure})"
