"""All levels of the trees of some sequences as one graph, for networks that guess on from their own output.

fixed.py grows the trees; this module reads their levels, over the slabs of a cache from a pool. Knows a network's step and head, slabs and
what a graph depends on; knows nothing of how a sequence catches up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import Drawn, grow_fixed, log_scores, picked, tree_of
from eyas.decode.fixed_filters import law_of
from eyas.decode.philox import gumbel_on, wrapped
from eyas.decode.tree import Tree
from eyas.kernels.captured import Seats, fixed_call, window_of
from eyas.model.cache import KVCache, Slabs
from eyas.model.protocols import EagleModule
from eyas.model.vocab import DraftVocab

ALONE = Seats(1, scattered=False)


class CapturedGrowth:
    """Grows trees with a network, each with all its levels in one call of a graph."""

    def __init__(self, network: EagleModule, vocab: DraftVocab, group: int) -> None:
        """`group`: query heads for each key head."""
        self.network, self.vocab, self.group = network, vocab, group
        self.ids_D = vocab.on(network.device)
        self.deepest: dict[tuple[int, int], int] = {}  # by nodes and children of a node: levels of the deepest tree that was asked for

    def grow(self, request: TreeRequest, a_1H: Tensor, cache: KVCache) -> Tree | None:
        """The tree that `grow.grow` gives, from the output at its root. Its rows are written behind the text's and never kept. None where
        it cannot be captured."""
        form, slabs = self.form(request.shape, [request], cache), cache.slabs.of(request.sequence)
        given = numbers_of(request), law_of(request.sampling)
        run = partial(form.grow, Draft(self.network, slabs, self.group), self.vocab.vocab_size)
        inputs = (*(each[None] for each in given), a_1H[None], self.ids_D)
        if (outputs := fixed_call(run, ("growth", form), slabs, *inputs)) is None:
            return None
        (found,) = outputs
        assert found is not None
        return tree_of(request.root, found[0])[0]

    def form(self, shape: TreeShape, requests: Sequence[TreeRequest], cache: KVCache) -> Levels:
        """Levels are those of the deepest tree of so many nodes that was asked for: near a text's end trees get lower round by round, and
        each would need a graph of its own."""
        kind = shape.nodes, shape.top_k
        levels = self.deepest[kind] = max(shape.levels, self.deepest.get(kind, 0))
        window = window_of(max(request.position for request in requests) + (levels - 1) * shape.top_k, cache.capacity + 1)
        return Levels(TreeShape(shape.nodes, levels - 1, shape.top_k), window, Drawn.of(requests[0]))


def numbers_of(request: TreeRequest, unread: int = 1, slot: int = 0) -> Tensor:
    """What changes from round to round, int64 [5], as `Numbers` names it."""
    return torch.tensor([wrapped(request.seed or 0), request.position, request.shape.levels, unread, slot])


class Numbers(NamedTuple):
    """What changes from round to round, for each of B sequences, int64 [B, 1]."""

    seed: Tensor
    position: Tensor  # of the root
    levels: Tensor  # for which the text has room
    unread: Tensor  # rows of text that the draft reads; 0: this is no sequence, and its rows pad
    slot: Tensor

    @classmethod
    def of(cls, numbers_B5: Tensor) -> Numbers:
        return cls(*numbers_B5.split(1, 1))

    def places(self, behind: Tensor, slabs: Slabs) -> Tensor:
        """Where rows go that lie so far `behind` the roots: indices of their slots. Those for which there is none go to the spare row."""
        spare = slabs.keys.shape[3] - 1
        return (self.position + behind).clamp(max=spare).masked_fill(self.unread == 0, spare)

    def noise(self, depths: Tensor, vocab_size: int) -> Tensor:
        """The noise [B, C, V] of the positions that lie C depths behind the roots."""
        positions = self.position + depths
        return gumbel_on(self.seed.expand_as(positions).flatten(), positions.flatten(), vocab_size).unflatten(0, positions.shape)


class Draft(NamedTuple):
    """A network and the slabs with its rows. It holds no cache, or slabs would never be idle once a graph ran over them."""

    network: EagleModule
    slabs: Slabs
    group: int
    seats: Seats = ALONE

    def read(self, numbers: Numbers, tokens_BR: Tensor, g_BRH: Tensor, positions_BR: Tensor, places_BR: Tensor, seen_BRW: Tensor) -> Tensor:
        """The outputs [B, R, H] of rows that are written at these places of their slots."""
        attention = self.seats.attention(self.slabs, numbers.slot[:, 0], places_BR, seen_BRW, self.group)
        a = self.network.step(tokens_BR.flatten(), g_BRH.flatten(0, 1), positions_BR.flatten(), attention)
        return a.unflatten(0, tokens_BR.shape)


class Levels(NamedTuple):
    """The levels of growths: all that their graph depends on besides the network and the slabs."""

    shape: TreeShape
    window: int  # keys that are read
    drawn: Drawn

    def grow(self, draft: Draft, vocab_size: int, numbers_B5: Tensor, law_B4: Tensor, a_B1H: Tensor, ids_D: Tensor) -> tuple[Tensor]:
        """The trees, as `grow_fixed` gives them, from what `numbers_of` gives and the outputs at the roots."""
        numbers, depths_L = Numbers.of(numbers_B5), 1 + torch.arange(self.shape.levels, device=numbers_B5.device)
        noise_BLD = numbers.noise(depths_L, vocab_size)[..., ids_D] if self.drawn.noisy else None
        return (self.trees(draft, a_B1H, numbers, law_B4, noise_BLD, ids_D),)

    def trees(self, draft: Draft, a_B1H: Tensor, numbers: Numbers, law_B4: Tensor, noise_BLD: Tensor | None, ids_D: Tensor) -> Tensor:
        """The same, with the noise [B, levels, D] at hand."""
        count, network, device = self.shape.top_k, draft.network, ids_D.device
        columns_W, width_K = torch.arange(self.window, device=device), torch.arange(count, device=device)
        seen, a = (columns_W < numbers.position)[:, None], a_B1H

        def follows(level: int) -> Tensor:
            logits = network.logits_at(level, a.flatten(0, 1)).unflatten(0, a.shape[:2])
            return log_scores(logits, self.drawn, law_B4, None if noise_BLD is None else noise_BLD[:, level])

        def read(level: int, tokens_BK: Tensor, rows_BK: Tensor) -> Tensor:
            """Each row reads a node's token with its parent's a, and sees the text, its ancestors and itself."""
            nonlocal seen, a
            behind_K = (level - 1) * count + width_K
            seen = picked(seen, rows_BK) | (columns_W == (numbers.position + behind_K)[..., None])
            positions_BK = (numbers.position - 1 + level).expand_as(tokens_BK)
            g = picked(network.fed_back(a.flatten(0, 1)).unflatten(0, a.shape[:2]), rows_BK)
            a = draft.read(numbers, tokens_BK, g, positions_BK, numbers.places(behind_K, draft.slabs), seen)
            return follows(level)

        return grow_fixed(self.shape, numbers.levels, follows(0), read, ids_D)
