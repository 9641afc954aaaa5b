"""A round with trees of 8, 16, 32 and 64 nodes over a plain step, at the shapes of an 8B model, on a GPU. Random weights: time, not text.

    python benchmarks/gpu_round.py [--device cuda] [--layers 32] [--context 256] [--out F.json]

Needs about 18 GB of GPU memory in bfloat16, no files and no network. For each number of rows it times the target's dense products alone,
its pass kernel after kernel, and its pass in fixed shapes as a captured graph, by PyTorch's operations and by our kernels; the same behind
`--long` keys; then whole rounds, draft steps included, through the same `Decoder` as anywhere: launched, and as one graph, greedy, sampled
and filtered, with copying alone, and in each shape that a planner chooses among; and rounds of `--batch` sequences over a plain step of as
many. `--quick` runs the same on a CPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import options, parsed, tell

from eyas.config import GREEDY, PLAIN, Sampling, TargetConfig, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import fused
from eyas.kernels.captured import Graph
from eyas.model.cache import Pool
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab

SHAPES = {8: "8x3x2", 16: "16x4x3", 32: "32x5x4", 64: "64x6x8"}


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
    vocab = DraftVocab(torch.arange(size), config.vocab_size)
    return target.prepare(), Eagle3Drafter(network.prepare(), vocab)


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of repeated calls, each waited for."""
    taken = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[3:])


@contextmanager
def kernels(ours: bool) -> Iterator[None]:
    """Within the block captured passes are by our own kernels, or by PyTorch's operations alone."""
    before = os.environ.pop(fused.OFF, None)
    try:
        if not ours:
            os.environ[fused.OFF] = "1"
        fused.available.cache_clear()
        yield
    finally:
        os.environ.pop(fused.OFF, None)
        if before is not None:
            os.environ[fused.OFF] = before
        fused.available.cache_clear()


FORMS = {"launched": (False, False), "captured, PyTorch's operations": (True, False), "captured": (True, True)}  # captured, our kernels


