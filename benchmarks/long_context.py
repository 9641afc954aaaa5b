"""Tau behind contexts of growing length: does a draft that learned on short conversations hold up?

    python benchmarks/long_context.py --prompts F.jsonl [--draft DIR] [--lengths 512,1024,2048,4000] [--conversations 6] [--shapes 60x7x10]

A context is a conversation of the prompts with the target's own greedy answers (each question was answered alone), cut behind a question
at about the wanted length; what is measured is the answer to that question, greedy. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import eyas
from eyas.bench.prompts import read_prompts
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.engine import Engine

ANSWER = 200  # tokens of an answer in the context, at most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draft")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--lengths", default="512,1024,2048,4000")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--shapes", default="60x7x10")
    parser.add_argument("--new-tokens", type=int, default=80)
    options = parser.parse_args()
    engine = eyas.load(draft=options.draft)
    turns = answered(engine, options.prompts)
    lengths = list(map(int, options.lengths.split(",")))
    contexts = [contexts_of(engine, turns[7 * number :] + turns[: 7 * number], lengths) for number in range(options.conversations)]
    found: dict[str, Any] = {}
    for shape in options.shapes.split(","):
        for length, texts in zip(lengths, zip(*contexts)):
            counts: Counter[int] = Counter()
            for ids in texts:
                decoder = Decoder(engine.target, engine.drafter("eagle3"))
                *_, (text,) = decoder.run([ids], TreeShape.parse(shape), Sampling(), [0], options.new_tokens)
                counts += text.accepted_lengths
            tau = sum(tokens * count for tokens, count in counts.items()) / counts.total()
            told = {"tau": round(tau, 3), "rounds": counts.total(), "mean_length": round(sum(map(len, texts)) / len(texts))}
            found[f"{shape} at {length}"] = told
            print(shape, "at", length, told, flush=True)
    print(json.dumps(found))


def answered(engine: Engine, path: str) -> list[tuple[str, str]]:
    """First turns and the target's greedy answers to them, all decoded together."""
    items, _ = read_prompts(path)
    questions = [item.prompt if isinstance(item.prompt, str) else item.prompt[0]["content"] for item in items]
    prompts = [engine.encode(question) for question in questions]
    *_, texts = Decoder(engine.target).run(prompts, PLAIN, Sampling(), [0] * len(prompts), ANSWER)
    written = [text.tokens[len(prompt) :] for prompt, text in zip(prompts, texts)]
    return [(question, engine.tokenizer.decode(tokens, skip_special_tokens=True)) for question, tokens in zip(questions, written)]


def contexts_of(engine: Engine, turns: list[tuple[str, str]], lengths: list[int]) -> list[list[int]]:
    """One conversation cut behind the first question at which it is as long as wanted, for each of the ascending lengths."""
    messages: list[dict[str, str]] = []
    found: list[list[int]] = []
    while len(found) < len(lengths):
        question, answer = turns[len(messages) // 2 % len(turns)]
        messages.append({"role": "user", "content": question})
        ids = engine.encode(messages)
        while len(found) < len(lengths) and len(ids) >= lengths[len(found)]:
            found.append(ids)
        messages.append({"role": "assistant", "content": answer})
    return found


if __name__ == "__main__":
    main()
