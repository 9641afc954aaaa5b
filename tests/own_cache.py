"""A cache of a test's own, in which the compiled kernel alone is everyone's: to compile it takes longer than most tests.

Knows where the kernel lies; imported before any test sets EYAS_CACHE.
"""

from __future__ import annotations

from pathlib import Path

from eyas.config import cache_dir

KERNELS = cache_dir().absolute() / "native"


def own_cache(root: Path) -> str:
    """Make it there; for EYAS_CACHE."""
    KERNELS.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    (root / "native").symlink_to(KERNELS)
    return str(root)
