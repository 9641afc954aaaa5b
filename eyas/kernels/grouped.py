"""Weights of 8 or 4 bits: whole numbers with a scale, and with 4 bits a smallest value, for every 32 inputs of an output.

The formats are GGUF's Q8_0 and Q4_1. A target published in one of them comes back as it was, since a group's least and greatest weight
determine its scale. Knows numbers; native.c multiplies them, or any product with `Grouped.weight`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
MOST = {8: 127, 4: 15}


class Grouped(NamedTuple):
    """A matrix of O outputs and G groups of 32 inputs: w = least + scale * whole."""

    whole: Tensor  # [O, G, 32], int8 with 8 bits, uint8 with 4
    scale: Tensor  # float16 [O, G]
    least: Tensor | None  # float16 [O, G] with 4 bits; None with 8

    @property
    def weight(self) -> Tensor:
        """The matrix itself, float32 [O, I]."""
        values = self.whole.float() * self.scale.float()[..., None]
        return (values if self.least is None else values + self.least.float()[..., None]).flatten(1)


def fits(weight_OI: Tensor) -> bool:
    """Whether the inputs come in whole groups."""
    return weight_OI.shape[1] % GROUP == 0


def grouped(weight_OI: Tensor, bits: int) -> Grouped:
    """The matrix rounded to `bits` bits (8 or 4), group by group."""
    groups, most = weight_OI.float().unflatten(1, (-1, GROUP)), MOST[bits]
    if bits == 8:
        least, scale = None, (groups.abs().amax(-1) / most).half()
        above = groups
    else:
        least = groups.amin(-1).half()
        above = groups - least.float()[..., None]
        scale = (above.amax(-1) / most).half()
    whole = above / scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
    whole = whole.round().clamp(-most if bits == 8 else 0, most)
    return Grouped(whole.to(torch.int8 if bits == 8 else torch.uint8), scale, least)
