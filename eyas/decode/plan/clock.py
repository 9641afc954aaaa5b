"""The clock of a round: the seconds of the whole round, and of the target's pass alone. A plan owns it, so the round itself reads no time.

Knows time, devices, captured graphs and whether the system took a core away; knows nothing of trees.
"""

from __future__ import annotations

import time
from contextlib import suppress

import torch

from eyas.kernels.captured import Graph, synchronize


class RoundClock:
    """Measures one round after the other: start, begin and end of the pass, stop. A round that had to capture a graph, or in which another
    program took a core, was slower than others will be, so it is left out."""

    began = pass_began = pass_seconds = 0.0
    disturbed = (0, 0)  # graphs captured in this process when the round began, and cores taken away

    def start(self) -> None:
        self.began, self.disturbed = time.perf_counter(), (Graph.made, cores_taken())

    def pass_begins(self) -> None:
        self.pass_began = time.perf_counter()

    def pass_ends(self, device: torch.device) -> None:
        synchronize(device)  # the pass's seconds are a price, so it must be over; what comes next waits for it anyway
        self.pass_seconds = time.perf_counter() - self.pass_began

    def stop(self) -> tuple[float, float] | None:
        """Seconds of the pass and of the round; None for a round that was disturbed."""
        seconds = self.pass_seconds, time.perf_counter() - self.began
        return seconds if self.disturbed == (Graph.made, cores_taken()) else None


def cores_taken() -> int:
    """How often so far the system put a thread of this process aside for another program's; always 0 where it does not say."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return 0
