"""What a level of the draft takes in a round, as one native call and as its parts one after the other.

    python benchmarks/draft_step.py [--precision bf16] [--temperature 0] [--repeats 300] [--out F.json]

Each repeat is a round: the draft catches up on three tokens, grows three levels of so many rows, and the target reads a tree, which drives
the draft's weights out of the cache. A level is timed as planners are told it: reading, head, ranking, the tree's own records. The two ways
take turns; least and median milliseconds by level. Works where the native kernel does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from common import engine_for, options, parsed, rounded, tell

from eyas.config import Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.plan.planner import Guesses, Planner
from eyas.decode.sampling import Noise
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import Engine
from eyas.model.cache import KVCache
from eyas.model.draft import DraftNetwork
from eyas.model.rows import chain_rows

CONTEXT, LATE, LEVELS, READ = 160, 3, 3, 8  # rows of text, that the draft catches up on, levels, rows that the target reads


class Timed(Planner):
    """A planner that lets so many rows of each level be read, and notes what levels take."""

    rows = 1

    def worth_drafting(self, covered: Sequence[float]) -> list[bool]:
        self.taken: list[float] = []
        return [True] * len(covered)

    def frontiers(self, growths: Sequence[Guesses], candidates: Sequence[Sequence[int]]) -> list[list[int]]:
        super().frontiers(growths, candidates)
        return [list(nodes[: self.rows]) for nodes in candidates]

    def record_step(self, rows: int, seconds: float) -> None:
        super().record_step(rows, seconds)
        self.taken.append(seconds)


class Rounds:
    """Rounds of one text that always begins anew behind the same tokens."""

    def __init__(self, engine: Engine, drafter: Eagle3Drafter, sampling: Sampling) -> None:
        self.target, self.drafter, self.sampling = engine.target, drafter, sampling
        draw, vocabulary = torch.Generator().manual_seed(0), self.target.config.vocab_size
        self.text = torch.randint(0, vocabulary, (CONTEXT + 1,), generator=draw).tolist()
        self.cache = self.target.new_cache(1, CONTEXT + READ)
        self.features = self.target(chain_rows(0, self.text[:CONTEXT], 0), self.cache, drafter.wants).tapped
        self.cache.keep(0, range(CONTEXT))
        shared = engine.planner("auto", "eagle3", sampling)
        assert shared is not None
        self.plan = Timed(shared.passes, shared.steps, shared.calibration)
        drafter.reserve(1, CONTEXT + 100)
        drafter.observe(0, self.text, self.features)

    def round(self, rows: int) -> list[float]:
        """Seconds of each level, catching up first."""
        self.plan.begin(1)
        self.plan.rows = rows
        noise = None if self.sampling.greedy else Noise(0, self.target.config.vocab_size).at
        shape = TreeShape(1 + LEVELS * rows * 8, LEVELS, max(rows, 7))
        request = TreeRequest(0, self.text[-1], CONTEXT, shape, self.sampling, noise, planner=self.plan)
        self.drafter.propose([request])
        self.target(chain_rows(0, self.text[:READ], CONTEXT), self.cache, self.drafter.wants)
        assert isinstance(self.drafter.cache, KVCache)
        self.drafter.cache.cut(0, CONTEXT - LATE)
        pending = self.drafter.pending[0]
        pending.tokens, pending.features = self.text[-LATE:], [self.features[-LATE:]]
        return self.plan.taken


def measured(engine: Engine, sampling: Sampling, counts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Milliseconds by way, rows and level."""
    drafter = engine.drafter("eagle3")
    assert isinstance(drafter, Eagle3Drafter) and isinstance(drafter.network, DraftNetwork)
    loaded = drafter.network
    ways, taken = {"one call": loaded.one_call, "parts": None}, defaultdict(list)
    rounds = Rounds(engine, drafter, sampling)
    for repeat in range(repeats + 1):
        for rows in counts:
            for way, step in ways.items():
                loaded.one_call = step
                for level, seconds in enumerate(rounds.round(rows)):
                    if repeat:  # the first has rows of text to read, and caches to fill
                        taken[way, rows, min(level, 2)].append(1e3 * seconds)
    loaded.one_call = ways["one call"]
    names = {0: "catching up", 1: "first level", 2: "next levels"}
    found: dict[str, Any] = {way: {} for way in ways}
    for (way, rows, level), each in taken.items():
        least, median = min(each), sorted(each)[len(each) // 2]
        found[way].setdefault(f"{rows} rows", {})[names[level]] = rounded({"least": least, "median": median})
    return found


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=300)
    given = parsed(parser, words, repeats=2)
    engine = engine_for(given, given.precision)
    with engine.target.threads():
        found = measured(engine, Sampling(given.temperature), given.rows, given.repeats)
    tell({"precision": given.precision, "temperature": given.temperature, "ms": found}, given.out)


if __name__ == "__main__":
    main()
