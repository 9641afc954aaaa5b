"""docs/data.md says what the code does: its tables are those of the code's own lists, and the causes that it names are the code's words."""

from __future__ import annotations

import re
from pathlib import Path

from tests.page_tables import script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_code_reads():
    made = script("data_tables")
    assert made.written(PAGE) == PAGE, "run: python scripts/data_tables.py"
    assert re.findall(r"<!-- table: (\w+) -->", PAGE) == sorted(made.tables(), key=lambda name: PAGE.index(f"table: {name} "))
    damaged = PAGE.replace("| `function_call`, ", "| ").replace("`observation`", "`seen`")
    assert damaged != PAGE and made.written(damaged) == PAGE


def test_the_causes_that_are_named_are_the_ones_that_are_said():
    sources = " ".join(
        path.read_text(encoding="utf-8") for room in ("files", "train", "commands") for path in (ROOT / "eyas" / room).glob("*.py")
    )
    rows = PAGE.split("| left out, and counted |")[1].split("\n\n")[0].splitlines()[2:]
    causes = [cause for row in rows for cause in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(causes) >= 10
    for cause in causes:
        words = re.sub(
            r"\.\. |a message of role tool", lambda match: "does not show " if match[0] == ".. " else "a message of role ", cause
        )
        assert words in sources, cause
    assert "fields of conversations that are not read" in sources
