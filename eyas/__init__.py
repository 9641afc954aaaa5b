"""eyas: EAGLE-3 speculative decoding, trained, run, measured and understood.

`eyas.load()` puts a target and a draft together; everything heavy is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eyas.config import EyasError, Sampling, TreeShape

if TYPE_CHECKING:
    from eyas.engine import load

    __version__: str

__all__ = ["EyasError", "Sampling", "TreeShape", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from eyas.engine import load

        return load
    if name == "__version__":
        return installed_version()
    raise AttributeError(f"module 'eyas' has no attribute {name!r}")


def installed_version() -> str:
    """What the installed package says of itself: pyproject.toml holds the version, and nothing else does."""
    from importlib import metadata

    try:
        return metadata.version("eyas")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a source tree that is not installed
