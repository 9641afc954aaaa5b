"""The default tree: the fastest of a few small shapes, timed once on this machine and remembered.

A planner that sizes each round's tree will take this file's place. Knows an engine and a clock.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eyas.config import PLAIN, Sampling, TreeShape, cache_dir
from eyas.model.linear import capability

if TYPE_CHECKING:
    from eyas.engine import Engine

CANDIDATES = [PLAIN, *map(TreeShape.parse, ("chain:1", "chain:2", "chain:3", "6x2x3", "8x3x3", "12x3x4", "20x4x5"))]
PROMPTS = ("Explain how a bicycle stays upright.", "Write a short letter to a friend about the weather.")
TOKENS = 32


def fastest_shape(engine: Engine, method: str, sampling: Sampling) -> TreeShape:
    """Look the shape up under what decides it (machine, threads, model, draft, precision, greedy or not), or time it."""
    path = cache_dir() / "shapes.json"
    key = "|".join(
        map(str, (machine(), torch.get_num_threads(), engine.directory.name, draft_key(engine), engine.precision, method, sampling.greedy))
    )
    known = remembered(path)
    if key not in known:
        print("timing a few tree shapes (once on this machine) ...", file=sys.stderr, flush=True)
        watch, engine.watch = engine.watch, None  # who watches the answer does not want to see these
        try:
            known[key] = str(time_shapes(engine, method, sampling))
        finally:
            engine.watch = watch
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1))
    return TreeShape.parse(known[key])


def remembered(path: Path) -> dict[str, str]:
    """What was timed before; a damaged file only means timing again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def time_shapes(engine: Engine, method: str, sampling: Sampling) -> TreeShape:
    """Tokens a second of every candidate over the same prompts, interleaved so that a slow moment hits all alike."""
    seconds = dict.fromkeys(CANDIDATES, 0.0)
    tokens = dict.fromkeys(CANDIDATES, 0)
    engine.generate(PROMPTS[0], method=method, tree=CANDIDATES[3], max_new_tokens=4)  # the first pass of a process is slow
    for number, prompt in enumerate(PROMPTS):
        for shape in CANDIDATES:
            drafted = "plain" if shape == PLAIN else method
            started = time.perf_counter()
            result = engine.generate(prompt, method=drafted, tree=shape, sampling=sampling, seed=number, max_new_tokens=TOKENS)
            seconds[shape] += time.perf_counter() - started
            tokens[shape] += len(result.tokens)
    return max(CANDIDATES, key=lambda shape: tokens[shape] / seconds[shape])


def machine() -> str:
    return f"{platform.machine()} {capability()} {platform.node()}"


def draft_key(engine: Engine) -> str:
    """The draft's identity: its weights' sizes and times."""
    files = sorted(engine.draft.glob("*.safetensors")) if engine.draft else []
    return "-".join(f"{file.stat().st_size}.{int(file.stat().st_mtime)}" for file in files)
