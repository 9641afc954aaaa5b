"""How much of its speed plain decoding keeps while other programs are at work: with all threads, and with one.

    python benchmarks/busy_machine.py [--busy 0,1,2] [--repeats 5] [--tokens 48] [--out F.json]

Each number of threads has a process of its own, and they take turns. The others are processes that count; the system shares out the cores.
"of alone" is the median rate over the median rate with nothing beside; "of one thread" is over one thread's under the same load.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from common import options, parsed, save, tiny

ASKED = """
import sys, time, torch
torch.set_num_threads({threads})
import eyas
engine = eyas.load(**{models!r})
engine.generate("hi", method="plain", max_new_tokens=4)
for line in sys.stdin:
    began = time.perf_counter()
    found = engine.generate("Tell me a long story about a hawk.", method="plain", max_new_tokens=int(line), seed=1)
    print(len(found.tokens) / (time.perf_counter() - began), flush=True)
"""


class Asked:
    """A process that decodes when it is asked to."""

    def __init__(self, threads: int, models: dict[str, str]) -> None:
        code = ASKED.format(threads=threads, models=models)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rate(self, tokens: int) -> float:
        """Tokens per second of one answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def rates(asked: dict[int, Asked], busy: int, repeats: int, tokens: int) -> dict[int, float]:
    """Median tokens per second by number of threads, beside `busy` processes that count."""
    with ExitStack() as stack:
        for _ in range(busy):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.kill)
        turns = [{threads: each.rate(tokens) for threads, each in asked.items()} for _ in range(repeats)]
    return {threads: statistics.median(turn[threads] for turn in turns) for threads in asked}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--busy", default="0,1,2", help="numbers of processes at work beside; the first is what the others are compared with"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    given = parsed(parser, words, busy="0,1", repeats=1, tokens=8)
    models = {"target": str(tiny().target), "draft": str(tiny().draft)} if given.quick else {}
    asked = {threads: Asked(threads, models) for threads in sorted({1, torch.get_num_threads()})}
    most, found, alone = max(asked), [], 0.0
    try:
        for busy in map(int, given.busy.split(",")):
            told = rates(asked, busy, given.repeats, given.tokens)
            alone = alone or told[most]
            row: dict[str, Any] = {"busy": busy, "threads": most, "tokens_per_second": round(told[most], 1)}
            row |= {"of_alone": round(told[most] / alone, 3), "of_one_thread": round(told[most] / told[1], 3)}
            found.append(row)
            print(json.dumps(row), flush=True)
            save(found, given.out)
    finally:
        for each in asked.values():
            each.process.kill()


if __name__ == "__main__":
    main()
