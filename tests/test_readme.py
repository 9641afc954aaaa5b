"""The README's Python is what a type checker accepts, and a misspelt setting is what it does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright")
ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)

TYPES = """
import eyas
from eyas import Result

model = eyas.load()
one: Result = model.generate("hi", temperature=1.0)
talk: Result = model.generate([{"role": "user", "content": "hi"}], max_new_tokens=8)
turns = [{"role": "user", "content": "hi"}]
again: Result = model.generate(turns)
many: list[Result] = model.generate(["a", "b"], batch=2)
talks: list[Result] = model.generate([turns, turns])
for piece in model.stream("hi", stop="."):
    print(piece if isinstance(piece, str) else piece.tau)
"""

WRONG = {
    'model.generate("hi", temperture=1.0)': "a misspelt setting",
    'model.generate("hi", temperature="hot")': "a setting of another type",
    'model.generate(["a", "b"]).text': "a list taken for one result",
    "eyas.laod()": "a name that there is not",
}


def complaints(program: str, tmp_path: Path) -> list[int]:
    """Lines that pyright finds at fault."""
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1, done.stdout
    return sorted({each["range"]["start"]["line"] for each in found["generalDiagnostics"] if each["severity"] == "error"})


def test_the_readmes_python_and_all_public_calls_pass_a_type_checker(tmp_path):
    assert SNIPPETS, "the README shows Python"
    assert complaints("\n".join([*SNIPPETS, TYPES]), tmp_path) == []


def test_what_is_wrong_is_seen_by_a_type_checker(tmp_path):
    program = "import eyas\nmodel = eyas.load()\n" + "\n".join(WRONG)
    assert complaints(program, tmp_path) == [2 + number for number in range(len(WRONG))], list(WRONG.values())
