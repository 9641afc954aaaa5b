"""Tau behind contexts of growing length: does a draft that learned on short conversations hold up?

    python benchmarks/long_context.py --draft DIR --prompts F.jsonl [--lengths 512,1024,2048,4096] [--conversations 6] [--new-tokens 80]

A context is a conversation of the prompts with the target's own greedy answers, turn after turn, cut behind a question at about the wanted
length; what is measured is the answer to that question, by a chain of 7 and by 60x7x10 trees, greedy. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import eyas
from eyas.bench.prompts import read_prompts
from eyas.config import Sampling, TreeShape
from eyas.decode.generate import Decoder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draft")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--answer-tokens", type=int, default=160)
    options = parser.parse_args()
    engine = eyas.load(draft=options.draft)
    items, _ = read_prompts(options.prompts)
    questions = [item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"] for item in items]
    lengths = list(map(int, options.lengths.split(",")))
    contexts: dict[int, list[list[int]]] = {length: [] for length in lengths}
    for number in range(options.conversations):
        messages: list[dict[str, str]] = []
        wanted = list(lengths)
        turn = number * 7
        while wanted:
            messages.append({"role": "user", "content": questions[turn % len(questions)]})
            turn += 1
            ids = engine.encode(messages)
            if len(ids) >= wanted[0]:
                contexts[wanted.pop(0)].append(ids)
                continue
            answer = engine.generate(messages, method="plain", max_new_tokens=options.answer_tokens)
            messages.append({"role": "assistant", "content": answer.text})
    found: dict[str, Any] = {}
    for shape in ("chain:7", "60x7x10"):
        for length in lengths:
            counts: Counter[int] = Counter()
            for ids in contexts[length]:
                decoder = Decoder(engine.target, engine.drafter("eagle3"))
                *_, (text,) = decoder.run([ids], TreeShape.parse(shape), Sampling(), [0], options.new_tokens)
                counts += text.accepted_lengths
            tau = sum(tokens * count for tokens, count in counts.items()) / counts.total()
            found[f"{shape} at {length}"] = {
                "tau": round(tau, 3),
                "rounds": counts.total(),
                "mean_length": mean(map(len, contexts[length])),
            }
            print(shape, length, found[f"{shape} at {length}"], flush=True)
    print(json.dumps(found))


def mean(values: Any) -> int:
    held = list(values)
    return round(sum(held) / len(held))


if __name__ == "__main__":
    main()
