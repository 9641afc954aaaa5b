"""What each precision costs and brings: speed, plain and with the draft, interleaved; bits a weight; how near its law is to bf16's.

    python benchmarks/precisions.py --prompts F.jsonl [--limit 20] [--precisions bf16,int8,q4] [--trees chain:2,6x2x3]

Every prompt is answered greedily by every precision and method in a rotating order. Prints a table; ratios are of times for equal numbers
of tokens, median over prompts. "Nearness" reads bf16's own plain texts with every precision: share of equal first choices, and mean
divergence in nats from bf16's law.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eyas
from eyas.bench.prompts import read_prompts
from eyas.config import PRECISIONS, EyasError, TreeShape
from eyas.engine import Engine
from eyas.kernels import native
from eyas.kernels.linear import Dense
from eyas.model.rows import chain_rows

METHOD = "eagle3-lookup"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--prompts", required=True)
    options.add_argument("--limit", type=int, default=20)
    options.add_argument("--max-new-tokens", type=int, default=100)
    options.add_argument("--precisions", default="bf16,int8,q4")
    options.add_argument("--trees", default="chain:2,6x2x3")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    names = given.precisions.split(",")
    if unknown := set(names) - set(PRECISIONS):
        raise EyasError(f"precision {unknown.pop()!r} is unknown; choose {', '.join(PRECISIONS)}")
    engines = {name: eyas.load(precision=name) for name in names}
    prompts, _ = read_prompts(given.prompts, given.limit)
    ways = [(name, shape) for name in names for shape in ("plain", *given.trees.split(","))]
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    texts: dict[tuple[str, str], list[list[int]]] = {way: [] for way in ways}
    for way in ways:  # the first pass of a process is slow
        answer(engines, way, prompts[0].prompt, 8)
    for number, item in enumerate(prompts):
        start = number % len(ways)
        for way in ways[start:] + ways[:start]:
            began = time.perf_counter()
            tokens = answer(engines, way, item.prompt, given.max_new_tokens)
            seconds[way].append((time.perf_counter() - began) / len(tokens))
            texts[way].append(tokens)
    first = (names[0], "plain")
    rows = []
    for name, shape in ways:
        own = texts[name, "plain"]
        rows.append(
            {
                "precision": name,
                "drafted": shape,
                "tokens_per_second": round(1 / statistics.fmean(seconds[name, shape]), 1),
                "over_first": ratio(seconds[first], seconds[name, shape]),
                "over_own_plain": ratio(seconds[name, "plain"], seconds[name, shape]),
                "texts_equal_own_plain": sum(a == b for a, b in zip(texts[name, shape], own)),
                "texts_equal_first": sum(a == b for a, b in zip(texts[name, shape], texts[first])),
            }
        )
    read = [engines[names[0]].encode(item.prompt) + text for item, text in zip(prompts, texts[first])]
    near = {name: {"bits_a_weight": bits(engine), **nearness(engines[names[0]], engine, read)} for name, engine in engines.items()}
    found = {"threads": torch.get_num_threads(), "prompts": len(prompts), "prompt_file": Path(given.prompts).name, "nearness": near}
    found |= {"max_new_tokens": given.max_new_tokens, "method": METHOD, "rows": rows}
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    heads = ["precision", "bits a weight", "drafted", "tokens/s", "over first", "over own plain", "texts: own plain's, first's"]
    print("|", " | ".join([*heads, "first choices equal, nats"]), "|\n" + "|---" * (len(heads) + 1) + "|")
    for row in rows:
        at = near[row["precision"]]
        cells = [row["precision"], at["bits_a_weight"], row["drafted"], row["tokens_per_second"], row["over_first"], row["over_own_plain"]]
        cells += [f"{row['texts_equal_own_plain']}, {row['texts_equal_first']} of {len(prompts)}", f"{at['equal']:.3f}, {at['nats']:.5f}"]
        print("|", " | ".join(map(str, cells)), "|")


def answer(engines: dict[str, Engine], way: tuple[str, str], prompt: Any, tokens: int) -> list[int]:
    name, shape = way
    if shape == "plain":
        return engines[name].generate(prompt, method="plain", max_new_tokens=tokens).tokens
    return engines[name].generate(prompt, method=METHOD, tree=TreeShape.parse(shape), max_new_tokens=tokens).tokens


def ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast)), 2)


def bits(engine: Engine) -> float | str:
    """Bits that a product's weight takes, scales and filling included, head included; "-" where another kernel holds them."""
    held = [value.weight for child in engine.target.modules() for value in vars(child).values() if isinstance(value, Dense)]
    if not all(isinstance(weight, native.Packed) for weight in held):
        return "-"
    return round(8 * sum(weight.blocks.nbytes for weight in held) / sum(weight.inputs * weight.outputs for weight in held), 2)


@torch.inference_mode()
def law(engine: Engine, text: list[int]) -> Tensor:
    """Log probabilities [N, V] along a text."""
    return engine.target(chain_rows(0, text, 0), engine.target.new_cache(1, len(text))).logits.log_softmax(-1)


def nearness(first: Engine, other: Engine, texts: list[list[int]]) -> dict[str, float]:
    nats, equal = [], []
    for text in texts:
        p, q = law(first, text), law(other, text)
        nats.append((p.exp() * (p - q)).sum(-1))
        equal.append(p.argmax(-1) == q.argmax(-1))
    return {"equal": float(torch.cat(equal).float().mean()), "nats": float(torch.cat(nats).mean())}


if __name__ == "__main__":
    main()
