"""A method is its files and its line: without them everything else works as before, and nothing else names it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eyas.methods import METHODS
from tests.commands.words import environment

ROOT = Path(__file__).parents[2]
KEPT = ("eagle3", "plain")  # what the project is for, and what everything is compared with

PROGRAM = """
import importlib, pkgutil, sys
import eyas
from eyas.methods import METHODS
assert {gone!r} not in METHODS
skipped = ("eyas.formats.openvino_", "eyas.__main__")
for module in pkgutil.walk_packages(eyas.__path__, "eyas."):
    if not module.name.startswith(skipped):
        importlib.import_module(module.name)
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from tests.tiny import tiny_target
from tests.tiny_family import makers
def said(drafter, shape):
    *_, texts = Decoder(tiny_target(), drafter).run([[3, 14, 15, 9]], shape, Sampling(1.0), [0], 12)
    return texts[0].tokens
for name, make in makers().items():
    assert said(make(), TreeShape.parse("chain:3")) == said(None, PLAIN), name
from eyas.bench.family import chosen_rows
from eyas.cli import parser
parser()
assert {{row.method for row in chosen_rows(None, False)}} == set(METHODS)
print(*METHODS)
"""


def files_of(name: str) -> set[Path]:
    method = METHODS[name]
    return {Path(*module.split(".")).with_suffix(".py") for module in (method.drafter, method.teaching) if module}


@pytest.mark.parametrize("gone", [name for name in METHODS if name not in KEPT])
def test_everything_else_works_without_it(gone, tmp_path):
    """Those that decode with its draft, or in whose tree it guesses, go with it."""
    shutil.copytree(ROOT / "eyas", tmp_path / "eyas", ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    with_it = {name for name in METHODS if name == gone or (METHODS[name].draft == gone and METHODS[gone].teaching)}
    with_it |= {"eagle3-lookup"} if gone == "lookup" else set()
    registry = tmp_path / "eyas" / "methods.py"
    for name in with_it:
        for file in files_of(name):
            (tmp_path / file).unlink()
        registry.write_text(re.sub(rf'    "{name}": Method\(.*\),\n', "", registry.read_text()))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(gone=gone)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment() | {"PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == METHODS.keys() - with_it


def code_lines(path: Path) -> int:
    """Lines of code, without docstrings, comments and imports."""
    text = path.read_text(encoding="utf-8")
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            told |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and number not in told for number, line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_at_most_150_lines_of_code(name):
    assert sum(code_lines(ROOT / file) for file in files_of(name)) <= 150
