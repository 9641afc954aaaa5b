"""Writes the tables of docs/data.md from the lists by which data is read, so that the page says what the code does.

Run: python scripts/data_tables.py      (tests/files/test_data_page.py fails where the page is not what this writes)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from page_tables import code, filled, table

from eyas.files import chat_data, records

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def coded(text: str) -> str:
    """Field names, divided by commas, as code."""
    return code(text.split(", "))


def forms() -> Iterable[tuple[str, ...]]:
    fields = sorted({*chat_data.CHAT_KEYS, *chat_data.QUESTIONS, *chat_data.ANSWERS, *chat_data.CONTEXTS, "instruction", "history"})
    words = re.compile(rf"\b({'|'.join(fields)})\b")
    for form in chat_data.FORMS:
        yield form.name, words.sub(r"`\1`", form.keys), form.becomes
    name, key, becomes = chat_data.TEXT_FORM
    yield name, f"`{key}`", becomes


def roles() -> Iterable[tuple[str, ...]]:
    for role in dict.fromkeys(chat_data.ROLES.values()):
        yield f"`{role}`", code(name for name, ours in chat_data.ROLES.items() if ours == role)


def starts() -> Iterable[tuple[str, ...]]:
    for reason in dict.fromkeys(records.REFUSED_STARTS.values()):
        yield code(start.hex(" ") for start, told in records.REFUSED_STARTS.items() if told == reason), reason


def refused() -> Iterable[tuple[str, ...]]:
    for reason in dict.fromkeys(chat_data.REFUSED_KEYS.values()):
        yield code(key for key, told in chat_data.REFUSED_KEYS.items() if told == reason), reason


def tables() -> dict[str, str]:
    return {
        "files": table(("file", "begins with", "counted by"), ((kind, *told) for kind, told in records.KINDS.items())),
        "starts": table(("first bytes", "refused as"), starts()),
        "forms": table(("form", "told apart by", "becomes"), forms()),
        "row": table(("beside the turns", "is"), ((coded(keys), told) for keys, told in chat_data.ROW_FIELDS.items())),
        "message": table(("of a message", "is"), ((coded(keys), told) for keys, told in chat_data.MESSAGE_FIELDS.items())),
        "roles": table(("role", "spelled"), roles()),
        "refused": table(("field", "refused as"), refused()),
        "ignored": table(
            ("where", "fields that are known to change nothing"),
            (("beside the turns", code(chat_data.IGNORED_KEYS)), ("of a message", code(chat_data.IGNORED_MESSAGE_KEYS))),
        ),
    }


def written(page: str) -> str:
    """The page with its tables as they should be."""
    return filled(page, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
