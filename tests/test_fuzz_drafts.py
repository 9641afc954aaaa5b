"""A short run of the campaign that damages drafts: tests/fuzz_drafts.py runs a thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_damaged_drafts_give_one_line_run_nothing_and_leave_what_was_there(tmp_path):
    out = tmp_path / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_drafts", "--cases", "80", "--seed", "7", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = json.loads(out.read_text())
    assert told["wrong"] == [] and done.returncode == 0, done.stderr[-2000:]
    ended = {kind: sum(count.get(kind, 0) for count in told["counts"].values()) for kind in ("refused", "read")}
    assert sum(ended.values()) == 80 and ended["refused"] > 40 and ended["read"] > 5, "damages that do nothing would prove nothing"
