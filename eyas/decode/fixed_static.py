"""Trees whose shape was fixed beforehand (EAGLE-1, Medusa) in fixed shapes: scores only say which tokens the places get.

`StaticGrowth` is the readable twin. Where nodes lie is known before anything is computed, so it is in tensors that are made once. Knows
candidates and scores; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.score import top
from eyas.decode.tree import IMPOSSIBLE


class Level(NamedTuple):
    """F nodes of one level that have children, and these M children; all int64."""

    nodes: Tensor  # [F] numbers among their own level's nodes
    above: Tensor  # [F] their parents' numbers among the F of the level above; of the root 0
    parents: Tensor  # [M] numbers among the F nodes
    ranks: Tensor  # [M] among siblings


class Places(NamedTuple):
    levels: list[Level]
    parents: Tensor  # [n] by node but the root: its parent's row
    depths: Tensor  # [n]


@cache
def places_of(shape: TreeShape, device: torch.device) -> Places:
    """Where the nodes of a static shape lie. A graph must not make such tensors of the host's numbers; it finds those of the run before."""
    counts, levels, first = [*shape.counts, *[0] * (shape.nodes - len(shape.counts))], list[Level](), 0
    newest, above, parents, depths = [0], {0: 0}, list[int](), list[int]()  # rows of the newest level; row -> its parent among the expanded
    with torch.inference_mode(False):
        while any(counts[row] for row in newest):
            wide = [row for row in newest if counts[row]]
            children = [(place, rank) for place, row in enumerate(wide) for rank in range(counts[row])]
            numbers = [[row - first for row in wide], [above[row] for row in wide], *map(list, zip(*children, strict=True))]
            levels.append(Level(*(torch.tensor(each, device=device) for each in numbers)))
            parents += [wide[place] for place, _ in children]
            depths += [len(levels)] * len(children)
            first = newest[-1] + 1
            newest = list(range(first, first + len(children)))
            above = dict(zip(newest, (place for place, _ in children), strict=True))
        return Places(levels, *(torch.tensor(each, device=device) for each in (parents, depths)))


def grow_static(
    shape: TreeShape, levels_B1: Tensor, first_B1D: Tensor, read: Callable[[int, Tensor, Tensor], Tensor], ids_D: Tensor
) -> Tensor:
    """What `fixed.grow_fixed` gives, of a static shape, its nodes breadth first."""
    places, found = places_of(shape, ids_D.device), list[tuple[Tensor, Tensor]]()
    count, log_scores_BFD, tokens = shape.top_k, first_B1D, torch.zeros(len(first_B1D), 1, dtype=torch.int64, device=ids_D.device)
    scores = tokens.double()
    for depth, level in enumerate(places.levels):
        if depth:
            log_scores_BFD = read(depth, tokens[:, level.nodes], level.above.expand(len(tokens), -1))
        best, ids = (part.unflatten(0, log_scores_BFD.shape[:2]) for part in top(log_scores_BFD.flatten(0, 1), count))
        scores = scores[:, level.nodes[level.parents]] + best[:, level.parents, level.ranks]
        tokens = ids_D[ids[:, level.parents, level.ranks]]
        found.append((tokens, scores))
    tokens, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    scores = scores.masked_fill(places.depths > levels_B1, IMPOSSIBLE)
    return torch.stack([tokens, places.parents.expand_as(tokens), places.depths.expand_as(tokens), scores.view(torch.int64)], 1)
