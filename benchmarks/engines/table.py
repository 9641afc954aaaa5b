"""The table of what engines made of our draft, from the results of their scripts.

    python benchmarks/engines/table.py [FOLDER]      (default: the newest folder of such results)

Knows the results' shape; runs nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from harness import RESULTS, row

HEAD = (
    "| engine | precision | drafted | text equals its plain's | its tau [accepted by position] | ours on its text | "
    "prompts with equal steps | rounds with equal drafts |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else max(RESULTS.glob("*-engines"))
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    print(HEAD)
    for one in told:
        if "theirs" in one:
            print(row(one))
    print("\n| class | prompts, rows | largest difference of logits | trees equal |\n|---|---|---|---|")
    for one in told:
        if "largest_difference_of_logits" in one and "theirs" not in one:
            apart = one["largest_difference_of_logits"]
            apart = max(apart.values()) if isinstance(apart, dict) else apart
            trees = f"{one['trees_equal']} of {one['trees']} ({one['tree']})" if "trees" in one else "-"
            print(f"| {one['engine']} | {one['prompts']}, {one['rows']} | {apart:.1e} | {trees} |")


if __name__ == "__main__":
    main()
