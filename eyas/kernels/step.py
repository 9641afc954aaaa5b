"""A draft's step as one native call: embedding, layer, norm, head, and the best children of each row.

It computes what the network and decode/score.py compute without it, to rounding; a row's result does not depend on the pass's other rows.
Knows packed products, tables and a cache's rows; knows nothing of trees.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import NativeAttention
from eyas.kernels.layer import NativeLayers

if TYPE_CHECKING:
    from eyas.model.transformer import Rotary

MOST = 64  # children of a row that the kernel ranks at most: each that is among the best so far is moved past those below it


class Ranking(NamedTuple):
    """What ranks a row's candidates: its logits, or at a temperature the log of their softmax plus noise."""

    temperature: float = 0.0  # 0: the logits as they are
    noise: Tensor | None = None  # float32 [D]


class Ranked(NamedTuple):
    """R rows' candidates and the best k of each; a candidate's log score is its number in `numbers` less its row's `whole`."""

    numbers: Tensor  # [R, D] log q + noise, or the logits
    whole: list[float]  # R logs of the sum of their exponentials
    scores: list[list[float]]  # R times the k best log scores, best first; of equals the lower id first
    ids: list[list[int]]  # their ids, in the draft's vocabulary

    def of(self, rows: slice) -> Ranked:
        if rows == slice(0, len(self.whole)):
            return self
        return Ranked(self.numbers[rows], self.whole[rows], self.scores[rows], self.ids[rows])


class NativeStep:
    """A network of one layer, its embedding and its head, as the kernel reads them."""

    def __init__(self, layers: NativeLayers, head: native.Packed, table: Tensor, rotary: Rotary) -> None:
        """`table` [V, H]: the embedding, float32 or bfloat16, contiguous."""
        assert layers.norm is not None and layers.norm_weight is not None
        self.layers, self.head, self.table, self.rotary = layers, head, table, rotary
        self.around = native.Around(
            table=table.data_ptr(),
            norm=layers.norm_weight.data_ptr(),
            head=head.matrix,
            wide=table.dtype == torch.float32,
            names=head.outputs,
        )

    @staticmethod
    def reads(table: Tensor, dtype: torch.dtype) -> bool:
        """Whether the kernel can read an embedding, where it runs the layers of a network of this number format."""
        known = table.dtype == dtype and dtype in (torch.float32, torch.bfloat16)
        return known and table.device.type == "cpu" and table.is_contiguous()

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        g: tuple[Tensor, Sequence[int]],
        attention: NativeAttention,
        asked: Sequence[int],
        rankings: Sequence[Ranking],
        best: int,
    ) -> tuple[Tensor, Ranked]:
        """a [N, H] of N rows, and the children of those `asked`, each by its ranking. `g`: float32 [.., H], and which of its rows the N
        rows read; `best`: how many children are wanted."""
        N, asked_of, best = len(tokens), len(asked), min(best, self.head.outputs)
        source, parents = g
        rotation, places = self.rotary.rows(positions)
        numbers = array("q", [*tokens, *parents, *places, *asked])
        heat = array("f", [each.temperature for each in rankings])
        noise = (ctypes.c_void_p * asked_of)(*(None if each.noise is None else each.noise.data_ptr() for each in rankings))
        a, width = torch.empty(N, source.shape[1], dtype=torch.float32, device="cpu"), 16 * self.head.blocks.shape[0]
        every = torch.empty(asked_of, width, dtype=torch.float32, device="cpu")
        found, ids = array("f", bytes(4 * asked_of * (1 + best))), array("q", bytes(8 * asked_of * best))
        around, at = native.Around.from_buffer_copy(self.around), numbers.buffer_info()[0]
        around.origin, around.asked, around.best = source.data_ptr(), asked_of, best
        around.token, around.parent, around.position, around.row = (at + 8 * N * part for part in range(4))
        around.heat, around.noise, around.id = heat.buffer_info()[0], ctypes.addressof(noise), ids.buffer_info()[0]
        around.scores, around.whole = every.data_ptr(), found.buffer_info()[0]
        around.value = found.buffer_info()[0] + 4 * asked_of
        self.layers(a, rotation, attention, around=around, kept=(source, numbers, heat, noise, rankings, every, found, ids))
        values, chosen = found.tolist(), ids.tolist()
        scores = [values[start : start + best] for start in range(asked_of, len(values), best)]
        return a, Ranked(
            every if width == self.head.outputs else every[:, : self.head.outputs],
            values[:asked_of],
            scores,
            [chosen[start : start + best] for start in range(0, len(chosen), best)],
        )
