"""Growth in fixed shapes: the tree that `Growth` grows, by operations on tensors without a decision of the host, so that CUDA can capture
all of it as one graph.

Where scores settle a tree's shape, with K children a node, the root has K candidates; on every further level K nodes are read, which have
K * K. How many nodes the tree keeps and how deep it may be are settled too; a text that has less room left says so in a number, and what
lies deeper is ruled out. grow.py is the readable twin. Of equal guesses of one node any may come first (there the lower id); all else is
the same, tree for tree. Knows candidates, scores and noise; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed_filters import Filters, filtered, loosened
from eyas.decode.fixed_static import grow_static
from eyas.decode.score import top
from eyas.decode.tree import IMPOSSIBLE, Tree

# level, tokens [B, K], their parents among the last level's rows [B, K] -> log scores [B, K, D]
Read = Callable[[int, Tensor, Tensor], Tensor]


class Drawn(NamedTuple):
    """How the target's token is drawn, as far as a graph depends on it."""

    sampled: bool  # at a temperature; else greedy
    noisy: bool  # candidates are ranked with the noise that the target will draw with
    filters: Filters = Filters()

    @classmethod
    def of(cls, request: TreeRequest) -> Drawn:
        return cls(not request.sampling.greedy, request.noise is not None, Filters.of(request.sampling))

    @classmethod
    def of_all(cls, requests: Sequence[TreeRequest]) -> Drawn:
        """That of those that are not greedy, which is one; greedy ones go along with it."""
        return next((kind for kind in map(cls.of, requests) if kind.sampled), cls.of(requests[0]))


class Candidates(NamedTuple):
    """Children of the nodes of one level of B trees, in the order of these nodes and best first."""

    tokens: Tensor  # [B, C] the target's ids
    parents: Tensor  # [B, C] numbers of nodes; the root is 0, and others are counted as they come
    scores: Tensor  # [B, C] float64, the log of the chance that the path down to here is drawn


def grows_fixed(request: TreeRequest, vocab_size: int) -> bool:
    """Whether the tree that is asked for can be grown in fixed shapes: from the draft's candidates alone (a vocabulary of `vocab_size`),
    ranked by their logits or with noise made from a seed."""
    return settled(request) and request.shape.nodes > 1 and request.shape.top_k <= vocab_size


def settled(request: TreeRequest) -> bool:
    """Whether nobody is asked about single nodes while a tree grows, and noise is made from a seed."""
    others = (request.planner, request.processed, request.copied, request.draws)
    noisy = request.noise is None or request.seed is not None
    return noisy and not request.shape.growth and all(each is None for each in others)


def grow_fixed(shape: TreeShape, levels_B1: Tensor, first_B1D: Tensor, read: Read, ids_D: Tensor) -> Tensor:
    """B trees of this shape as int64 [B, 4, n], one column for each node but the root: the target's tokens, parents' rows in the tree,
    depths, and bits of the float64 scores. Nodes that are ruled out, such as those deeper than `levels_B1` (int64), have score -inf, and
    are the last.

    `first_B1D`: log scores of the roots' children; `ids_D`: the target's id of each candidate.
    """
    if shape.counts:
        return grow_static(shape, levels_B1, first_B1D, read, ids_D)
    count, device = shape.top_k, ids_D.device
    root = torch.zeros(len(first_B1D), 1, dtype=torch.int64, device=device)
    found, made = [children_of(root, root.double(), first_B1D, count, ids_D)], 1
    for level in range(1, shape.levels):
        tokens, _, scores = newest = found[-1]
        best = scores.sort(descending=True, stable=True).indices[:, :count]
        log_scores_BKD = read(level, tokens.gather(1, best), best // count)
        found.append(children_of(made + best, scores.gather(1, best), log_scores_BKD, count, ids_D))
        made += newest.tokens.shape[1]
    return kept(Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True))), shape, levels_B1)


def children_of(nodes_BF: Tensor, scores_BF: Tensor, log_scores_BFD: Tensor, count: int, ids_D: Tensor) -> Candidates:
    """The `count` best children of each of F nodes a tree."""
    best, ids = (part.unflatten(0, nodes_BF.shape) for part in top(log_scores_BFD.flatten(0, 1), count))
    parents = nodes_BF[..., None].expand(-1, -1, count).flatten(1)
    return Candidates(ids_D[ids.flatten(1)], parents, (scores_BF[..., None] + best).flatten(1))


def kept(all_C: Candidates, shape: TreeShape, levels_B1: Tensor) -> Tensor:
    """The best of all candidates, as `grow_fixed` gives them: by score and then by order, so that a kept node's parent is kept."""
    tokens, parents, scores = all_C
    level, count = shape.top_k**2, tokens.shape[1]  # candidates of every level but the first; of all
    order = torch.arange(count, device=tokens.device)
    depths = 1 + (order + level - shape.top_k) // level
    scores = scores.masked_fill(depths > levels_B1, IMPOSSIBLE)
    best = scores.sort(descending=True, stable=True).indices[:, : shape.nodes - 1]
    best = best.gather(1, (best + count * (scores.gather(1, best) == IMPOSSIBLE)).argsort(1))
    rows = torch.zeros(len(tokens), 1 + count, dtype=torch.int64, device=tokens.device)
    rows = rows.scatter(1, 1 + best, 1 + order[: best.shape[1]].expand_as(best))
    bits = scores.gather(1, best).view(torch.int64)
    return torch.stack([tokens.gather(1, best), rows.gather(1, parents.gather(1, best)), depths[best], bits], 1)


def picked(each_BN: Tensor, rows_BM: Tensor) -> Tensor:
    """Of each of B sequences these rows, [B, M, ..] of [B, N, ..]."""
    return each_BN[torch.arange(len(rows_BM), device=rows_BM.device)[:, None], rows_BM]


def log_scores(logits_BFD: Tensor, drawn: Drawn, law_B4: Tensor, noise_BD: Tensor | None) -> Tensor:
    """What `score.log_scores` computes, float64 [B, F, D]; each sequence has a law and noise of its own."""
    scores, law = logits_BFD if logits_BFD.dtype == torch.float64 else logits_BFD.float(), law_B4[..., None, :]
    if drawn.sampled:
        scores = scores / law[..., :1].to(scores.dtype)
        if any(drawn.filters):
            scores = scores.masked_fill(filtered(scores.double(), *loosened(drawn.filters, law)) == IMPOSSIBLE, IMPOSSIBLE)
        scores = scores.log_softmax(-1)
    if noise_BD is not None:
        scores = scores + noise_BD[..., None, :].to(scores.dtype)
    return scores.log_softmax(-1)


def tree_of(root: int, found: Tensor) -> tuple[Tree, list[int]]:
    """The tree whose nodes below the root `grow_fixed` gave, or two of one root beside each other, and by row its row in the tree: -1 for
    what was ruled out. Of equal siblings the later one is none of its own."""
    tokens, parents, depths, scores, places = [root], [-1], [0], [0.0], [0]
    rows: dict[tuple[int, int], int] = {}  # (parent's row, token) -> row
    columns, bits = found[:3].tolist(), found[3].cpu().view(torch.float64).tolist()
    for token, above, depth, score in zip(*columns, bits, strict=True):
        key = (places[above], token)
        if score == IMPOSSIBLE or key in rows:
            places.append(rows[key] if score > IMPOSSIBLE else -1)
            continue
        rows[key] = len(tokens)
        places.append(len(tokens))
        tokens.append(token)
        parents.append(key[0])
        depths.append(depth)
        scores.append(score)
    return Tree(tokens, parents, depths, scores), places
