"""The tables of docs/family.md, from what `eyas compare --out r.json` wrote.

python benchmarks/family_tables.py r.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eyas.bench.family import COLUMNS, TRAINED_COLUMNS, cells, titled, training_rows


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def tables(methods: Mapping[str, Any]) -> str:
    figures = table(COLUMNS, (cells(name, told) for name, told in methods.items()))
    return f"{figures}\n\n{table(TRAINED_COLUMNS, training_rows(methods))}"


if __name__ == "__main__":
    result = json.loads(Path(sys.argv[1]).read_text())
    for title, methods in titled(result):
        print(f"### {title}\n\n{tables(methods)}\n")
