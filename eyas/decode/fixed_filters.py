"""Top-k, top-p and min-p for many rows at once by tensors, without a decision of the host, so that CUDA can capture them.

What they leave is what `sampling.allowed` leaves; of equal scores at a boundary the lower id stays, too. A row's sums may differ by their
last bit, as they are added in another order. Knows scores and a law's numbers; knows nothing of noise or trees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import Sampling
from eyas.decode.sampling import unfiltered
from eyas.decode.tree import IMPOSSIBLE


class Filters(NamedTuple):
    """Which filters there are: what a graph depends on. By what numbers they rule out is in a law, which may change from round to round."""

    most: int = 0  # a power of two, at least top-k; 0: no top-k
    nucleus: bool = False
    floor: bool = False  # min-p

    @classmethod
    def of(cls, sampling: Sampling) -> Filters:
        if unfiltered(sampling):
            return cls()
        return cls(1 << (sampling.top_k - 1).bit_length() if sampling.top_k else 0, sampling.top_p < 1, sampling.min_p > 0)


def law_of(sampling: Sampling, filters: Filters | None = None) -> Tensor:
    """How tokens are drawn, float64 [4]: temperature, top-k, top-p, min-p. Of greedy text among others, for which there are `filters`, what
    rules out the least: temperature 0."""
    if sampling.greedy and filters is not None:
        return torch.tensor([0.0, filters.most, 1.0, 0.0], dtype=torch.float64)
    return torch.tensor([sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p], dtype=torch.float64)


def loosened(filters: Filters, law: Tensor) -> tuple[Filters, Tensor]:
    """What `score.loosely_filtered` makes of them; a law [4], or one for each row [.., 4]."""
    temperature, top_k, top_p, min_p = law.split(1, -1)
    return filters._replace(most=2 * filters.most), torch.cat([temperature, 2 * top_k, (1 + top_p) / 2, min_p / 2], -1)


def filtered(scores_NV: Tensor, filters: Filters, law: Tensor) -> Tensor:
    """Scores (logits over temperature, float64 [.., V]), minus infinity where a filter rules a token out. `law` [4], or [.., 4] for each
    row; where it is 1 long in an axis it is that of all rows there."""
    _, top_k, top_p, min_p = law.split(1, -1)
    if filters.most:
        scores_NV = of_best(scores_NV, filters.most, top_k)
    if filters.nucleus:
        scores_NV = of_nucleus(scores_NV, filters.most, top_p)
    if filters.floor:
        scores_NV = scores_NV.masked_fill(scores_NV < scores_NV.amax(-1, keepdim=True) + min_p.log(), IMPOSSIBLE)
    return scores_NV


def of_best(scores_NV: Tensor, most: int, count: Tensor) -> Tensor:
    """Only each row's `count` (float64 [.., 1], at most `most`) best."""
    ranked = scores_NV.topk(min(most, scores_NV.shape[-1]), -1).values
    boundary = ranked.gather(-1, (count.long() - 1).clamp(max=ranked.shape[-1] - 1).expand(*ranked.shape[:-1], 1))
    above, level = scores_NV > boundary, scores_NV == boundary
    places = above.sum(-1, keepdim=True) + level.cumsum(-1)
    return scores_NV.masked_fill(~(above | (level & (places <= count))), IMPOSSIBLE)


def of_nucleus(scores_NV: Tensor, most: int, top_p: Tensor) -> Tensor:
    """Only tokens whose likelier tokens together have less than `top_p` of the probability. `most`: how many are possible; 0: all."""
    probabilities = scores_NV.softmax(-1)
    ids = probabilities.topk(most, -1).indices.sort(-1).values if 0 < most < scores_NV.shape[-1] else None
    ranked = (probabilities if ids is None else probabilities.gather(-1, ids)).sort(dim=-1, descending=True, stable=True)
    places = ranked.indices if ids is None else ids.gather(-1, ranked.indices)
    kept = torch.zeros_like(scores_NV, dtype=torch.bool).scatter(-1, places, ranked.values.cumsum(-1) - ranked.values < top_p)
    return scores_NV.masked_fill(~kept, IMPOSSIBLE)
