"""Processes begin to share a text's keys: they meet, see that they are alike, and all but the first follow.

`EYAS_SCHEDULE` names one of schedules.py's for all passes; with `EYAS_BOARD=0` processes of one machine use the network too.
Knows directories, versions and the kernel; knows nothing of passes.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch

from eyas import launched
from eyas.config import EyasError
from eyas.files.disk import directory_hash
from eyas.files.notes import note
from eyas.files.target import BITS, reading_hash
from eyas.kernels.native import kernel_name
from eyas.model.protocols import TargetModel
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget, follow

# What processes must share, else a process's part of the sums would be another.
ALIKE = ("version of eyas", "target", "target's config or tokenizer", "precision", "kernel", "layout", "schedule")


def check_shareable(model: TargetModel) -> TargetModel:
    """Raise `EyasError`, with one line that says why, for a target whose keys cannot lie in several processes yet."""
    window, told = model.config.sliding_window if model.blocks else None, None
    if window is not None and window < model.config.max_position_embeddings:
        told = f"this model sees {window} positions at a time, so few keys are needed"
    elif model.device.type not in ("cpu", "cuda"):
        told = f"this is on {model.device.type}"
    elif model.device.type == "cuda" and not model.blocks:
        told = "this model runs through transformers, which it can do on a CPU"
    if told:
        raise EyasError(f"--context-parallel is for models with full attention on a CPU or CUDA so far; {told}")
    return model


def begin(model: TargetModel, directory: Path, precision: str, layout: Layout, peers: Peers) -> TargetModel:
    """The target with its caches sharded over the processes. In all but the first this does not return: they follow the first one's passes
    and exit when it ends. Raises `EyasError` in every process where one is not like the first."""
    model, schedule = check_shareable(model), os.environ.get("EYAS_SCHEDULE", "auto")
    on_cpu = model.device.type == "cpu"
    try:
        if peers.count > 1:
            kernel = kernel_name() if on_cpu else f"torch {torch.__version__}"
            hashes = (directory_hash(directory)[:16], reading_hash(directory)[:16])
            peers.agree((version("eyas"), *hashes, precision, kernel, str(layout), schedule), ALIKE)
            if peers.first and not on_cpu and not peers.captures:
                note(f"{peers.count} processes share {model.device}: what they tell each other goes through host memory, which is slow")
        target = ShardedTarget(model, layout, peers, schedule, together=not on_cpu)
        if peers.first:
            return cast("TargetModel", target)  # what it does not have itself it has from the target it wraps
        follow(target.prepare(BITS.get(precision, 16)))
    except EyasError as error:
        if peers.first:
            raise
        launched.say(f"eyas: {error}")
        sys.exit(2)
    sys.exit(0)
