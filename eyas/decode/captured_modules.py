"""The trees of modules that each guess one token further (multi-token prediction), as a part of a round's graph.

Module d reads a node at depth d, its path's rows anew behind its rows of the text, as `MtpDrafter.read_level` does. What a module made of a
text's end is kept by nobody: the last rows of the text are read anew in each round, so all modules begin at the same row, and a graph
depends on no round before. Knows a network's modules by level, and the slabs whose layers hold their keys; knows no files, and nothing of
how a long text is caught up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.captured_growth import Numbers, UnreadRows
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import Drawn, grow_fixed, log_scores, picked
from eyas.kernels.attention import PassAttention
from eyas.kernels.captured import Seats, window_of
from eyas.model.cache import KVCache, Slabs
from eyas.model.protocols import DraftModule
from eyas.model.vocab import DraftVocab


class Stacked(DraftModule, Protocol):
    """A network with a module for each level, which reads what the one before made."""

    @property
    def levels(self) -> int: ...

    def step(self, level: int, tokens_N: Tensor, h_NH: Tensor, positions_N: Tensor, attention: PassAttention, /) -> Tensor:
        """What module `level` makes [N, H] of states and the tokens that followed them."""
        ...


class CapturedModules:
    """What `CapturedGrowth` is for networks that guess on from their own output."""

    def __init__(self, network: Stacked, vocab: DraftVocab, group: int) -> None:
        """`group`: query heads for each key head."""
        self.network, self.vocab, self.group, self.levels = network, vocab, group, network.levels
        self.ids_D, self.again = vocab.on(network.device), max(network.levels - 1, 1)

    def form(self, shape: TreeShape, requests: Sequence[TreeRequest], cache: KVCache) -> Modules:
        widest = sum(map(bool, shape.counts)) if shape.counts else shape.top_k  # nodes of a level that are read
        furthest = max(request.position for request in requests) + widest * (self.levels - 1)
        return Modules(shape, window_of(furthest, cache.capacity + 1), Drawn.of_all(requests))

    def part(self, slabs: Slabs, seats: Seats) -> Stack:
        return Stack(self.network, slabs, self.group, seats)


class Stack(NamedTuple):
    """A network and the slabs with its rows, a layer for each module. It holds no cache, or slabs would never be idle once a graph ran
    over them."""

    network: Stacked
    slabs: Slabs
    group: int
    seats: Seats

    def read(self, level: int, numbers: Numbers, rows: Rows) -> Tensor:
        """What a module makes [B, R, H] of rows, which it writes behind those that it has."""
        of_level = self.slabs.layer(level)
        attention = self.seats.attention(of_level, numbers.slot[:, 0], rows.places, rows.seen, self.group)
        made = self.network.step(level, rows.tokens.flatten(), rows.states.flatten(0, 1), rows.positions.flatten(), attention)
        return made.unflatten(0, rows.tokens.shape)


class Rows(NamedTuple):
    """R rows of each of B sequences."""

    tokens: Tensor  # [B, R]
    states: Tensor  # [B, R, H]
    positions: Tensor  # [B, R]
    places: Tensor  # [B, R] of their slots
    seen: Tensor  # bool [B, R, window]


class Modules(NamedTuple):
    """All that a graph depends on besides the network and the slabs."""

    shape: TreeShape
    window: int  # keys that are read
    drawn: Drawn

    def guess(self, stack: Stack, numbers: Numbers, law_B4: Tensor, unread: UnreadRows, noise_BLD: Tensor | None, ids_D: Tensor) -> Tensor:
        """The trees, as `grow_fixed` gives them, from rows of which each module reads those whose tokens are known."""
        texts = self.catch_up(stack, numbers, *unread)
        network, paths_BFd, states_BFdH = stack.network, unread[0][:, :1, None][..., :0], texts[0][:, None]

        def follows(level: int) -> Tensor:
            last_BFH = states_BFdH[:, :, -1]
            logits = network.logits_at(level, last_BFH.flatten(0, 1)).unflatten(0, last_BFH.shape[:2])
            return log_scores(logits, self.drawn, law_B4, None if noise_BLD is None else noise_BLD[:, level])

        def read(level: int, tokens_BF: Tensor, rows_BF: Tensor) -> Tensor:
            """Each node's path is read by the module of its depth, from what the module before made of its parent's."""
            nonlocal paths_BFd, states_BFdH
            paths_BFd = torch.cat([picked(paths_BFd, rows_BF), tokens_BF[..., None]], 2)
            rows = self.path_rows(stack, level, numbers, paths_BFd.flatten(1), picked(states_BFdH, rows_BF).flatten(1, 2))
            made_BFdH = stack.read(level, numbers, rows).unflatten(1, paths_BFd.shape[1:])
            first_BF1H = texts[level][:, None].expand(-1, tokens_BF.shape[1], -1, -1)
            states_BFdH = torch.cat([first_BF1H, made_BFdH], 2)
            return follows(level)

        deepest = numbers.levels.minimum(numbers.position)  # module d reads nothing before d tokens are there
        return grow_fixed(self.shape, deepest, follows(0), read, ids_D)

    def catch_up(self, stack: Stack, numbers: Numbers, tokens_BC: Tensor, states_BCH: Tensor) -> list[Tensor]:
        """What each module made of the last position that it could read, [B, 1, H] each. Module k reads row m with token m + 1 + k, so
        one row less than the module before; what is behind them goes to the spare row."""
        texts, columns_W, spare = list[Tensor](), torch.arange(self.window, device=tokens_BC.device), stack.slabs.keys.shape[3] - 1
        for level in range(stack.network.levels):
            tokens, states = tokens_BC[:, level:], states_BCH[:, : tokens_BC.shape[1] - level]
            order = torch.arange(tokens.shape[1], device=tokens_BC.device)
            positions, count = numbers.position - numbers.unread + order, numbers.unread - level
            rows = Rows(tokens, states, positions, positions.masked_fill(order >= count, spare), columns_W <= positions[..., None])
            states_BCH = stack.read(level, numbers, rows)
            texts.append(picked(states_BCH, (count - 1).clamp(min=0)))
        return texts

    def path_rows(self, stack: Stack, level: int, numbers: Numbers, tokens_BR: Tensor, states_BRH: Tensor) -> Rows:
        """The rows of some paths of `level` nodes: each sees the text that the module has read, and its own path up to itself."""
        order, columns_W = (torch.arange(size, device=tokens_BR.device) for size in (tokens_BR.shape[1], self.window))
        # Where the text is shorter these nodes are ruled out; their rows must see something all the same, and see themselves.
        start_B1 = (numbers.position - level).clamp(min=0)
        behind = columns_W - start_B1[..., None]
        seen = (behind < 0) | ((behind >= (order - order % level)[:, None]) & (behind <= order[:, None]))
        return Rows(tokens_BR, states_BRH, start_B1 + order % level, numbers.places(start_B1 + order - numbers.position, stack.slabs), seen)
