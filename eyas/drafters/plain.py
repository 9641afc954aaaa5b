"""Plain decoding as a method: nothing is guessed, every round brings one token."""

from __future__ import annotations

from eyas.decode.drafter import NoDrafter
from eyas.model.target import Target


def alone(target: Target) -> NoDrafter:
    return NoDrafter()
