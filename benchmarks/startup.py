"""From nothing to text: seconds that `eyas generate` takes to start, part by part, and the most memory it holds, at each precision.

    python benchmarks/startup.py [--precisions fp32,bf16,int8,q4] [--repeats 3] [--out F.json]

Each figure is the median over fresh processes whose files the system has read before ("warm"). "start" is import, loading and packing,
until the first token could be asked for; "whole" is a call of 16 tokens from the shell's point of view.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from common import options, parsed, save, tiny

PARTS = """
import time
began = time.perf_counter()
import eyas
imported = time.perf_counter()
engine = eyas.load(**{models!r})
loaded = time.perf_counter()
engine.generate("Tell me about hawks.", max_new_tokens=64)
from eyas.bench.report import peak_memory_mb
print(imported - began, loaded - imported, peak_memory_mb())
"""


def one_start(models: dict[str, str]) -> tuple[float, float, float, float]:
    """Seconds to import, to load and pack, of a whole call; megabytes at most."""
    said = subprocess.run([sys.executable, "-c", PARTS.format(models=models)], capture_output=True, text=True, check=True)
    imported, loaded, memory = map(float, said.stdout.split())
    command = [sys.executable, "-m", "eyas", "generate", "Tell me about hawks.", "--max-new-tokens", "16"]
    command += [word for name, value in models.items() for word in (f"--{name}", value)]
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return imported, loaded, time.perf_counter() - began, memory


def models_of(given: argparse.Namespace, precision: str) -> dict[str, str]:
    own = {"target": str(tiny().target), "draft": str(tiny().draft)} if given.quick else {}
    return {**own, "precision": precision}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--precisions", default="fp32,bf16,int8,q4")
    parser.add_argument("--repeats", type=int, default=3)
    given = parsed(parser, words, precisions="bf16", repeats=1)
    found = {}
    for precision in given.precisions.split(","):
        rows = [one_start(models_of(given, precision)) for _ in range(given.repeats + 1)]  # the first reads the files
        middle = [round(statistics.median(column), 2) for column in zip(*rows[1:])]
        found[precision] = dict(zip(("import_s", "load_s", "generate_16_tokens_s", "peak_memory_mb"), middle))
        print(precision, json.dumps(found[precision]), flush=True)
        save(found, given.out)


if __name__ == "__main__":
    main()
