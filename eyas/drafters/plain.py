"""Plain decoding as a method: it guesses nothing, and every round brings one token."""

from __future__ import annotations

from eyas.decode.drafter import NoDrafter
from eyas.model.protocols import TargetModel


def alone(target: TargetModel) -> NoDrafter:
    return NoDrafter()
