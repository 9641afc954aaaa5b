"""Growth in fixed shapes: the tree that `Growth` grows, by operations on tensors without a decision of the host, so that CUDA can capture
all of it as one graph.

With K children a node the root has K candidates; on every further level K nodes are read, which have K * K. How many nodes the tree keeps
and how deep it may be are settled too; a text that has less room left says so in a number, and what lies deeper is ruled out. grow.py is
the readable twin. Of equal guesses of one node any may come first (there the lower id); all else is the same, tree for tree. Knows
candidates, scores and noise; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed_filters import Filters, filtered, loosened
from eyas.decode.score import top
from eyas.decode.tree import IMPOSSIBLE, Tree

Read = Callable[[int, Tensor, Tensor], Tensor]  # level, tokens [K], their parents among the last level's rows [K] -> log scores [K, D]


class Drawn(NamedTuple):
    """How the target's token is drawn, as far as a graph depends on it."""

    sampled: bool  # at a temperature; else greedy
    noisy: bool  # candidates are ranked with the noise that the target will draw with
    filters: Filters = Filters()

    @classmethod
    def of(cls, request: TreeRequest) -> Drawn:
        return cls(not request.sampling.greedy, request.noise is not None, Filters.of(request.sampling))


class Candidates(NamedTuple):
    """Children of the nodes of one level, in the order of these nodes and best first."""

    tokens: Tensor  # [C] the target's ids
    parents: Tensor  # [C] numbers of nodes; the root is 0, and others are counted as they come
    scores: Tensor  # [C] float64, the log of the chance that the path down to here is drawn


def grows_fixed(request: TreeRequest, vocab_size: int) -> bool:
    """Whether the tree that is asked for can be grown in fixed shapes: one whose shape scores settle, from the draft's candidates alone (a
    vocabulary of `vocab_size`), ranked by their logits or with noise made from a seed."""
    return settled(request) and request.shape.nodes > 1 and request.shape.top_k <= vocab_size


def settled(request: TreeRequest) -> bool:
    """Whether nobody is asked about single nodes while a tree grows, and noise is made from a seed."""
    others = (request.planner, request.processed, request.copied, request.draws)
    noisy = request.noise is None or request.seed is not None
    return noisy and not (request.shape.counts or request.shape.growth) and all(each is None for each in others)


def grow_fixed(shape: TreeShape, levels: Tensor, first_1D: Tensor, read: Read, ids_D: Tensor) -> Tensor:
    """The tree of this shape as int64 [4, n], one column for each node but the root: the target's tokens, parents' rows in the tree,
    depths, and bits of the float64 scores. Nodes that are ruled out, such as those deeper than `levels` (int64 [1]), have score -inf, and
    are the last.

    `first_1D`: log scores of the root's children; `ids_D`: the target's id of each candidate.
    """
    count, device = shape.top_k, ids_D.device
    root = torch.zeros(1, dtype=torch.int64, device=device)
    found, made = [children_of(root, root.double(), first_1D, count, ids_D)], 1
    for level in range(1, shape.levels):
        tokens, _, scores = newest = found[-1]
        best = scores.sort(descending=True, stable=True).indices[:count]
        log_scores_KD = read(level, tokens[best], best // count)
        found.append(children_of(made + best, scores[best], log_scores_KD, count, ids_D))
        made += len(newest.tokens)
    return kept(Candidates(*map(torch.cat, zip(*found, strict=True))), shape, levels)


def children_of(nodes_F: Tensor, scores_F: Tensor, log_scores_FD: Tensor, count: int, ids_D: Tensor) -> Candidates:
    """The `count` best children of each of F nodes."""
    best_FK, ids_FK = top(log_scores_FD, count)
    parents = nodes_F[:, None].expand(-1, count).flatten()
    return Candidates(ids_D[ids_FK.flatten()], parents, (scores_F[:, None] + best_FK).flatten())


def kept(all_C: Candidates, shape: TreeShape, levels: Tensor) -> Tensor:
    """The best of all candidates, as `grow_fixed` gives them: by score and then by order, so that a kept node's parent is kept."""
    tokens, parents, scores = all_C
    level = shape.top_k**2  # candidates of every level but the first
    order = torch.arange(len(tokens), device=tokens.device)
    depths = 1 + (order + level - shape.top_k) // level
    scores = scores.masked_fill(depths > levels, IMPOSSIBLE)
    best = scores.sort(descending=True, stable=True).indices[: shape.nodes - 1]
    best = best[(best + len(tokens) * (scores[best] == IMPOSSIBLE)).argsort()]
    rows = torch.zeros(1 + len(tokens), dtype=torch.int64, device=tokens.device)
    rows.index_copy_(0, 1 + best, 1 + order[: len(best)])
    return torch.stack([tokens[best], rows[parents[best]], depths[best], scores[best].view(torch.int64)])


def log_scores(logits_FD: Tensor, drawn: Drawn, law_4: Tensor, noise_D: Tensor | None) -> Tensor:
    """What `score.log_scores` computes, float64 [F, D]."""
    scores = logits_FD if logits_FD.dtype == torch.float64 else logits_FD.float()
    if drawn.sampled:
        scores = scores / law_4[:1].to(scores.dtype)
        if any(drawn.filters):
            scores = scores.masked_fill(filtered(scores.double(), *loosened(drawn.filters, law_4)) == IMPOSSIBLE, IMPOSSIBLE)
        scores = scores.log_softmax(-1)
    if noise_D is not None:
        scores = scores + noise_D.to(scores.dtype)
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
