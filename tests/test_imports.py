"""Imports point one way, the two purest modules stay pure, and importing eyas is quick because it imports little."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # each uses those above it and its own; those of one line do not use each other
    ("checks",),
    ("http_json",),
    ("launched",),
    ("tree_shape",),
    ("config",),
    ("methods", "plugins", "reference"),
    ("kernels",),
    ("model",),
    ("files",),
    ("parallel",),
    ("decode",),
    ("drafters",),
    ("engine",),
    ("train",),
    ("measure",),
    ("formats",),
    ("view",),
    ("bench", "diagnose", "serve"),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
]
PLACE = {name: place for place, names in enumerate(ROOMS) for name in names}


@cache
def modules() -> list[Path]:
    return sorted((ROOT / "eyas").rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "eyas").with_suffix("").parts
    return parts[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, inside functions too; not what only type checkers read."""
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            yield from (f"eyas.{alias.name}" for alias in node.names) if node.module == "eyas" else [node.module]
        else:
            waiting += ast.iter_child_nodes(node)


def own(path: Path) -> set[str]:
    """Rooms of eyas that a module imports from."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("eyas.")}
    return {name for name in found if name in PLACE or (ROOT / "eyas" / name).exists() or (ROOT / "eyas" / f"{name}.py").exists()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert room(path) in PLACE, f"give {room(path)} a place among the ROOMS"
    wrong = [name for name in own(path) - {room(path)} if name not in PLACE or PLACE[name] >= PLACE[room(path)]]
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}, which do not lie below it"


def name_of(path: Path) -> str:
    """A module's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(path: Path, known: set[str]) -> set[str]:
    """Modules of eyas that a module imports, the attribute of a `from` import taken off; its own packages aside."""
    found = {name for name in imported(path) if name in known}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("eyas"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known
    return {name for name in found if name_of(path) != name and not name_of(path).startswith(f"{name}.")}


def test_no_circle_of_files():
    """Not even one that runs through an import inside a function."""
    known = {name_of(path) for path in modules()}
    arrows = {name_of(path): modules_imported(path, known) for path in modules()}
    while leaves := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"among these lies a circle: {', '.join(sorted(arrows))}"


NEWER = {  # than Python 3.10, by where it would be imported from
    "asyncio": {"Runner", "TaskGroup", "timeout"},
    "contextlib": {"chdir"},
    "datetime": {"UTC"},
    "enum": {"EnumCheck", "ReprEnum", "StrEnum", "member", "nonmember", "verify"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "fma", "sumprod"},
    "operator": {"call"},
    "typing": {
        *("Buffer", "LiteralString", "Never", "NoDefault", "NotRequired", "ReadOnly", "Required", "Self", "TypeAliasType", "TypeIs"),
        *("TypeVarTuple", "Unpack", "assert_never", "assert_type", "clear_overloads", "dataclass_transform", "get_overloads"),
        *("get_protocol_members", "is_protocol", "override", "reveal_type"),
    },
}
NEWER_MODULES = {"tomllib", "annotationlib", "concurrent.interpreters", "compression.zstd"}
NEWER_BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError"}


def newer_names(text: str) -> list[str]:
    """What a module needs that Python 3.10 lacks; what only type checkers read does not count."""
    found, waiting = [], [ast.parse(text, feature_version=(3, 10))]  # refuses `except*`, `type X = ..` and type parameters
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in NEWER_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in NEWER.get(node.module or "", ())]
            found += [node.module] if node.module in NEWER_MODULES else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [ast.unparse(node)] if node.attr in NEWER.get(node.value.id, ()) else []
        elif isinstance(node, ast.Name) and node.id in NEWER_BUILTINS:
            found.append(node.id)
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_needs_a_newer_python_than_is_promised(path):
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(), "NEWER is what 3.10 lacks"
    assert newer_names(path.read_text(encoding="utf-8")) == []


def test_a_newer_python_would_be_seen():
    text = "from typing import Any, Self\nimport tomllib, enum\nclass A(enum.StrEnum): ..."
    assert sorted(newer_names(text)) == ["enum.StrEnum", "tomllib", "typing.Self"]
    with pytest.raises(SyntaxError):
        newer_names("try: pass\nexcept* ValueError: pass")
    assert newer_names("if TYPE_CHECKING:\n    from typing import Self\n") == []


def named_files() -> set[str]:
    """Files that the architecture page has a line for; of `a/b.py`, `c.py` in one row the second lies beside the first."""
    found: set[str] = set()
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (`[^|]*) \|", page.split("## One line a file")[1], re.M):
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            folder = f"{name.rpartition('/')[0]}/" if "/" in name else folder
            found.add(name if "/" in name else folder + name)
    return found


def test_the_architecture_page_names_the_files_there_are():
    """Each with its line, and none that is not there; of `commands/` each file is a command."""
    kinds = (".py", ".c", ".h")
    there = {path.relative_to(ROOT / "eyas").as_posix() for path in (ROOT / "eyas").rglob("*") if path.suffix in kinds}
    there = {name for name in there if not name.endswith("__init__.py") and not name.startswith("commands/")}
    assert named_files() - {"commands/"} == there


def test_tree_and_verify_know_no_model():
    allowed = {"numpy", "torch", *sys.stdlib_module_names}
    for name in ("tree.py", "verify.py"):
        for module in imported(ROOT / "eyas" / "decode" / name):
            assert module.startswith(("eyas.decode.", "eyas.config")) or module.split(".")[0] in allowed, f"{name} imports {module}"


def test_decode_knows_no_drafter():
    for path in (ROOT / "eyas" / "decode").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("eyas.drafters")]


def test_the_reference_knows_only_the_config():
    assert own(ROOT / "eyas" / "reference.py") <= {"checks", "tree_shape", "config"}


def test_import_eyas_and_its_command_line_import_no_torch():
    program = "import eyas, eyas.cli, sys; eyas.cli.parser(); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_load_stays_a_function_whatever_was_imported_before():
    code = "import eyas; import eyas.engine; assert callable(eyas.load) and callable(eyas.load)"
    subprocess.run([sys.executable, "-c", code], check=True)
