"""The draft vocabulary: what a size costs a round, what of the target's text it can say, and what tau it reaches.

    python benchmarks/draft_vocabulary.py --shards DIR [--claims RESULTS.json] [--sizes 4096,8192,16384,49152] [--rounds 40]

Price: milliseconds to draft a chain of 3 and a 60x7x10 tree with a draft of that many tokens (its weights do not matter for it), the
sizes taking turns round by round, beside the target's pass over as many rows; medians. Coverage: the share of held-out greedy answers'
tokens that a vocabulary of this size, counted over the other conversations, holds. Tau: of the runs that `claims.py` made, where they are
given. Prints a Markdown table.
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
from claims import hold_out_greedy

from eyas.config import PRECISIONS, Sampling, TargetConfig, TrainSettings, TreeShape, default_taps
from eyas.decode.drafter import TreeRequest
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.target import load_target, target_config, target_directory
from eyas.model.rows import chain_rows
from eyas.model.target import Target
from eyas.train.build import coverage, new_draft
from eyas.train.features import Example, shard_examples
from eyas.train.shards import PATTERN

SHAPES = ("chain:3", "60x7x10")
PREFIX = 128  # tokens of text before the round


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=Path, nargs="+", required=True)
    parser.add_argument("--claims", type=Path)
    parser.add_argument("--sizes", default="4096,8192,16384,49152")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    sizes = list(map(int, options.sizes.split(",")))
    directory = target_directory(None)
    config = target_config(directory)
    examples = shard_examples([path for folder in options.shards for path in sorted(folder.glob(PATTERN))], TrainSettings.max_length)
    held_out, kept = hold_out_greedy(examples)
    drafters, covered = {}, {}
    for size in sizes:
        drafters[size], covered[size] = unschooled(size, directory, config, kept, held_out)
    prices = {shape: drafting(drafters, TreeShape.parse(shape), config, options.rounds) for shape in SHAPES}
    passes = {shape: checking(directory, TreeShape.parse(shape), options.rounds) for shape in SHAPES}
    taus = taus_by_size(json.loads(options.claims.read_text())) if options.claims else {}
    print(table(sizes, covered, prices, passes, taus))


def unschooled(
    size: int, directory: Path, config: TargetConfig, kept: list[Example], held_out: list[Example]
) -> tuple[Eagle3Drafter, float]:
    """A drafter whose draft has learned nothing yet, in the precision that decodes, and the share of held-out tokens it could say."""
    target = load_target(directory, PRECISIONS[0])
    taps = default_taps(config.num_hidden_layers)
    network, vocab = new_draft(target, taps, kept, TrainSettings(draft_vocab_size=size))
    return Eagle3Drafter(network.to(torch.bfloat16).prepare(), vocab), coverage(held_out, vocab)


@torch.inference_mode()
def drafting(drafters: dict[int, Eagle3Drafter], shape: TreeShape, config: TargetConfig, rounds: int) -> dict[int, float]:
    """Median milliseconds of one tree a size: one new row of text is read, then the tree grows."""
    width = 3 * config.hidden_size
    for drafter in drafters.values():
        drafter.reserve(1, PREFIX + rounds + 128)
        drafter.observe(0, list(range(PREFIX)), torch.randn(PREFIX - 1, width, dtype=torch.bfloat16))

    def grown(drafter: Eagle3Drafter, number: int) -> Callable[[], Any]:
        root = PREFIX + number  # a token as good as any, and its position
        drafter.observe(0, [root], torch.randn(1, width, dtype=torch.bfloat16))
        return lambda: drafter.propose([TreeRequest(0, root, root, shape, Sampling(), None)])

    spent: dict[int, list[float]] = {size: [] for size in drafters}
    for number in range(rounds):
        for size, drafter in drafters.items():
            spent[size].append(milliseconds(grown(drafter, number)))
    return {size: statistics.median(found) for size, found in spent.items()}


@torch.inference_mode()
def checking(directory: Path, shape: TreeShape, rounds: int) -> float:
    """Median milliseconds of the target's pass over as many rows as the tree has nodes."""
    target: Target = load_target(directory, PRECISIONS[0]).prepare()
    cache = target.new_cache(1, PREFIX + 128)
    target(chain_rows(0, list(range(PREFIX)), 0), cache, (), slice(0, 1))
    cache.keep(0, range(PREFIX))
    rows = chain_rows(0, list(range(shape.nodes)), PREFIX)
    return statistics.median(milliseconds(lambda: target(rows, cache, (), slice(0, shape.nodes))) for _ in range(rounds))


def milliseconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def taus_by_size(results: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The runs of claims.py that differ in the draft vocabulary alone, and the one they are beside."""
    named = {told["changes"].get("draft_vocab_size"): told for told in results.values() if set(told["changes"]) == {"draft_vocab_size"}}
    return named | {TrainSettings.draft_vocab_size: results["2x"]}


def table(
    sizes: list[int],
    covered: dict[int, float],
    prices: dict[str, dict[int, float]],
    passes: dict[str, float],
    taus: dict[int, dict[str, Any]],
) -> str:
    head = [f"drafting {shape}, ms (target's pass {passes[shape]:.1f})" for shape in SHAPES]
    titles = ["draft vocabulary", "tokens it can say", *head, "tau, held out", "tau, dev prompts"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for size in sizes:
        told = taus.get(size, {})
        found = [f"{told[key]['tau']:.3f}" if key in told else "-" for key in ("held_out", "dev")]
        cells = [f"{size:,}", f"{covered[size]:.1%}", *(f"{prices[shape][size]:.1f}" for shape in SHAPES), *found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
