"""Own plain decoding against transformers' `generate`: the same weights, prompts, precision and threads, interleaved.

Prints one JSON object. Run: python benchmarks/against_transformers.py --prompts F.jsonl [--limit 10] [--precision bf16]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

import eyas
from eyas.bench.prompts import read_prompts
from eyas.files.target import DTYPES


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--prompts", required=True)
    options.add_argument("--limit", type=int, default=10)
    options.add_argument("--precision", default="bf16", choices=tuple(DTYPES))
    options.add_argument("--max-new-tokens", type=int, default=100)
    given = options.parse_args()
    engine = eyas.load(precision=given.precision)
    theirs = AutoModelForCausalLM.from_pretrained(engine.directory, dtype=DTYPES[given.precision]).eval()
    prompts, _ = read_prompts(given.prompts, given.limit)
    ratios, same = [], 0
    for number, item in enumerate([prompts[0], *prompts]):  # the first time only warms up
        ids = engine.encode(item.prompt)
        started = time.perf_counter()
        ours = engine.generate(item.prompt, method="plain", max_new_tokens=given.max_new_tokens)
        middle = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=given.max_new_tokens, do_sample=False, eos_token_id=2, pad_token_id=2)
        ended = time.perf_counter()
        if number:
            written = out[0, len(ids) :].tolist()
            ratios.append((len(ours.tokens) / (middle - started)) / (len(written) / (ended - middle)))
            same += written == ours.tokens
    found = {"precision": given.precision, "threads": torch.get_num_threads(), "prompts": len(prompts), "same_text": same}
    found |= {"times_faster": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}))


if __name__ == "__main__":
    main()
