"""The whole round of some sequences in fixed shapes: catch up, grow, the target's pass, the walk along its draws, keep; operations on
tensors without a decision of the host, so that CUDA can capture all of it as one graph.

The round in generate.py is the readable twin. A graph has rows for B sequences with one shape of tree; rows of those that are none pad.
While it runs it holds, for N rows of a tree, C depths and V tokens: the target's logits B * N * V * 4 bytes and the noise B * C * V * 8,
which at 512 rows and 128,000 tokens is 0.26 GB and, with 8 depths of 16 nodes, as much again; draws are taken sequence by sequence, with
N * V * 8 bytes two or three times. Knows a target of ours, what is asked of a draft's part, and slabs; knows nothing of requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.captured_growth import ALONE, Numbers, UnreadRows
from eyas.decode.fixed import Drawn, picked
from eyas.decode.fixed_filters import Filters, filtered
from eyas.decode.tree import IMPOSSIBLE
from eyas.kernels.captured import Seats
from eyas.model.cache import Slabs
from eyas.model.target import Output, Target

END = -1  # behind a path's last row


class Guesses(Protocol):
    """All that a graph depends on of a draft's part in a round, besides models and slabs; it can be compared."""

    @property
    def shape(self) -> TreeShape: ...

    def guess(self, part: Any, numbers: Numbers, law_B4: Tensor, unread: UnreadRows, noise_BLD: Tensor | None, ids_D: Tensor, /) -> Tensor:
        """The trees, as `grow_fixed` gives them, with the noise [B, levels, D] at hand."""
        ...


