"""How much of this machine's matrix-product speed a training step uses: the step's time against the same products alone; and what products
in bfloat16 bring.

    python benchmarks/training_speed.py --shards DIR [--steps 12] [--turns 3] [--workers 2]

A step of the real trainer on real shards is timed; then every matrix product it made, forward and backward, is made again on its own with
operands of the same shapes and number formats, by as many single-thread workers. FLOPs are torch's own count of those products. On each
batch float32 and bfloat16 take turns, and of a batch's turns the quickest counts. `share` is seconds of the bare products / seconds of the
step, `bf16_over_fp32` the ratio of slots per second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import examples_of, in_turn, new_trainer, options, parsed, rounded, target_for, tell, training_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eyas.train.batches import split_evenly
from eyas.train.trainer import Trainer

FORMATS = ("fp32", "bf16")
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten.addmm_.default}


class Recorder(TorchDispatchMode):
    """Shapes, strides and number formats of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in PRODUCTS:
            operands = args[-2:]
            self.calls.append(tuple((operand.shape, operand.stride(), operand.dtype) for operand in operands))
        return func(*args, **(kwargs or {}))


@dataclass
class Turn:
    """One step of a batch in one number format."""

    step: float  # seconds
    bare: float  # seconds of its products alone
    flops: float
    anchors: int


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parsed(parser, words, {"shards": "shards"}, steps=2, turns=1)
    settings = training_for(given, products=FORMATS[0])
    trainer = new_trainer(target_for(given), examples_of(given.shards, settings.max_length), settings, given.workers)
    batches = list(islice(trainer.remaining(), given.steps))
    for products in FORMATS:
        turn_of(trainer, batches[0], products)
    turns: dict[str, list[Turn]] = {products: [] for products in FORMATS}
    for batch in batches:
        here: dict[str, list[Turn]] = {products: [] for products in FORMATS}
        for number in range(given.turns):
            for products in in_turn(FORMATS, number):
                here[products].append(turn_of(trainer, batch, products))
        for products, found in here.items():
            quickest = min(found, key=lambda turn: turn.step)
            turns[products].append(replace(quickest, bare=min(turn.bare for turn in found)))
    found = {products: figures(each) for products, each in turns.items()}
    ratio = found["bf16"]["slots_per_second"] / found["fp32"]["slots_per_second"]
    told = {products: rounded(each) for products, each in found.items()}
    tell({**told, "bf16_over_fp32": round(ratio, 3), "workers": given.workers, "steps": len(batches), "turns": given.turns}, given.out)


def turn_of(trainer: Trainer, batch: list[Any], products: str) -> Turn:
    trainer.settings = replace(trainer.settings, products=products)
    before, started = trainer.progress.slots, time.perf_counter()
    trainer.step(batch)
    seconds = time.perf_counter() - started
    calls, flops = products_of(trainer, batch)
    return Turn(seconds, replay(calls, trainer.workers), flops, trainer.progress.slots - before)


def figures(turns: Sequence[Turn]) -> dict[str, float]:
    seconds, bare, flops = (sum(getattr(turn, name) for turn in turns) for name in ("step", "bare", "flops"))
    anchors = sum(turn.anchors for turn in turns)
    return {
        "slots_per_second": anchors / seconds,
        "gflop_per_second": flops / seconds / 1e9,
        "bare_products_gflop_per_second": flops / bare / 1e9,
        "share": bare / seconds,
        "mflop_per_slot": flops / anchors / 1e6,
    }


def products_of(trainer: Trainer, batch: list[Any]) -> tuple[list[list[Any]], float]:
    """The products of each worker's part of a batch, and the FLOPs of all."""
    parts = [part for part in split_evenly(batch, trainer.workers) if part]
    depths = [trainer.depths(part, f"{number}") for number, part in enumerate(parts)]
    counts = [sum(int((depth > step).sum()) for depth in depths) for step in range(trainer.settings.unroll_steps)]
    calls, flops = [], 0.0
    for number, (part, depth) in enumerate(zip(parts, depths)):
        with Recorder() as recorder, FlopCounterMode(display=False) as counter:
            trainer.gradients(part, depth, counts, "soft", number)
        calls.append(recorder.calls)
        flops += counter.get_total_flops()
    return calls, flops


def replay(parts: list[list[Any]], workers: int) -> float:
    """Seconds of the products alone, each worker its own part; operands are made before the clock starts."""
    made = [[tuple(operand(*form) for form in call) for call in part] for part in parts]

    def run(operands: list[Any]) -> None:
        torch.set_num_threads(1)
        for one, other in operands:
            torch.matmul(one, other)

    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        list(pool.map(run, made))
        return time.perf_counter() - started


def operand(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    held = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
    return torch.randn(held).to(dtype).as_strided(shape, stride)


if __name__ == "__main__":
    main()
