"""docs/models.md says what the code does: its tables are those of the code's own lists, and what it names is what is tried."""

from __future__ import annotations

import re
from pathlib import Path

from tests.page_tables import script

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_code_reads():
    made = script("model_tables")
    assert made.written(PAGE) == PAGE, "run: python scripts/model_tables.py"
    assert re.findall(r"<!-- table: (\w+) -->", PAGE) == sorted(made.tables(), key=lambda name: PAGE.index(f"table: {name} "))
    damaged = PAGE.replace("`attention_dropout`, ", "").replace("| `qwen3` |", "| `qwen4` |")
    assert damaged != PAGE and made.written(damaged) == PAGE


def test_the_families_that_are_named_are_tried():
    """Each family on our own blocks, and each model that reads images too, by a test that compares it with transformers."""
    from eyas.files.hf_config import SUPPORTED

    same = (ROOT / "tests" / "files" / "test_same_model.py").read_text(encoding="utf-8")
    wild = (ROOT / "tests" / "files" / "test_wild_targets.py").read_text(encoding="utf-8")
    assert all(f'"{kind}"' in same or "for kind in SUPPORTED" in same for kind in SUPPORTED)
    named = re.search(r"read images or sound too \(([^)]*), \.\.\)", PAGE)[1].split(", ")
    makers = re.search(r'parametrize\("make", \[([^]]*)\]\)', wild)[1].split(", ")
    plain = [re.sub(r"\W|_", "", name).lower() for name in named]
    assert plain == [re.sub(r"_", "", maker) for maker in makers]
