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
from eyas.model.weights import replace_text

if TYPE_CHECKING:
    from eyas.engine import Engine

CANDIDATES = [PLAIN, *map(TreeShape.parse, ("chain:1", "chain:2", "chain:3", "4x1x2", "6x1x3", "6x2x3", "12x3x4", "20x4x5"))]
PROMPTS = ("Explain how a bicycle stays upright.", "Write a short letter to a friend about the weather.")
TOKENS = 32


def fastest_shape(engine: Engine, method: str, sampling: Sampling) -> TreeShape:
    """Look the shape up under what decides it (machine, device, threads, model, draft, precision, greedy or not), or time it."""
    path = cache_dir() / "shapes.json"
    where = (machine(), engine.target.device, torch.get_num_threads())
    shapes = ",".join(map(str, CANDIDATES))
    key = "|".join(map(str, (*where, shapes, engine.directory.resolve(), draft_key(engine), engine.precision, method, sampling.greedy)))
    known = remembered(path)
    if key not in known:
        print("timing a few tree shapes (once on this machine) ...", file=sys.stderr, flush=True)
        watch, engine.watch = engine.watch, None  # who watches the answer does not want to see these
        try:
            known[key] = str(time_shapes(engine, method, sampling))
        finally:
            engine.watch = watch
        remember(path, known)
    return TreeShape.parse(known[key])


def remembered(path: Path) -> dict[str, str]:
    """What was timed before; a damaged file or entry only means timing again."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: shape for key, shape in found.items() if shape in map(str, CANDIDATES)} if isinstance(found, dict) else {}


def remember(path: Path, known: dict[str, str]) -> None:
    """Replace the file whole; a cache that cannot be written only means timing again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(known, indent=1))
    except OSError as error:
        print(f"the shape cannot be remembered ({error.strerror}: {path})", file=sys.stderr)


def time_shapes(engine: Engine, method: str, sampling: Sampling) -> TreeShape:
    """Tokens a second of every candidate over the same prompts, interleaved so that a slow moment hits all alike."""
    seconds = dict.fromkeys(CANDIDATES, 0.0)
    tokens = dict.fromkeys(CANDIDATES, 0)
    raw = not getattr(engine.tokenizer, "chat_template", None)
    engine.generate(PROMPTS[0], method=method, tree=CANDIDATES[3], max_new_tokens=4, raw=raw)  # the first pass of a process is slow
    for number, prompt in enumerate(PROMPTS):
        for shape in CANDIDATES:
            drafted = "plain" if shape == PLAIN else method
            started = time.perf_counter()
            result = engine.generate(prompt, method=drafted, tree=shape, sampling=sampling, seed=number, max_new_tokens=TOKENS, raw=raw)
            seconds[shape] += time.perf_counter() - started
            tokens[shape] += len(result.tokens)
    return max(CANDIDATES, key=lambda shape: tokens[shape] / seconds[shape])


def machine() -> str:
    return f"{platform.machine()} {capability()} {platform.node()}"


def draft_key(engine: Engine) -> str:
    """The draft's identity: its weights' sizes and times."""
    files = sorted(engine.draft.glob("*.safetensors")) if engine.draft else []
    return "-".join(f"{file.stat().st_size}.{int(file.stat().st_mtime)}" for file in files)
