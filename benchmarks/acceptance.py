"""What drafts' guesses are worth: tau of each draft, method and tree on the same texts, without a pass of the target for each round.

    python benchmarks/acceptance.py --sets DIR [--drafts shipped,DIR] [--methods eagle3,eagle3+copy] [--trees 60x7x10] [--temperatures 0]

The target answers the first `--limit` prompts of every set once; what it wrote is kept in `--state`. Each draft then walks along these
texts: what it would have guessed in each round, and how much of that is the text. "Before loops" leaves out what comes after a text has
begun to repeat itself. The mean is over sets; intervals are 95%, over prompts; those of differences to the first row are paired. No timing
is taken.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import KINDS, engine_for, options, parsed, save
from torch import Tensor

from eyas.bench.figures import COVERAGE, RESAMPLES, first_repeat
from eyas.bench.prompts import read_prompts
from eyas.config import PRECISIONS, Sampling, TreeShape
from eyas.decode.sampling import NOISE_VERSION, Noise
from eyas.engine import Engine
from eyas.files.disk import directory_hash
from eyas.kernels.native import kernel_name
from eyas.measure.replay import features_of, replay

SHIPPED = "shipped"
Way = tuple[str, TreeShape]  # a method, and the shape of its trees
BATCH = 20


class Text(NamedTuple):
    """An answer, with its prompt, and the seed it was drawn with."""

    tokens: list[int]
    prompt: int  # tokens of the prompt
    seed: int


class Counted(NamedTuple):
    """Of one text: rounds and tokens they commit, whole and before the text's first loop."""

    rounds: int
    tokens: int
    early_rounds: int
    early_tokens: int


def written(engine: Engine, prompts: Sequence[Any], temperature: float, longest: int) -> list[Text]:
    """The target's own answers."""
    texts: list[Text] = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        settings = {"temperature": temperature, "seed": first, "max_new_tokens": longest, "generation_config": "none"}
        results = engine.generate(some, method="plain", **settings)
        for prompt, result in zip(some, results, strict=True):
            ids = engine.encode(prompt)
            texts.append(Text([*ids, *result.tokens], len(ids), result.seed))
    return texts


def texts_of(given: Any, engine: Engine, prompts: Sequence[Any], temperature: float) -> list[Text]:
    """As `written`, from the state where it is there."""
    how = (temperature, given.max_new_tokens, given.precision)
    facts = (prompts, *how, directory_hash(engine.directory), kernel_name(), NOISE_VERSION)
    file = given.state and given.state / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    if file and file.exists():
        return [Text(*each) for each in json.loads(file.read_text())]
    texts = written(engine, prompts, temperature, given.max_new_tokens)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(texts))
    return texts


def counted(engine: Engine, way: Way, text: Text, features: Tensor, temperature: float) -> Counted:
    """One method's rounds with one shape of tree along a text, of whose tokens these are the features."""
    noise = Noise(text.seed, engine.target.config.vocab_size) if temperature else None
    steps = replay(engine.drafter(way[0]), features, text.tokens, text.prompt, way[1], Sampling(temperature=temperature), noise).steps
    ends = text.prompt + 1 + np.cumsum(steps)
    early = [step for step, end in zip(steps, ends, strict=True) if end <= text.prompt + first_repeat(text.tokens[text.prompt :])]
    return Counted(len(steps), sum(steps), len(early), sum(early))


def taus(counts: Sequence[Sequence[Counted]], early: bool, picks: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over sets of tokens per round, for each of B draws of prompts; `picks`: of each set, [B, P]."""
    found = []
    for texts, picks_BP in zip(counts, picks, strict=True):
        table = np.asarray(texts, dtype=float)[:, 2:] if early else np.asarray(texts, dtype=float)[:, :2]
        rounds, tokens = table[picks_BP].sum(1).T
        found.append(tokens / np.maximum(rounds, 1))
    return np.mean(found, 0)


def summary(counts: dict[str, list[Counted]], base: dict[str, list[Counted]]) -> dict[str, Any]:
    """Of one draft, method, tree and temperature: tau by set and its mean, with intervals; and how that differs from the first row's."""
    draw, names = np.random.default_rng(0), list(counts)
    whole = [np.arange(len(counts[name]))[None] for name in names]
    drawn = [draw.integers(len(counts[name]), size=(RESAMPLES, len(counts[name]))) for name in names]

    def both(early: bool, picks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        own, first = (taus([each[name] for name in names], early, picks) for each in (counts, base))
        return own, own - first

    told: dict[str, Any] = {}
    for word, early in (("tau", False), ("tau_before_loops", True)):
        (point,), (more,) = both(early, whole)
        ends, ends_more = (np.percentile(values, COVERAGE) for values in both(early, drawn))
        told[word] = {name: round(float(taus([counts[name]], early, [each])[0]), 3) for name, each in zip(names, whole, strict=True)}
        told[word] |= {"mean": round(float(point), 3), "interval": np.round(ends, 3).tolist()}
        told[word] |= {"more_than_first": round(float(more), 3), "more_interval": np.round(ends_more, 3).tolist()}
    return told


def measured(given: Any) -> Iterator[dict[str, Any]]:
    """A row for each temperature, draft, method and tree, in that order."""
    sets = {Path(name).stem: [item.prompt for item in read_prompts(given.sets / name)[0]][: given.limit] for name in given.names.split(",")}
    for temperature in map(float, given.temperatures.split(",")):
        base: dict[str, list[Counted]] = {}
        for draft in given.drafts.split(","):
            engine = engine_for(given, given.precision, None if draft == SHIPPED else draft)
            texts = {name: texts_of(given, engine, prompts, temperature) for name, prompts in sets.items()}
            ways = list(itertools.product(given.methods.split(","), map(TreeShape.parse, given.trees.split(","))))
            found: list[dict[str, list[Counted]]] = [{name: [] for name in sets} for _ in ways]
            for name, own in texts.items():
                for text in own:
                    features = features_of(engine.target, text.tokens, engine.drafter(ways[0][0]).wants)
                    for way, counts in zip(ways, found, strict=True):
                        counts[name].append(counted(engine, way, text, features, temperature))
            for (method, shape), counts in zip(ways, found, strict=True):
                base = base or counts
                yield {"temperature": temperature, "draft": draft, "method": method, "tree": str(shape), **summary(counts, base)}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--sets", type=Path, help="folder of prompt files")
    parser.add_argument("--names", default=",".join(KINDS.values()), help="of the files")
    parser.add_argument("--drafts", default=SHIPPED, help=f"directories, or {SHIPPED}")
    parser.add_argument("--methods", default="eagle3,eagle3+copy")
    parser.add_argument("--trees", default="60x7x10")
    parser.add_argument("--temperatures", default="0")
    parser.add_argument("--limit", type=int, default=20, help="prompts of a set")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--precision", default=PRECISIONS[0])
    parser.add_argument("--state", type=Path, help="folder that keeps what the target wrote")
    given = parsed(parser, words, {"sets": "prompts"}, limit=2, max_new_tokens=12, trees="12x3x4", temperatures="0,1")
    rows = []
    for row in measured(given):
        rows.append(row)
        print(json.dumps(row), flush=True)
        save(rows, given.out)


if __name__ == "__main__":
    main()
