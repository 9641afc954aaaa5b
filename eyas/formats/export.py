"""Writes a draft in an engine's layout, and keeps it only if what was written, read back, computes the same.

Knows layouts by their names and the probe that compares two drafts; knows no engine.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError
from eyas.files.disk import atomic_directory
from eyas.files.eagle3_files import check_fits
from eyas.formats.layouts import DTYPES, Layout, find, layout_of
from eyas.formats.portable import Draft, TargetFiles, probe

EXACT = 1e-6  # largest difference of logits allowed where nothing is rounded
ROUNDED = 5.0  # and where weights are, in standard deviations of the logits: more is an overflow, not rounding
DRAFTS = ("config.json", "*.gguf", "openvino_model.xml")  # a folder may be replaced only if it has one of these files
KEPT = ("training.json",)  # files of the draft that travel along


@dataclass(frozen=True)
class Check:
    """What comparing the written draft with the original showed."""

    difference: float | None  # largest difference of logits on seeded input, in float32; None where the layout cannot be read back
    spread: float | None  # standard deviation of those logits, to compare with
    exact: bool  # whether no rounding was asked for
    taps: tuple[int, ...]


def export(draft: Draft, source: Path, name: str, out: Path, target: TargetFiles, weights: str | None, force: bool, **extra: Any) -> Check:
    """Write `draft` as layout `name` into `out`, whole or not at all; an existing `out` is replaced only with `force`."""
    layout = layout_of(name)
    weights = weights or layout.weights[0]
    if weights not in layout.weights:
        raise EyasError(f"{layout.title} takes weights as {', '.join(layout.weights)}, not {weights}")
    check_fits(draft.config, target.config)
    if why := layout.refusal(draft):
        raise EyasError(f"{layout.title} cannot run this draft: {why}")
    if out.resolve() == source.resolve():
        raise EyasError(f"{out} is the draft itself; choose another place")
    make_way(out, force)
    with atomic_directory(out) as work:
        layout.write(work, draft, target, weights, **extra)
        for kept in KEPT:
            if (source / kept).exists():
                shutil.copy(source / kept, work / kept)
        return checked(layout, draft, work, weights)


def checked(layout: Layout, draft: Draft, work: Path, weights: str) -> Check:
    """Read the written draft back and compare it. Raises `EyasError` where it is not the same draft, so that nothing is left behind."""
    exact = all(tensor.dtype == DTYPES.get(weights) or weights == "fp32" for tensor in draft.weights.values())
    if layout.read is None:
        return Check(None, None, exact, draft.config.taps)
    again = find(work).resolved(draft.target_layers)
    if not torch.equal(again.vocab.ids, draft.vocab.ids) or again.config.taps != draft.config.taps:
        raise EyasError(f"what was written for {layout.title} reads back as another draft (taps {again.config.taps}, vocabulary); not kept")
    before = probe(draft)
    difference, spread = float((probe(again) - before).abs().max()), float(before.std())
    if not difference <= (EXACT if exact else ROUNDED * spread):
        raise EyasError(f"what was written for {layout.title} computes other logits ({difference:g} apart); not kept")
    return Check(difference, spread, exact, again.config.taps)


def make_way(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise EyasError(f"{out} exists; choose another place, or --force to replace it")
    if out.exists() and not out.is_dir():
        raise EyasError(f"{out} is a file; name a directory")
    if out.exists() and any(out.iterdir()) and not any(any(out.glob(mark)) for mark in DRAFTS):
        raise EyasError(f"{out} holds something else than a draft; it is not replaced, choose another place")
