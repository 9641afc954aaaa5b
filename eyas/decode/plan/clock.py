"""The clock of a round: the seconds of the whole round, and of the target's pass alone. A plan owns it, so the round itself reads no time.

Knows time, devices and captured graphs; knows nothing of trees.
"""

from __future__ import annotations

import time

import torch

from eyas.kernels.captured import Graph, synchronize


class RoundClock:
    """Measures one round after the other: start, begin and end of the pass, stop. A round that had to capture a graph was slower than
    others will be, so it is left out."""

    began = pass_began = pass_seconds = 0.0
    graphs = 0  # graphs captured in this process when the round began

    def start(self) -> None:
        self.began, self.graphs = time.perf_counter(), Graph.made

    def pass_begins(self) -> None:
        self.pass_began = time.perf_counter()

    def pass_ends(self, device: torch.device) -> None:
        synchronize(device)  # the pass's seconds are a price, so it must be over; what comes next waits for it anyway
        self.pass_seconds = time.perf_counter() - self.pass_began

    def stop(self) -> tuple[float, float] | None:
        """Seconds of the pass and of the round; None for a round that captured a graph."""
        return (self.pass_seconds, time.perf_counter() - self.began) if Graph.made == self.graphs else None
