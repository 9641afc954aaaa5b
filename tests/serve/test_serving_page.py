"""docs/serving.md says what the server takes: its table is the one that checks."""

from __future__ import annotations

from pathlib import Path

from eyas.commands.parser import parser
from tests.page_tables import script

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_server_checks():
    made = script("serving_tables")
    assert made.written(PAGE) == PAGE, "run: python scripts/serving_tables.py"


def test_the_numbers_are_the_commands_own():
    usual = parser().parse_args(["serve"])
    for told in (
        f"`--slots` ({usual.slots})",
        f"`--queue` ({usual.queue})",
        f"`--stall` ({usual.stall} s)",
        f"`--drain` ({usual.drain:g} s)",
    ):
        assert told in PAGE.replace("\n", " ")
