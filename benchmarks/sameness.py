"""Texts that differ between plain and speculative decoding, counted over many tokens at each precision.

    python benchmarks/sameness.py FILE.jsonl .. [--precisions bf16,int8,q4] [--batch 16] [--limit 80] [--out F.json]

Every prompt is answered by plain decoding and by eagle3-lookup with planned trees, in batches whose texts end at different times,
greedily and at temperature 1. No timing is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import eyas
from eyas.bench.prompts import read_prompts


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("files", nargs="+")
    options.add_argument("--precisions", default="bf16,int8,q4")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--limit", type=int, default=80)
    options.add_argument("--max-new-tokens", type=int, default=200)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    prompts = [item.prompt for file in given.files for item in read_prompts(file, given.limit)[0]]
    found: list[dict[str, Any]] = []
    for precision in given.precisions.split(","):
        engine = eyas.load(precision=precision)
        for temperature in (0.0, 1.0):
            tokens = different = 0
            for first in range(0, len(prompts), given.batch):
                some = prompts[first : first + given.batch]
                settings = {"temperature": temperature, "seed": first, "max_new_tokens": given.max_new_tokens}
                plain = engine.generate(some, method="plain", **settings)
                drafted = engine.generate(some, method="eagle3-lookup", **settings)
                tokens += sum(len(result.tokens) for result in plain)
                different += sum(a.tokens != b.tokens for a, b in zip(plain, drafted))
            found.append(
                {"precision": precision, "temperature": temperature, "tokens": tokens, "texts": len(prompts), "different": different}
            )
            print(json.dumps(found[-1]), flush=True)
            if given.out:
                given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
