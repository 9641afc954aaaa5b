"""eyas: EAGLE-3 speculative decoding, trained, run, measured and understood.

`eyas.load()` puts a target and a draft together; everything heavy is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eyas.config import EyasError, Message, Request, Sampling, TreeShape

if TYPE_CHECKING:
    from eyas.decode.sequence import Result, RoundRecord
    from eyas.engine import Engine, load
    from eyas.formats.portable import Draft

    __version__: str

__all__ = ["Draft", "Engine", "EyasError", "Message", "Request", "Result", "RoundRecord", "Sampling", "TreeShape", "load"]

if not TYPE_CHECKING:  # a type checker shall see the names above and no others
    HEAVY = {
        "load": "eyas.engine",
        "Engine": "eyas.engine",
        "Result": "eyas.decode.sequence",
        "RoundRecord": "eyas.decode.sequence",
        "Draft": "eyas.formats.portable",
    }

    def __getattr__(name: str) -> Any:
        if name in HEAVY:
            from importlib import import_module

            return getattr(import_module(HEAVY[name]), name)
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
