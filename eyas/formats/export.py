"""Writes a draft in an engine's layout, and keeps it only if what was written, read back, computes the same.

Knows layouts by their names and the probe that compares two drafts; knows no engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError
from eyas.files.disk import atomic_directory, read_json
from eyas.files.eagle3_files import check_fits
from eyas.formats.layouts import DTYPES, Layout, find, layout_of
from eyas.formats.plain import MARK
from eyas.formats.portable import Draft, TargetFiles, probe

EXACT = 1e-6  # largest difference of logits allowed where nothing is rounded
ROUNDED = 5.0  # and where weights are, in standard deviations of the logits: more is an overflow, not rounding
KEPT = ("training.json",)  # files of the draft that travel along
NAMED = 3  # foreign files that are named where a folder is not replaced
GGUF_HEAD = 256  # bytes of a GGUF that hold its architecture, which is the first field


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
    make_way(out, force, (*layout.files, *KEPT))
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


def make_way(out: Path, force: bool, files: Sequence[str], own: bool = False) -> None:
    """Raise `EyasError` unless `out` is free, or may be replaced: with `force`, if it holds nothing but `files` (names, or patterns of
    them) as eyas writes them. `own`: of eyas's own layout, not of an engine's. What is foreign is named."""
    if out.is_symlink() and not out.exists():
        raise EyasError(f"{out} is a link to nothing; choose another place")
    if not out.exists():
        return
    if not force:
        raise EyasError(f"{out} exists; choose another place, or --force to replace it")
    if not out.is_dir():
        raise EyasError(f"{out} is a file; name a directory")
    if found := foreign(out, files, own):
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        told = ", ".join(found[:NAMED]) + more
        raise EyasError(f"{out} holds something else than a draft of this layout: {told}; nothing is replaced, choose another place")


def foreign(out: Path, files: Sequence[str], own: bool) -> list[str]:
    """What a folder holds that eyas did not write there."""
    found = []
    for path in sorted(out.iterdir()):
        if path.is_dir() or not any(fnmatchcase(path.name, name) for name in files):
            found.append(path.name + "/" * path.is_dir())
        elif path.name == "config.json" and (why := not_ours(path, own)):
            found.append(f"config.json ({why})")
        elif path.suffix == ".gguf" and b"eagle3" not in path.open("rb").read(GGUF_HEAD):
            found.append(f"{path.name} (no EAGLE-3 draft)")
    return found


def not_ours(config: Path, own: bool) -> str | None:
    """Why a config.json is not what an export (`own`: an import) wrote; None where it is."""
    try:
        told = read_json(config)
    except EyasError:
        return "it cannot be read"
    if "draft_vocab_size" not in told:
        return "no draft's"
    if "eyas" in told:
        return None if own else "a draft of eyas's own"
    return None if MARK in told and not own else "a draft of others" if MARK not in told else "an export of eyas's"
