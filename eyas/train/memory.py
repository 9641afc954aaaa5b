"""How large a batch a card's memory holds, from what whole steps took of it.

Knows bytes and tokens; knows nothing of what a step computes. On a CPU it knows nothing at all: there workers take memory by turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eyas.checks import within_memory
from eyas.decode.memory import free_on


class StepMemory:
    """The most that a token of a batch has taken so far beside what stays between steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.each, self.before = 0.0, 0  # bytes; taken when the last step began

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """A step on a batch of so many tokens. Raises `EyasError` where the memory does not hold it."""
        self.before = begin(self.device)
        with within_memory(lambda: self.way_out(tokens)):
            yield
        self.each = max(self.each, (peak(self.device) - self.before) / tokens)

    def most(self) -> int | None:
        """Tokens of the largest batch that fits; None until a whole step has told."""
        free = free_on(self.device) if self.each else None
        return None if free is None else int((free + taken(self.device) - self.before) / self.each)

    def way_out(self, tokens: int) -> str:
        most = self.most()
        told = "" if most is None else f" (batches of about {min(most, tokens - 1):,} tokens fit)"
        return f"a batch of {tokens:,} tokens is too large; lower --set tokens_per_batch{told}, or take a smaller --draft-vocab"


def begin(device: torch.device) -> int:
    """Begin to look for the peak; returns the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return taken(device)


def taken(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    """The most bytes that were taken since `begin`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