@torch.inference_mode()
def passes(target: Target, taps: tuple[int, ...], counts: Sequence[int], context: int, repeats: int) -> dict[int, dict[str, float]]:
    """Milliseconds of a pass by its rows, behind so many keys: in each form, and its dense products alone."""
    device, found = target.device, {}
    for count in counts:
        parents = [-1, *((row - 1) // 2 for row in range(1, count))]
        rows = Rows(torch.arange(count), torch.full((count,), context), [Segment(0, count, ancestor_mask(parents) if count > 1 else None)])
        found[count] = {"products": products(target, count, repeats)}
        for name, (captured, ours) in FORMS.items():
            with kernels(ours):
                target.pool = Pool() if captured else None
                cache = target.new_cache(1, context + max(counts))
                cache.lengths[0] = context  # keys of zeros are as far to read as others
                found[count][name] = milliseconds(lambda rows=rows, cache=cache: target(rows, cache, taps), device, repeats)
    return found


def products(target: Target, count: int, repeats: int) -> float:
    """Milliseconds of all dense products of a pass, launched together."""
    width, inner = target.config.hidden_size, target.config.intermediate_size
    x_NH, x_NI = (torch.randn(count, size, dtype=target.dtype, device=target.device) for size in (width, inner))
    x_NA = torch.randn(count, target.config.num_attention_heads * target.config.head_dim, dtype=target.dtype, device=target.device)

    def run(x_NH: torch.Tensor, x_NI: torch.Tensor, x_NA: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in target.model.layers:
            block.self_attn.qkv(x_NH)
            block.self_attn.out(x_NA)
            block.mlp.gate_up(x_NH)
            block.mlp.down(x_NI)
        return (target.head(x_NH),)

    return milliseconds(Graph(run, [x_NH, x_NI, x_NA]), target.device, repeats)


@dataclass(frozen=True)
class Form:
    """How rounds are run."""

    captured: bool
    sampling: Sampling
    context: int
    rounds: int
    batch: int = 1  # sequences

    @property
    def prompts(self) -> list[list[int]]:
        return [[1] * self.context] * self.batch


def round_ms(target: Target, drafter: Eagle3Drafter | None, shape: TreeShape, form: Form, copy: bool = False) -> float:
    """Milliseconds of one round, drafting included, once what is made on first use is there. `copy`: copying joins the drafter."""
    target.pool = Pool() if form.captured else None
    if drafter:
        drafter.network.pool = Pool() if form.captured else None
    decoder, taken = Decoder(target, CopyingDrafter(drafter) if drafter and copy else drafter), []
    for _ in range(2):
        last = time.perf_counter()
        for _ in decoder.run(form.prompts, shape, form.sampling, range(form.batch), form.rounds):
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - last))
            last = time.perf_counter()
    return statistics.median(taken[len(taken) // 2 + 3 :])


def planned_ms(target: Target, drafter: Eagle3Drafter, form: Form) -> dict[int, float]:
    """By nodes: milliseconds of a whole round of each shape that a planner chooses among, as it has timed them."""
    target.pool = drafter.network.pool = Pool()
    plan = Planner(Prices({1: 1.0}), Prices({1: 0.1}), Calibration())
    for _ in range(2):
        for _ in Decoder(target, drafter, plan=plan).run(form.prompts, MAX_TREE, form.sampling, range(form.batch), 2 * form.rounds):
            pass
    return {nodes: round(1e3 * seconds, 2) for nodes, seconds in sorted(plan.shapes.of(form.batch).seconds.items())}


def rounds_ms(target: Target, drafter: Eagle3Drafter, shapes: Sequence[str], form: Form) -> dict[str, Any]:
    """A plain step's milliseconds, and by nodes those of rounds with trees of these shapes, and over the plain step."""
    plain, rounds = round_ms(target, None, PLAIN, form), {}
    for shape in map(TreeShape.parse, shapes):
        taken = round_ms(target, drafter, shape, form)
        rounds[shape.nodes] = {"shape": str(shape), "ms": round(taken, 2), "over_plain": round(taken / plain, 3)}
    return {"plain_ms": round(plain, 2), "rounds": rounds}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--long", type=int, default=32768, help="keys of some passes")
    parser.add_argument("--nodes", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=20, help="of a pass")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences of some rounds, with trees of 16 nodes")
    given = parsed(parser, words, device="cpu", layers=7, context=16, long=600, nodes=[8], repeats=1, rounds=14, batch=2)
    device = torch.device(given.device)
    target, drafter = models(config_of(given.layers, given.quick), device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "layers": given.layers, "context": given.context}
    found["passes_ms"] = passes(target, drafter.wants, (1, *given.nodes), given.context, given.repeats)
    found["long_context"] = {
        "context": given.long,
        "passes_ms": passes(target, drafter.wants, (1, max(given.nodes)), given.long, given.repeats),
    }
    forms = {
        "launched": (False, GREEDY),
        "captured": (True, GREEDY),
        "captured, temperature 1": (True, Sampling(1.0)),
        "captured, temperature 1, top-p 0.9": (True, Sampling(1.0, top_p=0.9)),
        "captured, temperature 1, top-k 20": (True, Sampling(1.0, top_k=20)),
    }
    for name, (captured, sampling) in forms.items():
        form = Form(captured, sampling, given.context, given.rounds)
        found[name] = rounds_ms(target, drafter, [SHAPES[nodes] for nodes in given.nodes], form)
    form = Form(True, GREEDY, given.context, given.rounds)
    copied = round_ms(target, drafter, TreeShape.parse(SHAPES[min(given.nodes)]), form, copy=True)
    found["copying_alone_ms"] = round(copied, 2)  # the prompt repeats one token, so copying is sure, and the draft is not used
    found["planned_ms"] = planned_ms(target, drafter, form)
    found["batch"] = {"sequences": given.batch}
    for name in ("launched", "captured", "captured, temperature 1"):
        captured, sampling = forms[name]
        form = Form(captured, sampling, given.context, given.rounds, given.batch)
        found["batch"][name] = rounds_ms(target, drafter, [SHAPES[16]], form)
    found["batch"]["planned_ms"] = planned_ms(target, drafter, Form(True, GREEDY, given.context, given.rounds, given.batch))
    tell(found, given.out)


if __name__ == "__main__":
    main()
