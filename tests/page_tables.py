"""The scripts that write a page's tables, for the tests that compare page and code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = str(Path(__file__).parents[1] / "scripts")


def script(name: str) -> ModuleType:
    """A script as a module; it imports what it shares with others by its bare name, as it does when it is run."""
    if SCRIPTS not in sys.path:
        sys.path.append(SCRIPTS)
    return importlib.import_module(name)
