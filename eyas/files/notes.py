"""Says on stderr what a user should know of the files that are read, each thing once in a process. Knows no file."""

from __future__ import annotations

import sys
from functools import cache


@cache
def note(text: str) -> None:
    """Print one line on stderr, the first time it is said."""
    print(f"eyas: {text}", file=sys.stderr, flush=True)
