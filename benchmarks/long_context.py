"""Tau behind contexts of growing length: does a draft that learned on short conversations hold up?

    python benchmarks/long_context.py --prompts F.jsonl [--draft DIR] [--lengths 512,1024,2048,4000] [--conversations 6] [--shapes 60x7x10]

A context is a conversation of the prompts with the target's own greedy answers (each question was answered alone), cut behind a question
at about the wanted length; what is measured is the answer to that question, greedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from common import KINDS, engine_for, options, parsed, tell

from eyas.bench.prompts import read_prompts
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.engine import Engine


def answered(engine: Engine, path: str, longest: int) -> list[tuple[str, str]]:
    """First turns and the target's greedy answers to them, all decoded together."""
    items, _ = read_prompts(path)
    questions = [item.prompt if isinstance(item.prompt, str) else item.prompt[0]["content"] for item in items]
    prompts = [engine.encode(question) for question in questions]
    *_, texts = Decoder(engine.target).run(prompts, PLAIN, Sampling(), [0] * len(prompts), longest)
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


def behind(engine: Engine, texts: Sequence[list[int]], shape: str, longest: int) -> dict[str, Any]:
    """Tau of the answers behind some contexts."""
    counts: Counter[int] = Counter()
    for ids in texts:
        decoder = Decoder(engine.target, engine.drafter("eagle3"))
        *_, (text,) = decoder.run([ids], TreeShape.parse(shape), Sampling(), [0], longest)
        counts += text.accepted_lengths
    tau = sum(tokens * count for tokens, count in counts.items()) / counts.total()
    return {"tau": round(tau, 3), "rounds": counts.total(), "mean_length": round(sum(map(len, texts)) / len(texts))}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--draft")
    parser.add_argument("--prompts")
    parser.add_argument("--lengths", default="512,1024,2048,4000")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--shapes", default="60x7x10")
    parser.add_argument("--answer-tokens", type=int, default=200, help="of an answer in the context, at most")
    parser.add_argument("--new-tokens", type=int, default=80)
    small = {"lengths": "150,300", "conversations": 1, "answer_tokens": 10, "new_tokens": 8}
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, **small)
    engine = engine_for(given, draft=given.draft)
    turns, lengths = answered(engine, given.prompts, given.answer_tokens), list(map(int, given.lengths.split(",")))
    contexts = [contexts_of(engine, turns[7 * number :] + turns[: 7 * number], lengths) for number in range(given.conversations)]
    found: dict[str, Any] = {}
    for shape in given.shapes.split(","):
        for length, texts in zip(lengths, zip(*contexts)):
            found[f"{shape} at {length}"] = behind(engine, texts, shape, given.new_tokens)
    tell(found, given.out)


if __name__ == "__main__":
    main()
