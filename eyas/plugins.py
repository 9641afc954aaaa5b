"""A user's own files, read before a command runs: what they register works as if it were part of eyas (`--plugin mine.py`).

A plugin is an ordinary Python file under any name. It may call `eyas.methods.register`, `eyas.train.losses.register` and
`eyas.decode.grow.register`. Child processes load the same files: their paths stand in the environment. Knows files; knows nothing of
what they register.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from eyas.config import EyasError

VARIABLE = "EYAS_PLUGINS"  # paths of plugins, for processes that this one starts
LOADED: dict[Path, ModuleType] = {}


def load(files: Iterable[str | Path]) -> None:
    """Read each file once, and let child processes know of it. Raises `EyasError` with one line that says what is wrong with a file."""
    for file in files:
        path = Path(file).expanduser().resolve()
        if path not in LOADED:
            LOADED[path] = read(path)
            os.environ[VARIABLE] = os.pathsep.join([*inherited(), *([] if str(path) in inherited() else [str(path)])])


def load_inherited() -> None:
    """Load the plugins of the process that started this one."""
    load(inherited())


def inherited() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def read(path: Path) -> ModuleType:
    """The file as a module, under a name that `importlib.import_module` finds it by: its own `__name__`."""
    name = f"eyas_plugin_{len(LOADED)}_{path.stem}"
    try:
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    except OSError as error:
        raise EyasError(f"plugin {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise EyasError(f"plugin {path} is not text in UTF-8") from None
    except (SyntaxError, ValueError) as error:
        at = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise EyasError(f"plugin {path}{at}: {getattr(error, 'msg', error)}") from None
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        said = str(error) if isinstance(error, EyasError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise EyasError(f"plugin {path}, line {lines[-1] if lines else 1}: {said}") from None
    return module