class Round(NamedTuple):
    """All that a round's graph depends on besides models and slabs."""

    guesses: Guesses | None  # of the draft; None: it makes none
    given: int  # rows of guesses that are given
    most: int  # tokens that a round may commit
    drawn: Drawn
    window: int  # keys that the target reads
    taps: tuple[int, ...]
    seats: Seats = ALONE

    def run(
        self,
        target: Target,
        slabs: Slabs,
        part: Any,
        numbers_B5: Tensor,
        law_B4: Tensor,
        tokens_BC: Tensor,
        features_BCF: Tensor,
        given_B4M: Tensor,
        ids_D: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The paths' rows up to END, what was drawn there and their ranks, int64 [B, 3, C]; their features [B, C, F]; the target's logits
        [B, N, V]; the nodes as `grow_fixed` gives them, then those given. `numbers_B5`: as `numbers_of` gives them."""
        numbers, vocab_size = Numbers.of(numbers_B5), target.config.vocab_size
        depths_C = 1 + torch.arange(self.most, device=numbers_B5.device)
        noise_BCV = numbers.noise(depths_C, vocab_size) if self.drawn.noisy else None
        if noise_BCV is not None and self.seats.count > 1:  # greedy ones draw without noise, at any temperature
            greedy_B1 = law_B4[:, :1] == 0
            noise_BCV.masked_fill_(greedy_B1[..., None], 0.0)
            law_B4 = torch.cat([law_B4[:, :1] + greedy_B1, law_B4[:, 1:]], 1)
        root, nodes = tokens_BC.gather(1, numbers.last), given_B4M
        if self.guesses:
            noise_BLD = None if noise_BCV is None else noise_BCV[:, : self.guesses.shape.levels, ids_D]
            guessed = self.guesses.guess(part, numbers, law_B4, (tokens_BC, features_BCF), noise_BLD, ids_D)
            nodes = beside(guessed, given_B4M)
        tokens_BN, parents_BN, depths_BN = (
            torch.cat([first, rest], 1) for first, rest in zip((root, 0 * root, 0 * root), nodes[:, :3].unbind(1), strict=True)
        )
        there_BN = torch.cat([root >= 0, nodes[:, 3].view(torch.float64) > IMPOSSIBLE], 1)
        ancestors_BNN = ancestors(parents_BN, self.most)
        out = self.read(target, slabs, numbers, tokens_BN, depths_BN, ancestors_BNN)
        logits_BNV = out.logits.unflatten(0, tokens_BN.shape)
        draws_BN = self.draws(logits_BNV, law_B4, noise_BCV, depths_BN)
        path_BN = longest(walked(tokens_BN, parents_BN, there_BN, ancestors_BNN, draws_BN), depths_BN, ancestors_BNN)
        path_BC = path_BN.long().sort(descending=True, stable=True).indices[:, : self.most]
        keep(slabs, numbers, path_BC)
        guessed = nodes[:, 3, : nodes.shape[2] - self.given].view(torch.float64)
        ranks_BN = torch.cat([0 * root, ranks_of(guessed), 0 * given_B4M[:, 0]], 1)
        told = [path_BC.masked_fill(~path_BN.gather(1, path_BC), END), draws_BN.gather(1, path_BC), ranks_BN.gather(1, path_BC)]
        features = None if out.features is None else picked(out.features.unflatten(0, tokens_BN.shape), path_BC)
        return torch.stack(told, 1), features, logits_BNV, nodes

    def read(self, target: Target, slabs: Slabs, numbers: Numbers, tokens_BN: Tensor, depths_BN: Tensor, ancestors_BNN: Tensor) -> Output:
        """The target's pass over trees: each row sees the text and its ancestors."""
        order_N, columns_W = (torch.arange(size, device=tokens_BN.device) for size in (tokens_BN.shape[1], self.window))
        seen = (columns_W < numbers.position)[:, None].expand(-1, len(order_N), -1)
        seen = seen.scatter(2, (numbers.position + order_N)[:, None].expand_as(ancestors_BNN), ancestors_BNN)
        group = target.config.num_attention_heads // target.config.num_key_value_heads
        attention = self.seats.attention(slabs, numbers.slot[:, 0], numbers.places(order_N, slabs), seen, group)
        return target.read(tokens_BN.flatten(), (numbers.position + depths_BN).flatten(), attention, self.taps, None)

    def draws(self, logits_BNV: Tensor, law_B4: Tensor, noise_BCV: Tensor | None, depths_BN: Tensor) -> Tensor:
        """The target's draw at each row, int64 [B, N]; one sequence after the other, which bounds memory."""
        if noise_BCV is None:
            return logits_BNV.argmax(-1)
        each = zip(logits_BNV, law_B4, noise_BCV, depths_BN, strict=True)
        return torch.stack([drawn(logits, self.drawn.filters, law, noise[depths]) for logits, law, noise, depths in each])


def ancestors(parents_BN: Tensor, levels: int) -> Tensor:
    """Which rows each row has for ancestors, itself included: bool [B, N, N]. The root is its own parent; no row lies deeper than
    `levels`."""
    own = torch.eye(parents_BN.shape[1], dtype=torch.bool, device=parents_BN.device)
    seen, above, reach = own.expand(len(parents_BN), -1, -1), parents_BN, 1
    while reach <= levels:
        seen, above, reach = seen | picked(seen, above), above.gather(1, above), 2 * reach
    return seen


def drawn(logits_NV: Tensor, filters: Filters, law_4: Tensor, noise_NV: Tensor) -> Tensor:
    """The target's draw at each row, as `sampling.draw` draws it: int64 [N]."""
    return (filtered(logits_NV.double() / law_4[:1], filters, law_4) + noise_NV).argmax(-1)


def walked(tokens_BN: Tensor, parents_BN: Tensor, there_BN: Tensor, ancestors_BNN: Tensor, draws_BN: Tensor) -> Tensor:
    """Which rows a walk may come to, bool [B, N]: those that are there and were drawn at their parents, as all above them were. Row 0 is
    the root. Where no guess was made twice they are the path of `verify.walk`."""
    right_BN = there_BN & (tokens_BN == draws_BN.gather(1, parents_BN))
    right_BN[:, :1].fill_(True)
    return (right_BN[:, None] | ~ancestors_BNN).all(2)


def longest(walked_BN: Tensor, depths_BN: Tensor, ancestors_BNN: Tensor) -> Tensor:
    """The rows of the longest path among those that a walk may come to, bool [B, N]: two of equal tokens, one guessed and one given, go as
    far as their children do."""
    last_B1 = (walked_BN * (1 + depths_BN)).argmax(1, keepdim=True)
    return picked(ancestors_BNN, last_B1)[:, 0]


def ranks_of(scores_Bn: Tensor) -> Tensor:
    """Each score's rank in its tree, int64 [B, n]; 1 for the best."""
    return 1 + scores_Bn.sort(descending=True, stable=True).indices.argsort(1)


def beside(nodes_B4n: Tensor, given_B4M: Tensor) -> Tensor:
    """The nodes of two trees with one root, as `grow_fixed` gives them."""
    tokens, parents, depths, bits = given_B4M.unbind(1)
    moved = torch.stack([tokens, parents + nodes_B4n.shape[2] * (parents > 0), depths, bits], 1)
    return torch.cat([nodes_B4n, moved], 2)


def keep(slabs: Slabs, numbers: Numbers, path_BC: Tensor) -> None:
    """Move the trees' rows on a path to where the texts end. Behind the path any rows may follow: they are not of the text."""
    to, of = (numbers.places(rows, slabs) for rows in (torch.arange(path_BC.shape[1], device=path_BC.device), path_BC))
    for slab in (slabs.keys, slabs.values):
        slab[:, numbers.slot, :, to] = slab[:, numbers.slot, :, of]
