"""Texts that differ between one process and several that share a text's keys, counted over many tokens.

    python benchmarks/sharded_sameness.py --prompts F.jsonl [--tokens 100000] [--processes 2,3] [--precisions bf16,q4] [--out F.json]

The same batches are written by one process with `--context-parallel` and by so many processes, of one thread each: plainly, by eagle3 and
by eagle3+copy with planned trees, greedily and at temperature 1, until one process has written so many tokens. What is written is kept in
a file (`--state`, else in the cache of eyas), so a run that was ended goes on where it was. No timing is taken.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import KINDS, engine_for, options, parsed, save, target_for
from tree_attention import PATIENT, forked

from eyas.bench.prompts import read_prompts
from eyas.config import cache_dir
from eyas.decode.sampling import NOISE_VERSION
from eyas.files.disk import directory_hash
from eyas.kernels.native import kernel_name
from eyas.methods import COPY
from eyas.parallel.target import ShardedTarget

METHODS = ("plain", "eagle3", "eagle3+copy")
Texts = list[list[int]]  # tokens of each


class Batch(NamedTuple):
    """Texts of one call: of the prompts from `first` on."""

    precision: str
    method: str
    temperature: float
    first: int


class State:
    """What was written so far, by batch and number of processes; a line of JSON each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.texts: dict[tuple[Batch, int], Texts] = {}
        self.read()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(self.line(*key, texts) for key, texts in self.texts.items()))  # without a line that was cut off

    def read(self) -> None:
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                batch, processes, texts = json.loads(line)
            except ValueError:
                continue
            self.texts[Batch(*batch), processes] = texts

    @staticmethod
    def line(batch: Batch, processes: int, texts: Texts) -> str:
        return json.dumps([batch, processes, texts]) + "\n"

    def add(self, batch: Batch, processes: int, texts: Texts) -> None:
        with self.file.open("a") as opened:
            opened.write(self.line(batch, processes, texts))


def write(_: int, given: Any, batches: Sequence[Batch], prompts: Sequence[Any], state: State) -> int:
    """In the first of some processes: write these batches, all of one precision. Returns how many."""
    engine = engine_for(given, batches[0].precision, context_parallel=True, peer_timeout=PATIENT)
    target = engine.target
    assert isinstance(target, ShardedTarget)
    for batch in batches:
        settings = {"temperature": batch.temperature, "seed": batch.first, "max_new_tokens": given.max_new_tokens}
        some = prompts[batch.first : batch.first + given.batch]
        results = engine.generate(some, method=batch.method, copy=batch.method.endswith(COPY), generation_config="none", **settings)
        state.add(batch, target.peers.count, [result.tokens for result in results])
    target.stop()
    return len(batches)


def rows(texts: dict[tuple[Batch, int], Texts], processes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """For each way to write and number of processes: of what both wrote, how many texts and tokens there are, and which texts differ."""
    ways = dict.fromkeys(batch[:3] for batch, _ in texts)
    for way, count in itertools.product(ways, processes):
        both = [(texts[batch, 1], texts[batch, count]) for batch, one in texts if batch[:3] == way and one == 1 and (batch, count) in texts]
        pairs = [pair for alone, shared in both for pair in zip(alone, shared, strict=True)]
        tokens, different = sum(len(alone) for alone, _ in pairs), sum(alone != shared for alone, shared in pairs)
        told = dict(zip(Batch._fields, way), processes=count)
        yield {**told, "texts": len(pairs), "tokens": tokens, "different": different}


def told(state: State, processes: Sequence[int], out: Path | None) -> list[dict[str, Any]]:
    """Say and keep what was found so far; for each number of processes, all ways to write together."""
    found, names = [*rows(state.texts, processes)], ("texts", "tokens", "different")
    whole = [
        {"processes": count, **{name: sum(row[name] for row in found if row["processes"] == count) for name in names}}
        for count in processes
    ]
    print(json.dumps(whole), flush=True)
    save({"whole": whole, "rows": found}, out)
    return whole


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="that one process writes, in all")
    parser.add_argument("--processes", default="2,3")
    parser.add_argument("--precisions", default="bf16,q4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--state", type=Path, help="file that keeps what was written")
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, processes="2", batch=2, max_new_tokens=8, tokens=1)
    prompts, counts = [item.prompt for item in read_prompts(given.prompts)[0]], [int(each) for each in given.processes.split(",")]
    target = target_for(given)
    facts = (prompts, given.batch, given.max_new_tokens, directory_hash(target), kernel_name(), NOISE_VERSION)
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    state = State(given.state or (target.parent if given.quick else cache_dir()) / f"sharded-sameness-{name}.jsonl")
    print(json.dumps({"state": str(state.file), "batches": len(state.texts)}), flush=True)
    found = told(state, counts, given.out)
    for first, precision in itertools.product(range(0, len(prompts), given.batch), given.precisions.split(",")):
        batches = [Batch(precision, method, temperature, first) for method in METHODS for temperature in (0.0, 1.0)]
        if found[0]["tokens"] >= given.tokens and not any((batch, 1) in state.texts for batch in batches):  # what was begun is ended
            break
        for count in (1, *counts):
            if left := [batch for batch in batches if (batch, count) not in state.texts]:
                forked(count, partial(write, given=given, batches=left, prompts=prompts, state=state), board=True)
                state.read()
        found = told(state, counts, given.out)


if __name__ == "__main__":
    main()
