"""Prompts to measure on: JSONL in the forms that benchmarks and chat data come in.

Knows five spellings of a prompt and says which lines it could not use; knows nothing of timing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from eyas.config import EyasError
from eyas.engine import Engine, Prompt

TEXT_KEYS = ("prompt", "question")
CHAT_KEYS = ("messages", "conversations")  # OpenAI's and ShareGPT's
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class PromptItem(NamedTuple):
    line: int  # counted from 1
    prompt: Prompt


def read_prompts(path: str | Path, limit: int | None = None) -> tuple[list[PromptItem], list[str]]:
    """The first `limit` usable prompts and one complaint for each line skipped on the way.

    A line is an object with `turns` (the first is taken), `prompt`, `question`, or `messages` or `conversations` (taken up to the
    first answer). Raises EyasError if the file cannot be read or no line is usable.
    """
    if limit is not None and limit < 1:
        raise EyasError(f"limit must be at least 1, not {limit}")
    items: list[PromptItem] = []
    complaints: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines would also cut at U+2028, which JSON allows
        if len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            items.append(PromptItem(number, prompt_of(line)))
        except EyasError as error:
            complaints.append(f"line {number}: {error}")
    if not items:
        reason = complaints[0] if complaints else "the file is empty"
        raise EyasError(f'{path}: no prompt could be read ({reason}); write one JSON object a line, say {{"prompt": "..."}}')
    return items, complaints


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EyasError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of prompts") from None
    except UnicodeDecodeError as error:
        raise EyasError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None


def prompt_of(line: str) -> Prompt:
    """One line of JSONL -> a prompt, or EyasError that says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EyasError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise EyasError(f"not a JSON object but a {type(row).__name__}")
    if row.get("turns") is not None:
        turns = row["turns"]
        return checked(turns[0] if isinstance(turns, list) and turns else None, "turns")
    for key in TEXT_KEYS:
        if row.get(key) is not None:
            return checked(row[key], key)
    for key in CHAT_KEYS:
        if row.get(key) is not None:
            return opening(row[key], key)
    raise EyasError(f"no prompt in it; expected one of {', '.join(('turns', *TEXT_KEYS, *CHAT_KEYS))}")


def checked(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise EyasError(f'"{where}" holds no text')
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell them, no tokenizer can encode them
        raise EyasError(f'"{where}" holds half of a surrogate pair')
    return text


def opening(turns: Any, key: str) -> list[dict[str, str]]:
    """The messages before the first answer; later turns would need the target's own answers."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise EyasError(f'"{key}" is not a list of objects')
    messages = [message(turn, key) for turn in takewhile(lambda turn: role_of(turn) != "assistant", turns)]
    if not any(message["role"] == "user" for message in messages):
        raise EyasError(f'"{key}" has no user turn before the first answer')
    return messages


def role_of(turn: dict[str, Any]) -> str:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise EyasError(f"the role {role!r} is unknown; known are {', '.join(ROLES)}")
    return ROLES[role]


def message(turn: dict[str, Any], key: str) -> dict[str, str]:
    return {"role": role_of(turn), "content": checked(turn.get("content", turn.get("value")), key)}


def fitting(engine: Engine, items: Sequence[PromptItem]) -> tuple[list[PromptItem], list[str]]:
    """The prompts that this target can read, and complaints about the others (too long, say). Raises if none is left."""
    fit: list[PromptItem] = []
    complaints: list[str] = []
    for item in items:
        try:
            engine.encode(item.prompt)
            fit.append(item)
        except EyasError as error:
            complaints.append(f"line {item.line}: {error}")
    if not fit:
        raise EyasError(f"no prompt fits the target ({complaints[0]})")
    return fit, complaints
