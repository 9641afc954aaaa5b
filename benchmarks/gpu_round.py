"""A round with trees of 8, 16, 32 and 64 nodes over a plain step, at the shapes of an 8B model, on a GPU. Random weights: time, not text.

    python benchmarks/gpu_round.py [--device cuda] [--layers 32] [--context 256] [--out F.json]

Needs about 18 GB of GPU memory in bfloat16, no files and no network. For each number of rows it times the target's pass as it is called in
a round and, on CUDA, as a captured graph (static shapes: what launching the kernels one by one costs is the difference); then whole
rounds, draft steps included, through the same `Decoder` as anywhere. `--tiny` runs the same in seconds on a CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eyas.config import GREEDY, PLAIN, TargetConfig, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.model.attention import Segment
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.mask import ancestor_mask
from eyas.model.target import Rows, Target, chain_rows
from eyas.model.vocab import DraftVocab

SHAPES = {8: "8x3x2", 16: "16x4x3", 32: "32x5x4", 64: "64x6x8"}
REPEATS, ROUNDS = 20, 40


def config_of(layers: int, tiny: bool) -> TargetConfig:
    """Llama 3.1 8B's shape, or one for a try."""
    if tiny:
        return TargetConfig(512, 64, 128, layers, 4, 2, 16, 4096)
    return TargetConfig(128256, 4096, 14336, layers, 32, 8, 128, 8192, rope_theta=500000.0)


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return module


def models(config: TargetConfig, device: torch.device) -> tuple[Target, Eagle3Drafter]:
    with torch.device("meta"):
        target = Target(config)
    target = random_weights(target.to(torch.bfloat16).to_empty(device=device))
    size = min(32000, config.vocab_size)
    drafted = draft_config(config, size)
    with torch.device("meta"):
        network = DraftNetwork(drafted, target.embedding.detach())
    network = random_weights(network.to(torch.bfloat16).to_empty(device=device))
    network.embedding = [target.embedding.detach()]
    vocab = DraftVocab(torch.arange(size, device=device), config.vocab_size)
    return target.prepare(), Eagle3Drafter(network.prepare(), vocab)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median of repeated calls, each waited for."""
    taken = []
    for _ in range(REPEATS + 3):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[3:])


@torch.inference_mode()
def passes(target: Target, taps: tuple[int, ...], context: int) -> dict[int, dict[str, float]]:
    """Milliseconds of a pass by its rows, as called and as a captured graph."""
    device, found = target.device, {}
    cache = target.new_cache(1, context + max(SHAPES))
    target(chain_rows(0, [1] * context, 0, device), cache, taps, slice(-1, None))
    cache.keep(0, range(context))
    for count in (1, *SHAPES):
        parents = [-1, *((row - 1) // 2 for row in range(1, count))]
        positions = torch.full((count,), context, device=device)
        rows = Rows(torch.arange(count, device=device), positions, [Segment(0, count, ancestor_mask(parents) if count > 1 else None)])
        found[count] = {"called": milliseconds(lambda rows=rows: target(rows, cache, taps), device)}
        if device.type == "cuda":
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    target(rows, cache, taps)
                found[count]["graph"] = milliseconds(graph.replay, device)
            except RuntimeError as error:  # something in the pass waits for the device
                found[count]["graph"] = str(error).splitlines()[0]
                torch.cuda.synchronize()
    return found


def rounds(target: Target, drafter: Eagle3Drafter | None, shape: TreeShape, context: int) -> float:
    """Milliseconds of one round, drafting included; from the second on, since the first ones of a process are slow."""
    decoder, taken = Decoder(target, drafter), []
    last = time.perf_counter()
    for _ in decoder.run([[1] * context], shape, GREEDY, [0], ROUNDS):
        if target.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - last))
        last = time.perf_counter()
    return statistics.median(taken[3:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cuda")
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    device = torch.device(given.device)
    target, drafter = models(config_of(given.layers, given.tiny), device)
    plain = rounds(target, None, PLAIN, given.context)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "layers": given.layers, "context": given.context}
    found |= {"passes_ms": passes(target, drafter.wants, given.context), "plain_ms": plain, "rounds": {}}
    for nodes, shape in SHAPES.items():
        taken = rounds(target, drafter, TreeShape.parse(shape), given.context)
        found["rounds"][nodes] = {"shape": shape, "ms": round(taken, 2), "over_plain": round(taken / plain, 3)}
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
