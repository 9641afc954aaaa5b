"""All levels of one sequence's tree as one graph, for networks that guess on from their own output.

fixed.py grows the tree; this module reads its levels, over the slabs of a cache from a pool. Knows a network's step and head, slabs and
what a graph depends on; knows nothing of how a sequence catches up.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import Drawn, grow_fixed, log_scores, tree_of
from eyas.decode.fixed_filters import law_of
from eyas.decode.philox import gumbel_on, wrapped
from eyas.decode.tree import Tree
from eyas.kernels.captured import StaticAttention, fixed_call, window_of
from eyas.model.cache import KVCache, Slabs
from eyas.model.protocols import EagleModule
from eyas.model.vocab import DraftVocab


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
        form, given = self.form(request, cache), numbers_of(request)
        slabs = cache.slabs.of(request.sequence)
        run = partial(form.grow, Draft(self.network, slabs, self.group), self.vocab.vocab_size)
        if (outputs := fixed_call(run, ("growth", form), slabs, *given, a_1H, self.ids_D)) is None:
            return None
        (found,) = outputs
        assert found is not None
        return tree_of(request.root, found)[0]

    def form(self, request: TreeRequest, cache: KVCache) -> Levels:
        """Levels are those of the deepest such tree that was asked for: near a text's end trees get lower round by round, and each would
        need a graph of its own."""
        shape = request.shape
        levels = self.deepest[shape.nodes, shape.top_k] = max(shape.levels, self.deepest.get((shape.nodes, shape.top_k), 0))
        window = window_of(request.position + (levels - 1) * shape.top_k, cache.capacity + 1)
        whole = TreeShape(shape.nodes, levels - 1, shape.top_k)
        return Levels(whole, window, Drawn.of(request))


def numbers_of(request: TreeRequest, *more: int) -> tuple[Tensor, Tensor]:
    """What changes from round to round: int64 [3 + ..] seed, position of the root, levels for which the text has room, and `more`; and how
    tokens are drawn, as `law_of` has it."""
    numbers = torch.tensor([wrapped(request.seed or 0), request.position, request.shape.levels, *more])
    return numbers, law_of(request.sampling)


class Draft(NamedTuple):
    """A network and the slabs with its rows. It holds no cache, or slabs would never be idle once a graph ran over them."""

    network: EagleModule
    slabs: Slabs
    group: int

    def read(self, tokens_R: Tensor, g_RH: Tensor, positions_R: Tensor, places_R: Tensor, seen_RW: Tensor) -> Tensor:
        """The outputs [R, H] of rows that are written at these places of the slabs; those for which there is none go to the spare row."""
        places_R = places_R.clamp(max=self.slabs.keys.shape[3] - 1)
        return self.network.step(tokens_R, g_RH, positions_R, StaticAttention(self.slabs, places_R, seen_RW, group=self.group))


class Levels(NamedTuple):
    """The levels of a growth: all that their graph depends on besides the network and the slabs."""

    shape: TreeShape
    window: int  # keys that are read
    drawn: Drawn

    def grow(self, draft: Draft, vocab_size: int, numbers: Tensor, law_4: Tensor, a_1H: Tensor, ids_D: Tensor) -> tuple[Tensor]:
        """The tree, as `grow_fixed` gives it, from what `numbers_of` gives and the output at the root."""
        seed, position, allowed = numbers.split(1)
        depths_L = 1 + torch.arange(self.shape.levels, device=numbers.device)
        noise_LD = gumbel_on(seed.expand_as(depths_L), position + depths_L, vocab_size)[:, ids_D] if self.drawn.noisy else None
        return (self.tree(draft, a_1H, position, allowed, law_4, noise_LD, ids_D),)

    def tree(
        self,
        draft: Draft,
        a_1H: Tensor,
        position: Tensor,
        allowed: Tensor,
        law_4: Tensor,
        noise_LD: Tensor | None,
        ids_D: Tensor,
    ) -> Tensor:
        """The same, with the noise [levels, D] at hand."""
        count, network, device = self.shape.top_k, draft.network, ids_D.device
        columns_W, width_K = torch.arange(self.window, device=device), torch.arange(count, device=device)
        seen, a = (columns_W < position)[None], a_1H

        def follows(level: int) -> Tensor:
            logits = network.logits_at(level, a)
            return log_scores(logits, self.drawn, law_4, None if noise_LD is None else noise_LD[level])

        def read(level: int, tokens_K: Tensor, rows_K: Tensor) -> Tensor:
            """Each row reads a node's token with its parent's a, and sees the text, its ancestors and itself."""
            nonlocal seen, a
            places_K = position + (level - 1) * count + width_K
            seen = seen[rows_K] | (columns_W == places_K[:, None])
            a = draft.read(tokens_K, network.fed_back(a)[rows_K], (position - 1 + level).expand(count), places_K, seen)
            return follows(level)

        return grow_fixed(self.shape, allowed, follows(0), read, ids_D)
