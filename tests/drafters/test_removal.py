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
import importlib, os, pkgutil, sys
import torch, transformers.models.llama.modeling_llama, transformers.tokenization_utils_fast  # once for all trees

def check(tree, gone):
    os.chdir(tree)
    sys.path.insert(0, tree)
    import eyas
    from eyas.methods import METHODS
    assert eyas.__file__.startswith(tree) and gone not in METHODS
    skipped = ("eyas.formats.openvino_", "eyas.__main__", "eyas.kernels.triton_kernels")  # the last needs Triton
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
    from eyas.commands.parser import parser
    parser()
    assert {row.method for row in chosen_rows(None, False)} == set(METHODS)
    with open(os.path.join(tree, "left"), "w") as file:
        file.write(" ".join(METHODS))

for gone in sys.argv[2:]:
    tree = os.path.join(sys.argv[1], gone)
    if (child := os.fork()) == 0:
        log = os.open(os.path.join(tree, "said"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        try:
            check(tree, gone)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(0)
    os.waitpid(child, 0)
"""
REMOVABLE = [name for name in METHODS if name not in KEPT]


def files_of(name: str) -> set[Path]:
    method = METHODS[name]
    return {Path(*module.split(".")).with_suffix(".py") for module in (method.drafter, method.teaching) if module}


def gone_with(name: str) -> set[str]:
    """Those that decode with its draft go with it."""
    return {each for each in METHODS if each == name or (METHODS[each].draft == name and METHODS[name].teaching)}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    """A copy of the source without each method, every one of them tried in a process of its own."""
    root = tmp_path_factory.mktemp("without")
    for gone in REMOVABLE:
        for folder in ("eyas", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "bundled", "test_*.py", "fixtures")
            shutil.copytree(ROOT / folder, root / gone / folder, ignore=ignored)
        registry = root / gone / "eyas" / "methods.py"
        for name in gone_with(gone):
            for file in files_of(name):
                (root / gone / file).unlink()
            registry.write_text(re.sub(rf'    "{name}": Method\(.*\),\n', "", registry.read_text()))
    environ = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", PROGRAM, str(root), *REMOVABLE], check=True, env=environ)
    return root


@pytest.mark.parametrize("gone", REMOVABLE)
def test_everything_else_works_without_it(gone, trees):
    left = trees / gone / "left"
    assert left.exists(), (trees / gone / "said").read_text()
    assert set(left.read_text().split()) == METHODS.keys() - gone_with(gone)


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
