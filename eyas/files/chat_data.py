"""Chat data as JSONL: one object on each line, and which lines could not be used and why.

Knows lines, and messages in OpenAI's and ShareGPT's form; the caller knows what a line is for (a prompt, a conversation).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from eyas.config import EyasError

CHAT_KEYS = ("messages", "conversations")  # OpenAI's and ShareGPT's
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
T = TypeVar("T")


def read_lines(
    path: str | Path, parse: Callable[[dict[str, Any]], T], what: str, form: str, limit: int | None = None
) -> tuple[list[tuple[int, T]], list[str]]:
    """(line number, parsed object) of up to `limit` usable lines, and a complaint for each line skipped on the way.

    `parse` raises EyasError for an object it cannot use. Raises EyasError if the file cannot be read or no line is usable; `what` (a
    prompt, say) and `form` (how a line is written) are for that message.
    """
    found: list[tuple[int, T]] = []
    complaints: list[str] = []
    for number, line in numbered_lines(path, what):
        if len(found) == limit:
            break
        try:
            found.append((number, parse(object_of(line))))
        except EyasError as error:
            complaints.append(f"line {number}: {error}")
    if not found:
        reason = complaints[0] if complaints else "the file is empty"
        raise EyasError(f"{path}: no {what} could be read ({reason}); write one JSON object a line, say {form}")
    return found, complaints


def numbered_lines(path: str | Path, what: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1. Only "\\n" ends one: splitlines would also cut at U+2028, which JSON allows."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EyasError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of {what}s") from None
    except UnicodeDecodeError as error:
        raise EyasError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def object_of(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EyasError(f"not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(row, dict):
        raise EyasError(f"not a JSON object but a {type(row).__name__}")
    return row


def messages_of(row: dict[str, Any]) -> list[Message] | None:
    """The conversation in a line's object, with OpenAI's names of roles; None where it holds none."""
    key = next((key for key in CHAT_KEYS if row.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(row[key], list):
        raise EyasError(f'"{key}" is not a list')
    if not row[key]:
        raise EyasError(f'"{key}" is empty')
    return [message(turn, number) for number, turn in enumerate(row[key], start=1)]


def message(turn: Any, number: int) -> Message:
    """{"role", "content"} or {"from", "value"} -> {"role", "content"}; `number` counts from 1 and is for the error."""
    if not isinstance(turn, dict):
        raise EyasError(f"message {number} is not a JSON object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise EyasError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise EyasError(f"message {number} has content that is not a string")
    return {"role": ROLES[role], "content": encodable(content, f"message {number}")}


def encodable(text: str, where: str) -> str:
    """The text itself, unless it holds half of a surrogate pair: JSON and a terminal can spell them, no tokenizer can encode them."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise EyasError(f"{where} holds half of a surrogate pair, which is no text; take it out")
    return text
