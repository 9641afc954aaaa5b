"""Writes the table of docs/serving.md from the fields that the server checks.

Run: python scripts/serving_tables.py      (tests/serve/test_serving_page.py fails where the page is not what this writes)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from page_tables import filled, table

from eyas.serve.fields import BOTH, FIELDS, Field

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


def takes(field: Field) -> str:
    """What a field takes, in words."""
    schema = field.schema
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = {"number": "a number", "integer": "a whole number"}.get(schema.get("type", ""), "")
    if kind and schema.get("minimum", 0) < -(1 << 31):
        return f"{kind} of 64 bits"
    if kind:
        least = f"above {schema['exclusiveMinimum']:g}" if "exclusiveMinimum" in schema else f"from {schema['minimum']:,}"
        most = schema["maximum"]
        return f"{kind} {least}{'' if most >= 1 << 31 else f' to {most:g}'}"
    return {"string": "a string", "boolean": "true or false", "object": "an object", "array": "a list"}.get(schema.get("type", ""), "")


def default(field: Field) -> str:
    if field.default in (None, ()):
        return ""
    return f"`{json.dumps(field.default)}`"


def rows() -> Iterable[tuple[str, ...]]:
    for field in FIELDS:
        of = "" if field.of == BOTH else f" ({field.of[0]})"
        yield f"`{field.name}`{of}", field.meaning, takes(field), default(field)


def tables() -> dict[str, str]:
    return {"fields": table(("field", "what it says", "takes", "default"), rows())}


def written(page: str) -> str:
    return filled(page, tables())


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
