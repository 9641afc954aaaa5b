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
UnreadRows = tuple[Tensor, Tensor]  # tokens [B, C] and features [B, C, F] of text that a draft has not read


class CapturedGrowth:
    """Grows trees with a network, each with all its levels in one call of a graph."""

    def __init__(self, network: EagleModule, vocab: DraftVocab, group: int) -> None:
        """`group`: query heads for each key head."""
        self.network, self.vocab, self.group, self.levels = network, vocab, group, network.levels
        self.ids_D, self.again = vocab.on(network.device), 0

    def grow(self, request: TreeRequest, a_1H: Tensor, cache: KVCache) -> Tree | None:
        """The tree that `grow.grow` gives, from the output at its root. Its rows are written behind the text's and never kept. None where
        it cannot be captured."""
        form, slabs = self.form(request.whole, [request], cache), cache.slabs.of(request.sequence)
        given = numbers_of(request), law_of(request.sampling)
        run = partial(form.grow, self.part(slabs, ALONE), self.vocab.vocab_size)
        inputs = (*(each[None] for each in given), a_1H[None], self.ids_D)
        if (outputs := fixed_call(run, ("growth", form), slabs, *inputs)) is None:
            return None
        (found,) = outputs
        assert found is not None
        return tree_of(request.root, found[0])[0]

    def form(self, shape: TreeShape, requests: Sequence[TreeRequest], cache: KVCache) -> Levels:
        """The form of trees of this shape, whatever room the texts have: near their end a number rules deeper levels out, as a lower tree
        would need a graph of its own."""
        read = sum(map(bool, shape.counts[1:])) if shape.counts else (shape.levels - 1) * shape.top_k
        furthest = max(request.position for request in requests) + read
        return Levels(shape, window_of(furthest, cache.capacity + 1), Drawn.of_all(requests))

    def part(self, slabs: Slabs, seats: Seats) -> Draft:
        return Draft(self.network, slabs, self.group, seats)


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

    @property
    def last(self) -> Tensor:
        """The last of the unread rows, whose token is the root."""
        return (self.unread - 1).clamp(min=0)

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
    seats: Seats

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

    def guess(self, draft: Draft, numbers: Numbers, law_B4: Tensor, unread: UnreadRows, noise_BLD: Tensor | None, ids_D: Tensor) -> Tensor:
        """The same for texts of which some rows are to be read first."""
        a_BCH = catch_up(draft, self.window, numbers, *unread)
        return self.trees(draft, picked(a_BCH, numbers.last), numbers, law_B4, noise_BLD, ids_D)

    def trees(self, draft: Draft, a_B1H: Tensor, numbers: Numbers, law_B4: Tensor, noise_BLD: Tensor | None, ids_D: Tensor) -> Tensor:
        """The same, with the noise [B, levels, D] at hand."""
        columns_W, network = torch.arange(self.window, device=ids_D.device), draft.network
        seen, a, made = (columns_W < numbers.position)[:, None], a_B1H, 0

        def follows(level: int) -> Tensor:
            logits = network.logits_at(level, a.flatten(0, 1)).unflatten(0, a.shape[:2])
            return log_scores(logits, self.drawn, law_B4, None if noise_BLD is None else noise_BLD[:, level])

        def read(level: int, tokens_BF: Tensor, rows_BF: Tensor) -> Tensor:
            """Each row reads a node's token with its parent's a, and sees the text, its ancestors and itself."""
            nonlocal seen, a, made
            behind_F = made + torch.arange(tokens_BF.shape[1], device=ids_D.device)
            made += tokens_BF.shape[1]
            seen = picked(seen, rows_BF) | (columns_W == (numbers.position + behind_F)[..., None])
            positions_BF = (numbers.position - 1 + level).expand_as(tokens_BF)
            g = picked(network.fed_back(a.flatten(0, 1)).unflatten(0, a.shape[:2]), rows_BF)
            a = draft.read(numbers, tokens_BF, g, positions_BF, numbers.places(behind_F, draft.slabs), seen)
            return follows(level)

        return grow_fixed(self.shape, numbers.levels, follows(0), read, ids_D)


def catch_up(draft: Draft, window: int, numbers: Numbers, tokens_BC: Tensor, features_BCF: Tensor) -> Tensor:
    """The draft's outputs [B, C, H] at the unread rows of text, which end before the roots. The rows behind them go to the spare one."""
    order_C, columns_W = (torch.arange(size, device=tokens_BC.device) for size in (tokens_BC.shape[1], window))
    positions_BC = numbers.position - numbers.unread + order_C
    places_BC = positions_BC.masked_fill(order_C >= numbers.unread, draft.slabs.keys.shape[3] - 1)
    seen = columns_W <= positions_BC[..., None]
    g = draft.network.fuse(features_BCF.flatten(0, 1).to(draft.network.dtype)).unflatten(0, tokens_BC.shape)
    return draft.read(numbers, tokens_BC, g, positions_BC, places_BC, seen)
