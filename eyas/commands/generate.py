"""`eyas generate`: one answer, streamed as rounds commit it, or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from eyas.commands.common import conversation_from, engine_from, settings_from, settled, sharing, without_a_draft
from eyas.config import EyasError, Request, short
from eyas.decode.logprobs import TokenLogprobs
from eyas.decode.prompt import Prompt
from eyas.decode.sequence import Result, Sequence, result_of
from eyas.engine import Engine

JSON_KEYS = ("text", "tokens", "tau", "rounds", "seconds", "seed", "finish_reason")


def run(options: argparse.Namespace) -> int:
    settings_from(options)
    prompt = prompt_from(options)
    if options.logprobs is not None and not options.json:
        raise EyasError("--logprobs are part of the JSON object; add --json")
    if options.n is not None and options.n < 1:
        raise EyasError(f"n must be at least 1, not {options.n}")
    engine = engine_from(options)
    request = settled(engine, options, quiet=options.json)
    if options.json or options.n is not None:
        finished(engine, prompt, request, options)
        return 0
    tell(engine.stream(prompt, request), without_a_draft(engine, options))
    return 0


def finished(engine: Engine, prompt: Prompt, request: Request, options: argparse.Namespace) -> None:
    """Print all answers once they are done, as JSON objects or as texts."""
    texts: list[Sequence] = []
    try:
        for texts in engine.rounds(prompt, request, n=options.n):  # noqa: B007 (the last is wanted)
            pass
    finally:  # what was written before Ctrl-C stays
        for result in map(result_of, texts):
            if options.json:
                print(json.dumps(as_json(engine, request, result)))
            else:
                print(result.text)
                print(f"[{summary(result)}]", file=sys.stderr)
        if texts and (note := without_a_draft(engine, options)):
            print(f"[{note}]", file=sys.stderr)


def as_json(engine: Engine, request: Request, result: Result) -> dict[str, Any]:
    found = {key: getattr(result, key) for key in JSON_KEYS}
    found |= {"method": engine.method_of(request), "copy": engine.copies(request)}
    found["generation_config"] = {"used": dict(request.defaulted), "not_done": engine.generation_config.not_done}
    found |= sharing(engine)
    if result.logprobs is not None:
        found["logprobs"] = [logprobs_json(engine, told) for told in result.logprobs]
    return found


def logprobs_json(engine: Engine, told: TokenLogprobs) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": engine.tokenizer.decode([token]), "logprob": logprob}

    return {**one(told.token, told.logprob), "top": [one(*each) for each in told.top]}


def tell(pieces: Iterable[str | Result], note: str | None = None) -> None:
    """Print an answer as it comes, its last line ended as every line is, and then its summary, and a note on it."""
    end = ""
    try:
        for piece in pieces:
            if isinstance(piece, str):
                end = piece[-1:] or end
                print(piece, end="", flush=True)
            else:
                print(end="" if end == "\n" else "\n", flush=True)
                print(f"[{summary(piece)}]", file=sys.stderr)
                if note:
                    print(f"[{note}]", file=sys.stderr)
    except (KeyboardInterrupt, EyasError):
        if end not in ("", "\n"):
            print(flush=True)  # what was written stays, and what is said of its end has a line of its own
        raise


def summary(result: Result) -> str:
    rate = len(result.tokens) / result.seconds if result.seconds else 0
    return f"{len(result.tokens)} tokens, {result.rounds} rounds, tau {result.tau:.2f}, {rate:.1f} tokens/s, seed {result.seed}"


def prompt_from(options: argparse.Namespace) -> Prompt:
    """The prompt as text, messages or token ids, checked before a model is loaded."""
    if sum(given is not None for given in (options.prompt, options.messages, options.prompt_ids)) != 1:
        raise EyasError("give a PROMPT, --messages F.json or --prompt-ids, one of the three")
    if options.raw and (options.tools or options.chat_template_kwargs):
        raise EyasError("--tools and --chat-template-kwargs are for a chat template, --raw does without one; drop one of the two")
    if options.prompt_ids is not None:
        return ids_from(options)
    if options.messages:
        return conversation_from(options)
    if not options.prompt.strip():
        raise EyasError("the prompt is empty; give some text")
    if options.system is None:
        return options.prompt
    if options.raw:
        raise EyasError("--system needs a chat template, --raw does without one; drop one of the two")
    return [{"role": "system", "content": options.system}, {"role": "user", "content": options.prompt}]


def ids_from(options: argparse.Namespace) -> list[int]:
    if options.system is not None or options.raw or options.tools or options.chat_template_kwargs:
        raise EyasError("--prompt-ids are read as they are; drop --system, --raw, --tools and --chat-template-kwargs")
    words = options.prompt_ids.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise EyasError(f"--prompt-ids takes token ids with blanks or commas between them, not {short(options.prompt_ids)}")
    return [int(word) for word in words]
