"""Pictures as files. Knows matplotlib, which is optional (`pip install 'eyas[bench]'`); what is drawn is the callers'."""

from __future__ import annotations

import importlib.util
from typing import Any


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """matplotlib's, set to draw into files: a machine may have no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
