"""Where a round's time goes, and how far it is from its bare matrix products.

    python benchmarks/round_profile.py --prompts F.jsonl [--limit 5] [--precision bf16] [--tree auto] [--out F.json]

Answers prompts with every part of a round timed, and notes the rows of each product. "Bare" is then the time of the same packed products
alone: those of the target for the rows of its passes, of the draft for those of its steps, and both heads, each called from a tight loop
with nothing in between, weights not in a cache, and the cost of such a call taken off. Works where the native kernel does.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from common import KINDS, engine_for, options, parsed, tell

from eyas.bench.prompts import PRACTICE, read_prompts
from eyas.decode import verifiers
from eyas.decode.generate import Decoder
from eyas.decode.plan.planner import Planner
from eyas.decode.sequence import Sequence as Growing
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import Engine
from eyas.kernels import native
from eyas.kernels.layer import NativeLayers
from eyas.methods import COPY

REPEATS = 5


class Parts:
    """Seconds by part while rounds run; a part inside another is taken off it. Whatever is replaced is put back at the end."""

    def __init__(self, undo: ExitStack) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[float] = []
        self.on = False
        self.undo = undo

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)

    def watch(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **settings: Any) -> Any:
            if not self.on:
                return inner(*args, **settings)
            started = time.perf_counter()
            self.open.append(0.0)
            try:
                return inner(*args, **settings)
            finally:
                taken = time.perf_counter() - started
                self.seconds[part if isinstance(part, str) else part(*args)] += taken - self.open.pop()
                if self.open:
                    self.open[-1] += taken

        self.replace(owner, name, timed)


@dataclass
class Called:
    """How often products were called for so many rows."""

    layers: dict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # by stack of layers
    products: dict[int, tuple[native.Packed, Counter[int]]] = field(default_factory=dict)  # by single matrix
    stacks: dict[int, NativeLayers] = field(default_factory=dict)


def bare(called: Called) -> float:
    """Seconds of the products alone."""
    total, library, threads = 0.0, native.kernel(), torch.get_num_threads()
    elsewhere = torch.zeros(1 << 24)  # 64 MiB
    empty = native.packed(torch.zeros(16, 32, dtype=torch.bfloat16))

    def one(packed: list[native.Packed], rows: int) -> float:
        x = torch.randn(rows, max(each.inputs for each in packed))
        y = torch.empty(rows, max(16 * each.blocks.shape[0] for each in packed))
        scratch = torch.empty(rows * max(each.scratch for each in packed))
        calls = [(x.data_ptr(), each.matrix, y.data_ptr(), rows, scratch.data_ptr(), threads) for each in packed]
        taken = []
        for _ in range(REPEATS):
            elsewhere.add_(1)
            started = time.perf_counter()
            for call in calls:
                library.eyas_product(*call)
            taken.append(time.perf_counter() - started)
        return sorted(taken)[REPEATS // 2]

    overhead = one([empty] * 100, 1) / 100
    for key, counts in called.layers.items():
        packed = [weights for layer in called.stacks[key].layers for weights in layer.kept[1]]
        for rows, times in counts.items():
            total += times * (one(packed, rows) - len(packed) * overhead)
    for packed, counts in called.products.values():
        for rows, times in counts.items():
            total += times * (one([packed], rows) - overhead)
    return total


def watched(engine: Engine, parts: Parts) -> Called:
    """Let `parts` time the rounds to come; what products they call is noted in what is returned."""
    called = Called()
    call, product = NativeLayers.__call__, native.product

    def layers_called(self: NativeLayers, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if parts.on:
            called.stacks[id(self)] = self
            called.layers[id(self)][len(x)] += 1
        return call(self, x, *more, **named)

    def product_called(x: torch.Tensor, weights: native.Packed) -> torch.Tensor:
        if parts.on:
            called.products.setdefault(weights.blocks.data_ptr(), (weights, Counter()))[1][len(x)] += 1
        return product(x, weights)

    parts.replace(NativeLayers, "__call__", layers_called)
    parts.replace(native, "product", product_called)
    target, head = engine.target.native, engine.target.head.weight
    parts.watch(NativeLayers, "__call__", lambda self, *_: "target's layers" if self is target else "draft's layer")
    parts.watch(native, "product", lambda x, weights: "target's head" if weights is head else "draft's head and fc")
    parts.watch(verifiers, "draw", "sampling")
    for name in ("begin", "worth_drafting", "frontiers", "record_level", "cut", "judge", "record"):
        parts.watch(Planner, name, "planner")
    parts.watch(Eagle3Drafter, "propose", "drafting, rest")
    parts.watch(Growing, "commit", "text")
    parts.watch(Decoder, "round", "round, rest")
    inner = Decoder.round

    def round_called(self: Decoder, *args: Any) -> None:
        parts.on = True
        inner(self, *args)
        parts.on = False

    parts.replace(Decoder, "round", round_called)
    return called


def profiled(engine: Engine, prompts: Sequence[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Rounds, seconds by part, and seconds of the bare products, over all prompts."""
    tokens, count, alone = 0, 0, 0.0
    with ExitStack() as undo:
        parts = Parts(undo)
        called = watched(engine, parts)
        for prompt in prompts:
            result = engine.generate(prompt, **settings)
            tokens, count = tokens + len(result.tokens) - 1, count + result.rounds
            alone += bare(called)  # at once: a shared machine is not always as fast
            called.layers.clear()
            called.products.clear()
    whole = sum(parts.seconds.values())
    found = {"rounds": count, "tau": round(tokens / count, 2), "ms_a_round": round(1e3 * whole / count, 2)}
    found |= {"bare_ms": round(1e3 * alone / count, 2), "over_bare": round(whole / alone, 3)}
    found["shares"] = {part: round(taken / whole, 3) for part, taken in sorted(parts.seconds.items(), key=lambda each: -each[1])}
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts")
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--method", default="eagle3+copy")
    parser.add_argument("--tree", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=150)
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, limit=2, max_new_tokens=16, tree="8x2x3")
    engine = engine_for(given, given.precision)
    how: dict[str, Any] = {"method": given.method, "copy": given.method.endswith(COPY), "generation_config": "none"}
    how |= {} if given.method == "plain" else {"tree": given.tree}
    for practice in PRACTICE:
        engine.generate(practice, max_new_tokens=min(60, given.max_new_tokens), **how)
    prompts = [item.prompt for item in read_prompts(given.prompts, given.limit)[0]]
    found = {"precision": given.precision, "method": given.method, "tree": given.tree}
    tell(
        found | profiled(engine, prompts, {**how, "max_new_tokens": given.max_new_tokens}),
        given.out,
    )


if __name__ == "__main__":
    main()
