"""What both trainers' sides share: how long a turn took and what it trained, and what one may choose of speculators.

Imported in speculators' environment too, so it needs the standard library only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

THREADS = 2


@dataclass
class Turn:
    """One pass over the conversations."""

    seconds: float
    cpu_seconds: float  # of all threads, waiting in a spin included
    slots: int
    slot_steps: int
    steps: int


@dataclass(frozen=True)
class Variant:
    """What speculators lets one choose, and what changes its speed here."""

    dtype: str = "float32"
    attention: str = "sdpa"
    optimizer: str = "adamw"
    row: int = 640  # tokens of a packed row
    compiled: bool = False  # as its decorator does where there is CUDA

    @property
    def name(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"{self.dtype}, {self.attention} attention, {self.optimizer}, rows of {self.row}{compiled}"


class Clock:
    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def passed(self) -> tuple[float, float]:
        """Seconds, and seconds of this process on all cores."""
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]
