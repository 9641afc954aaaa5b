"""`eyas generate`: one answer, streamed as rounds commit it, or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from eyas.commands.common import engine_from, request_from
from eyas.config import EyasError
from eyas.decode.prompt import Prompt
from eyas.decode.sequence import Result, Sequence, result_of

JSON_KEYS = ("text", "tokens", "tau", "rounds", "seconds", "seed", "finish_reason")


def run(options: argparse.Namespace) -> int:
    request, prompt = request_from(options), prompt_from(options)
    engine = engine_from(options)
    if options.json:
        texts: list[Sequence] = []
        try:
            for texts in engine.rounds(prompt, request):  # noqa: B007 (the last is wanted)
                pass
        finally:  # what was written before Ctrl-C stays
            if texts:
                print(json.dumps({key: value for key, value in asdict(result_of(texts[0])).items() if key in JSON_KEYS}))
        return 0
    try:
        tell(engine.stream(prompt, request))
    except KeyboardInterrupt:
        print()  # what was written stays
        raise
    return 0


def tell(pieces: Iterable[str | Result]) -> None:
    """Print an answer as it comes, its last line ended as every line is, and then its summary."""
    end = ""
    for piece in pieces:
        if isinstance(piece, str):
            end = piece[-1:] or end
            print(piece, end="", flush=True)
        else:
            print(end="" if end == "\n" else "\n", flush=True)
            print(f"[{summary(piece)}]", file=sys.stderr)


def summary(result: Result) -> str:
    rate = len(result.tokens) / result.seconds if result.seconds else 0
    return f"{len(result.tokens)} tokens, {result.rounds} rounds, tau {result.tau:.2f}, {rate:.1f} tokens/s, seed {result.seed}"


def prompt_from(options: argparse.Namespace) -> Prompt:
    """The prompt as text or messages, checked before a model is loaded."""
    if (options.prompt is None) == (options.messages is None):
        raise EyasError("give a PROMPT or --messages F.json, one of the two")
    if options.messages:
        return read_messages(Path(options.messages), options.system)
    if not options.prompt.strip():
        raise EyasError("the prompt is empty; give some text")
    if options.system is None:
        return options.prompt
    if options.raw:
        raise EyasError("--system needs a chat template, --raw does without one; drop one of the two")
    return [{"role": "system", "content": options.system}, {"role": "user", "content": options.prompt}]


def read_messages(path: Path, system: str | None) -> list[dict[str, str]]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise EyasError(f"--messages {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise EyasError(f"--messages {path} is not valid JSON ({error})") from None
    messages = found.get("messages") if isinstance(found, dict) else found
    well = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well or not messages:
        raise EyasError(f'{path} must hold a list of messages like [{{"role": "user", "content": "..."}}]')
    return ([{"role": "system", "content": system}] if system else []) + messages
