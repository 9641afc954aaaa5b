"""The trees of heads that all read one state (Medusa), as a part of a round's graph.

No head knows what the others guessed, so what follows the nodes of one level is the same for all of them, and nothing is read. Knows a
network's logits by level; knows nothing of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.captured_growth import Numbers, UnreadRows
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import Drawn, grow_fixed, log_scores
from eyas.kernels.captured import Seats
from eyas.model.cache import KVCache, Slabs
from eyas.model.protocols import DraftModule
from eyas.model.vocab import DraftVocab


class CapturedHeads:
    """What `CapturedGrowth` is for networks that guess on from their own output."""

    def __init__(self, network: DraftModule, vocab: DraftVocab) -> None:
        self.network, self.vocab, self.ids_D, self.levels = network, vocab, vocab.on(network.device), network.levels
        self.again = 0

    def form(self, shape: TreeShape, requests: Sequence[TreeRequest], cache: KVCache) -> Heads:
        return Heads(shape, Drawn.of_all(requests))

    def part(self, slabs: Slabs, seats: Seats) -> DraftModule:
        return self.network


class Heads(NamedTuple):
    """All that a graph depends on besides the network."""

    shape: TreeShape
    drawn: Drawn

    def guess(
        self, network: DraftModule, numbers: Numbers, law_B4: Tensor, unread: UnreadRows, noise_BLD: Tensor | None, ids_D: Tensor
    ) -> Tensor:
        """The trees, as `grow_fixed` gives them, from the one row of each text that was not read."""
        _, states_B1H = unread

        def follows(level: int) -> Tensor:
            logits_B1D = network.logits_at(level, states_B1H[:, 0])[:, None]
            return log_scores(logits_B1D, self.drawn, law_B4, None if noise_BLD is None else noise_BLD[:, level])

        def read(level: int, tokens_BF: Tensor, rows_BF: Tensor) -> Tensor:
            return follows(level).expand(-1, tokens_BF.shape[1], -1)

        return grow_fixed(self.shape, numbers.levels, follows(0), read, ids_D)
