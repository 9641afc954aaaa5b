"""Prompts to measure on, in the forms that benchmarks and chat data come in.

Knows the spellings of a prompt; knows nothing of timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from eyas.config import EyasError, Request
from eyas.engine import Engine
from eyas.files.chat_data import CHAT_KEYS, SYSTEMS, TOOLS, VARIABLES, Conversation, encodable, messages_of
from eyas.files.records import read_objects

TEXT_KEYS = ("prompt", "question")
# answered before anything is timed, so that planners have seen rounds of their own
PRACTICE = ("Explain how a bicycle stays upright.", "Write a short letter to a friend about the weather.", "List five uses of a paperclip.")


class PromptItem(NamedTuple):
    line: int  # counted from 1
    prompt: str | Conversation


def read_prompts(path: str | Path, limit: int | None = None) -> tuple[list[PromptItem], list[str]]:
    """The first `limit` usable prompts and one complaint for each line skipped on the way.

    An object holds `turns` (the first is taken), `prompt` or `question`, or a conversation in any form of docs/data.md (taken up to the
    first answer: later turns would need the target's own answers). Raises EyasError if the file cannot be read or no line is usable.
    """
    if limit is not None and limit < 1:
        raise EyasError(f"limit must be at least 1, not {limit}")
    found, complaints = read_objects(path, prompt_of, "prompt", '{"prompt": "..."}', limit)
    return [PromptItem(place.number, prompt) for place, prompt in found], complaints


def prompt_of(row: dict[str, Any]) -> str | Conversation:
    """A line's prompt, or EyasError that says what is wrong with it."""
    if row.get("turns") is not None:
        turns = row["turns"]
        return checked(turns[0] if isinstance(turns, list) and turns else None, "turns")
    for key in TEXT_KEYS:
        if isinstance(row.get(key), list):  # a conversation up to its answer
            row = {CHAT_KEYS[0]: row[key], **{name: row.get(name) for name in (*SYSTEMS, *TOOLS, VARIABLES)}}
            break
        if row.get(key) is not None:
            return checked(row[key], key)
    conversation = messages_of(row)
    if conversation is None:
        raise EyasError(f"no prompt in it; expected one of {', '.join(('turns', *TEXT_KEYS, *CHAT_KEYS))}")
    opening = conversation.with_messages(takewhile(lambda message: message["role"] != "assistant", conversation))
    if not any(message["role"] == "user" and message["content"].strip() for message in opening):
        raise EyasError("no user turn before the first answer")
    return opening


def checked(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise EyasError(f'"{where}" holds no text')
    return encodable(text, f'"{where}"')


def fitting(engine: Engine, items: Sequence[PromptItem], request: Request | None = None) -> tuple[list[PromptItem], list[str]]:
    """The prompts that this target can read, and complaints about the others (too long, say). Raises if none is left."""
    fit: list[PromptItem] = []
    complaints: list[str] = []
    for item in items:
        try:
            engine.encode(item.prompt, chat_template_kwargs=None if request is None else request.chat_template_kwargs)
            fit.append(item)
        except EyasError as error:
            complaints.append(f"line {item.line}: {error}")
    if not fit:
        raise EyasError(f"no prompt fits the target ({complaints[0]})")
    return fit, complaints
