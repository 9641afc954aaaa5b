"""The clock of a round: the seconds of the whole round, and of the target's pass alone. A plan owns it, so the round itself reads no time.

Knows time, devices, captured graphs and how often the system takes a core away; knows nothing of trees.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from eyas.kernels.captured import Graph, synchronize

TOLERATED = 1.5  # times as often as usual a core may be taken away in a round that counts
USUAL_WEIGHT = 0.05  # weight of a round in what is usual


@dataclass
class Disturbances:
    """How often a process usually loses a core to another program. Some machines take none in a hundred rounds; on others no round of many
    sequences keeps its cores to itself, and leaving all of them out would teach nothing."""

    usual: float = 0.0  # cores taken a second, older rounds fading

    def more_than_usual(self, taken: int, seconds: float) -> bool:
        """Whether a round of so many seconds lost clearly more cores than rounds do, which it is counted among."""
        more = taken > TOLERATED * self.usual * seconds
        self.usual += USUAL_WEIGHT * (taken / max(seconds, 1e-9) - self.usual)
        return more


class RoundClock:
    """Measures one round after the other: start, begin and end of the pass, stop. A round that had to capture a graph, or in which other
    programs took cores oftener than they do, was slower than others will be, so it is left out."""

    began = pass_began = pass_seconds = 0.0
    graphs = taken = 0  # graphs captured in this process when the round began, and cores taken away
    disturbances = Disturbances()  # the process's

    def start(self) -> None:
        self.began, self.graphs, self.taken = time.perf_counter(), Graph.made, cores_taken()

    def pass_begins(self) -> None:
        self.pass_began = time.perf_counter()

    def pass_ends(self, device: torch.device) -> None:
        synchronize(device)  # the pass's seconds are a price, so it must be over; what comes next waits for it anyway
        self.pass_seconds = time.perf_counter() - self.pass_began

    def stop(self) -> tuple[float, float] | None:
        """Seconds of the pass and of the round; None for a round that was disturbed."""
        seconds = time.perf_counter() - self.began
        disturbed = self.disturbances.more_than_usual(cores_taken() - self.taken, seconds)
        return None if disturbed or Graph.made > self.graphs else (self.pass_seconds, seconds)


def cores_taken() -> int:
    """How often so far the system put a thread of this process aside for another program's; always 0 where it does not say."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return 0
