"""What the scripts share that write a page's tables from the code's own lists. Knows pages with marked places; knows no list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def code(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with its tables as they should be."""
    return PLACE.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)
