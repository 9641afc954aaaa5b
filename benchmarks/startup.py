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
from pathlib import Path

PARTS = """
import time
began = time.perf_counter()
import eyas
imported = time.perf_counter()
engine = eyas.load(precision={precision!r})
loaded = time.perf_counter()
engine.generate("Tell me about hawks.", max_new_tokens=64)
from eyas.bench.report import peak_memory_mb
print(imported - began, loaded - imported, peak_memory_mb())
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--precisions", default="fp32,bf16,int8,q4")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    found = {}
    for precision in given.precisions.split(","):
        rows = []
        for _ in range(given.repeats + 1):
            said = subprocess.run([sys.executable, "-c", PARTS.format(precision=precision)], capture_output=True, text=True, check=True)
            imported, loaded, memory = map(float, said.stdout.split())
            command = [sys.executable, "-m", "eyas", "generate", "Tell me about hawks.", "--max-new-tokens", "16", "--precision", precision]
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            rows.append((imported, loaded, time.perf_counter() - began, memory))
        middle = [round(statistics.median(column), 2) for column in zip(*rows[1:])]
        found[precision] = dict(zip(("import_s", "load_s", "generate_16_tokens_s", "peak_memory_mb"), middle))
        print(precision, json.dumps(found[precision]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
