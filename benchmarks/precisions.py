"""What each precision costs and brings: speed, plain and with the draft, interleaved; bits a weight; how near its text is to bf16's.

    python benchmarks/precisions.py --prompts F.jsonl [--limit 20] [--precisions bf16,int8,q4] [--trees chain:2,6x2x3]

Every prompt is answered greedily by every precision and method in a rotating order. Prints a table; ratios are of times for equal numbers
of tokens, median over prompts. "Nearness" reads bf16's own plain texts with every precision: share of equal first choices, and mean
divergence in nats from bf16's distribution.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import KINDS, engine_for, in_turn, options, parsed, save
from torch import Tensor

from eyas.bench.prompts import read_prompts
from eyas.config import PRECISIONS, EyasError, TreeShape
from eyas.engine import Engine
from eyas.kernels import native
from eyas.kernels.linear import Dense
from eyas.model.rows import chain_rows

METHOD = "eagle3+copy"


Way = tuple[str, str]  # a precision, and what is drafted: "plain" or a tree


@dataclass
class Answers:
    """Seconds a token, and texts, of every way, prompt by prompt."""

    seconds: dict[Way, list[float]]
    texts: dict[Way, list[list[int]]]


def answered(engines: dict[str, Engine], ways: list[Way], prompts: Sequence[Any], longest: int) -> Answers:
    """Every prompt by every way, in turn."""
    found = Answers({way: [] for way in ways}, {way: [] for way in ways})
    for way in ways:  # the first pass of a process is slow
        answer(engines, way, prompts[0], 8)
    for number, prompt in enumerate(prompts):
        for way in in_turn(ways, number):
            began = time.perf_counter()
            tokens = answer(engines, way, prompt, longest)
            found.seconds[way].append((time.perf_counter() - began) / len(tokens))
            found.texts[way].append(tokens)
    return found


def row_of(way: Way, first: Way, found: Answers) -> dict[str, Any]:
    own = (way[0], "plain")
    return {
        "precision": way[0],
        "drafted": way[1],
        "tokens_per_second": round(1 / statistics.fmean(found.seconds[way]), 1),
        "over_first": ratio(found.seconds[first], found.seconds[way]),
        "over_own_plain": ratio(found.seconds[own], found.seconds[way]),
        "texts_equal_own_plain": sum(a == b for a, b in zip(found.texts[way], found.texts[own])),
        "texts_equal_first": sum(a == b for a, b in zip(found.texts[way], found.texts[first])),
    }


def table(rows: Sequence[dict[str, Any]], near: dict[str, dict[str, Any]], prompts: int) -> str:
    heads = ["precision", "bits a weight", "drafted", "tokens/s", "over first", "over own plain", "texts: own plain's, first's"]
    lines = [[*heads, "first choices equal, nats"], ["---"] * (len(heads) + 1)]
    for row in rows:
        at = near[row["precision"]]
        cells = [row["precision"], at["bits_a_weight"], row["drafted"], row["tokens_per_second"], row["over_first"], row["over_own_plain"]]
        cells += [f"{row['texts_equal_own_plain']}, {row['texts_equal_first']} of {prompts}", f"{at['equal']:.3f}, {at['nats']:.5f}"]
        lines.append(list(map(str, cells)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--precisions", default="bf16,int8,q4")
    parser.add_argument("--trees", default="chain:2,6x2x3")
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, limit=2, max_new_tokens=16, trees="chain:2")
    names = given.precisions.split(",")
    if unknown := set(names) - set(PRECISIONS):
        raise EyasError(f"precision {unknown.pop()!r} is unknown; choose {', '.join(PRECISIONS)}")
    engines = {name: engine_for(given, name) for name in names}
    prompts = [item.prompt for item in read_prompts(given.prompts, given.limit)[0]]
    ways = [(name, shape) for name in names for shape in ("plain", *given.trees.split(","))]
    answers = answered(engines, ways, prompts, given.max_new_tokens)
    first = (names[0], "plain")
    rows = [row_of(way, first, answers) for way in ways]
    read = [engines[names[0]].encode(prompt) + text for prompt, text in zip(prompts, answers.texts[first])]
    near = {name: {"bits_a_weight": bits(engine), **nearness(engines[names[0]], engine, read)} for name, engine in engines.items()}
    found = {"threads": torch.get_num_threads(), "prompts": len(prompts), "prompt_file": Path(given.prompts).name, "nearness": near}
    save(found | {"max_new_tokens": given.max_new_tokens, "method": METHOD, "rows": rows}, given.out)
    print(table(rows, near, len(prompts)))


def answer(engines: dict[str, Engine], way: Way, prompt: Any, tokens: int) -> list[int]:
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
def distribution(engine: Engine, text: list[int]) -> Tensor:
    """Log probabilities [N, V] along a text."""
    return engine.target(chain_rows(0, text, 0), engine.target.new_cache(1, len(text))).logits.log_softmax(-1)


def nearness(first: Engine, other: Engine, texts: list[list[int]]) -> dict[str, float]:
    nats, equal = [], []
    for text in texts:
        p, q = distribution(first, text), distribution(other, text)
        nats.append((p.exp() * (p - q)).sum(-1))
        equal.append(p.argmax(-1) == q.argmax(-1))
    return {"equal": float(torch.cat(equal).float().mean()), "nats": float(torch.cat(nats).mean())}


if __name__ == "__main__":
    main()
