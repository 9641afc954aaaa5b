"""How much of this machine's matrix-product speed a training step uses: the step's time against the same products alone.

    python benchmarks/training_speed.py --shards DIR [--steps 12] [--workers 2]

A step of the real trainer on real shards is timed; then every matrix product it made, forward and backward, is made again on its own with
operands of the same shapes, by as many single-thread workers, interleaved with the steps. FLOPs are torch's own count of those products.
`share` is seconds of the bare products / seconds of the step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import examples_of, new_trainer, options, parsed, rounded, target_for, tell, training_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eyas.train.batches import split_evenly
from eyas.train.trainer import Trainer

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.bmm.default, torch.ops.aten.addmm_.default}


class Recorder(TorchDispatchMode):
    """Shapes and strides of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[torch.Size, tuple[int, ...]], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in PRODUCTS:
            operands = args[-2:]
            self.calls.append(tuple((operand.shape, operand.stride()) for operand in operands))
        return func(*args, **(kwargs or {}))


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    given = parsed(parser, words, {"shards": "shards"}, steps=2)
    settings = training_for(given)
    trainer = new_trainer(target_for(given), examples_of(given.shards, settings.max_length), settings, given.workers)
    batches = list(islice(trainer.remaining(), given.steps))
    trainer.step(batches[0])
    seconds, bare, flops, anchors = [], [], [], []
    for batch in batches:
        before, started = trainer.progress.slots, time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - started)
        anchors.append(trainer.progress.slots - before)
        calls, counted = products_of(trainer, batch)
        flops.append(counted)
        bare.append(replay(calls, given.workers))
    found = {
        "slots_per_second": sum(anchors) / sum(seconds),
        "gflop_per_second": sum(flops) / sum(seconds) / 1e9,
        "bare_products_gflop_per_second": sum(flops) / sum(bare) / 1e9,
        "share": sum(bare) / sum(seconds),
        "share_median": statistics.median(b / s for b, s in zip(bare, seconds)),
        "mflop_per_slot": sum(flops) / sum(anchors) / 1e6,
        "workers": given.workers,
        "steps": len(batches),
    }
    tell(rounded(found), given.out)


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
    made = [[tuple(torch.randn(strided_size(*form)).as_strided(*form) for form in call) for call in part] for part in parts]

    def run(operands: list[Any]) -> None:
        torch.set_num_threads(1)
        for one, other in operands:
            torch.matmul(one, other)

    with ThreadPoolExecutor(workers) as pool:
        started = time.perf_counter()
        list(pool.map(run, made))
        return time.perf_counter() - started


def strided_size(shape: torch.Size, stride: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride))


if __name__ == "__main__":
    main()
