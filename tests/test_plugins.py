"""A plugin is a file under any name that registers what commands then know; whatever is wrong with it is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eyas import cli, plugins
from eyas.bench import peer_worker
from eyas.config import EyasError, Request, TreeShape
from eyas.decode import grow
from eyas.engine import load
from eyas.methods import METHODS, Method, register
from eyas.train.writers import work
from tests.tiny import save_tiny_draft, save_tiny_target


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """What a test's plugins register goes again, and what it writes lies in a place of its own."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(plugins, "LOADED", {})
    for registry in (METHODS, grow.GROWTHS):
        for name in ("mine", "narrow"):
            monkeypatch.setitem(registry, name, None)
            del registry[name]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("def f(:\n    pass\n", ", line 1: invalid syntax"),
        ("import math\n\nmath.nothing\n", ", line 3: AttributeError: module 'math' has no attribute 'nothing'"),
        ("raise RuntimeError('one\\n\\ntwo')", ", line 1: RuntimeError: one two"),
        ("from eyas.methods import Method, register\nregister('medusa', Method('a'))\n", ", line 2: method 'medusa' exists already"),
        ("from eyas.decode import grow\ngrow.register('a b', None)\n", ", line 2: growth 'a b' must be one word"),
        ("x = '\\0'\0", "source code string cannot contain null bytes"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "my idea.py"
    if content is not None:
        path.write_text(content)
    assert cli.main(["plan", "--plugin", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"eyas: plugin {path}") and said in err and err.count("\n") == 1
    assert os.environ[plugins.VARIABLE] == "" and "mine" not in METHODS


def test_a_plugin_is_read_once_however_often_it_is_named(tmp_path):
    path = tmp_path / "counts.py"
    path.write_text("from eyas.methods import Method, register\nregister('mine', Method(__name__))\nlevel = 3\n")
    plugins.load([path, tmp_path / "." / "counts.py"])
    plugins.load_inherited()
    assert METHODS["mine"].decoding().level == 3, "a module that its own name finds"
    assert os.environ[plugins.VARIABLE] == str(path)
    with pytest.raises(EyasError, match="method 'mine' exists already; choose another name"):
        register("mine", Method("other"))


def test_a_method_that_would_not_find_the_draft_it_trains_is_refused():
    with pytest.raises(EyasError, match="method 'mine' trains a draft but decodes with those of 'hydra'; write draft='mine'"):
        register("mine", Method("a", "a", draft="hydra"))
    assert "mine" not in METHODS


def test_a_growth_of_ones_own_grows_the_trees_and_leaves_the_text(tmp_path):
    target = save_tiny_target(tmp_path / "target", num_hidden_layers=7)
    draft = save_tiny_draft(tmp_path / "draft", target, taps=None)
    path = tmp_path / "narrow.py"
    path.write_text(
        "from eyas.decode.grow import register\n"
        "from eyas.decode.tree import Growth\n\n\n"
        "class Narrow(Growth):\n"
        "    def __init__(self, root, shape):\n"
        "        super().__init__(root, shape.top_k)\n\n"
        "    def room(self, node):\n"
        "        return 1 if node else None  # wide at the root alone\n\n\n"
        "register('narrow', Narrow)\n"
    )
    plugins.load([path])
    engine = load(target, draft, precision="fp32")
    seen = []

    def written(tree: str) -> list[int]:
        return engine.generate("hi", Request(tree=tree, method="eagle3", seed=1, max_new_tokens=12, raw=True)).tokens

    def watched(requests, *rest, own=grow.grow_levels):
        seen.extend(trees := own(requests, *rest))
        return trees

    grow.grow_levels, before = watched, grow.grow_levels
    try:
        assert written("9x3x3/narrow") == written("9x3x3")
    finally:
        grow.grow_levels = before
    narrow = seen[0]
    assert len(narrow.children[0]) == 3 and {len(each) for each in narrow.children[1:]} <= {0, 1}
    with pytest.raises(EyasError, match="growth 'wide' is unknown; there are narrow"):
        written("9x3x3/wide")


@pytest.mark.parametrize("before", [["--plugin", "train"], ["--plugin=train"], []])
def test_a_command_line_that_is_told_again_begins_with_its_command(before):
    assert cli.command_first([*before, "train", "--out", "x"]) == ["train", *before, "--out", "x"]


def test_a_shape_with_a_growth_is_read_cut_and_written():
    shape = TreeShape.parse("60x7x10/mine")
    assert (shape.nodes, shape.depth, shape.top_k, shape.growth) == (60, 7, 10, "mine")
    assert str(shape) == "60x7x10/mine" and str(shape.cut(3)) == "60x2x10/mine"
    assert TreeShape.parse("4x2x1/mine").fixed == (), "what a growth makes is not settled beforehand"


class Loaded(Exception):
    pass


CHILDREN = {
    "a command": lambda: cli.main(["plan"]),
    "a writer of text": lambda: work(Path("none"), Path("none"), None, [], 1, frozenset(), 0, 1),
    "a contestant": lambda: peer_worker.eyas({}),
}


@pytest.mark.parametrize("child", CHILDREN)
def test_every_child_process_begins_with_the_plugins_of_its_parent(child, monkeypatch):
    def loaded() -> None:
        raise Loaded

    monkeypatch.setattr(plugins, "load_inherited", loaded)
    with pytest.raises(Loaded):
        CHILDREN[child]()
