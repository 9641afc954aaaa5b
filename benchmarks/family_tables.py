"""The tables of docs/family.md, from what `eyas compare --out r.json` wrote.

python benchmarks/family_tables.py [r.json]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import HERE, options, parsed

from eyas.bench.family import COLUMNS, TRAINED_COLUMNS, cells, titled, training_rows

FIGURES = HERE / "results" / "2026-11-26-family"  # those of the page


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def tables(methods: Mapping[str, Any]) -> str:
    figures = table(COLUMNS, (cells(name, told) for name, told in methods.items()))
    return f"{figures}\n\n{table(TRAINED_COLUMNS, training_rows(methods))}"


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("figures", type=Path, nargs="?", default=FIGURES / "full.json")
    given = parsed(parser, words, figures=FIGURES / "quick.json")
    text = "\n".join(f"### {title}\n\n{tables(methods)}\n" for title, methods in titled(json.loads(given.figures.read_text())))
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
