"""Texts that differ between plain and speculative decoding, counted over many tokens at each precision.

    python benchmarks/sameness.py FILE.jsonl .. [--precisions bf16,int8,q4] [--batch 16] [--limit 80] [--out F.json]

Every prompt is answered by plain decoding and by eagle3+copy with planned trees, in batches whose texts end at different times,
greedily and at temperature 1. No timing is taken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common import KINDS, engine_for, options, parsed, save, tiny

from eyas.bench.prompts import read_prompts
from eyas.engine import Engine


def counted(engine: Engine, prompts: Sequence[Any], batch: int, temperature: float, longest: int) -> dict[str, int]:
    tokens = different = 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        settings = {"temperature": temperature, "seed": first, "max_new_tokens": longest, "generation_config": "none"}
        plain = engine.generate(some, method="plain", **settings)
        drafted = engine.generate(some, method="eagle3+copy", **settings)
        tokens += sum(len(result.tokens) for result in plain)
        different += sum(a.tokens != b.tokens for a, b in zip(plain, drafted))
    return {"tokens": tokens, "texts": len(prompts), "different": different}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--precisions", default="bf16,int8,q4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    given = parsed(parser, words, batch=2, limit=3, max_new_tokens=16)
    if given.quick:
        given.files = [tiny().root / "prompts" / KINDS["chat"]]
    elif not given.files:
        parser.error("give files of prompts, or --quick")
    prompts = [item.prompt for file in given.files for item in read_prompts(file, given.limit)[0]]
    found: list[dict[str, Any]] = []
    for precision in given.precisions.split(","):
        engine = engine_for(given, precision)
        for temperature in (0.0, 1.0):
            told = counted(engine, prompts, given.batch, temperature, given.max_new_tokens)
            found.append({"precision": precision, "temperature": temperature, **told})
            print(json.dumps(found[-1]), flush=True)
            save(found, given.out)


if __name__ == "__main__":
    main()
