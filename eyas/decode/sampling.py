"""Noise and the target's distribution: the token at a position is a pure function of (seed, position, target distribution).

The noise at a position is one Gumbel variable for each token of the vocabulary, made from Philox words keyed by (seed, position). The
token drawn is argmax(log p / T + g) over the tokens that the filters allow. So the text for a seed is the same with speculation on or
off, with any draft, tree or batch. Knows logits and ids; knows nothing of trees or models.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from eyas.config import Sampling
from eyas.decode.philox import CHOICE, DERIVE, GUMBEL, gumbel_on, wrapped

NOISE_VERSION = 1  # results carry it: a seed means the same text only under the same version
AHEAD = 4  # positions whose noise is made at once on a GPU, where a launch takes as long as the numbers


def philox_words(seed: int, position: int, count: int, purpose: int = GUMBEL, stream: int = 0) -> np.ndarray:
    """Random words, uint64 [count]; a purpose may have several streams.

    Raw Philox-4x64 words are the same in every numpy version; a library's distributions are not."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, position], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, stream, purpose], dtype=np.uint64)).random_raw(count)


def uniforms(seed: int, position: int, count: int, purpose: int = CHOICE, stream: int = 0) -> np.ndarray:
    """Uniform numbers, float64 [count], strictly between 0 and 1: 52 bits and a half, so that rounding can reach neither end."""
    return ((philox_words(seed, position, count, purpose, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(seed: int, position: int, count: int, purpose: int = GUMBEL, stream: int = 0) -> Tensor:
    """Gumbel noise, float64 [count] on the CPU."""
    return torch.from_numpy(-np.log(-np.log(uniforms(seed, position, count, purpose, stream))))


def derived_seed(seed: int, index: int) -> int:
    """The seed of sequence `index` of a call with this seed: 63 bits."""
    return int(philox_words(seed, index, 1, DERIVE)[0] >> np.uint64(1))


def new_seed() -> int:
    """A fresh seed for a call that was given none; the result reports it."""
    return secrets.randbits(53)  # exact in JSON


class Noise:
    """Gumbel noise of one sequence, a vector [V] for each absolute position, kept until the text has passed it. It is made where it lies:
    on CUDA a last bit may differ from the CPU's."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.seed, self.vocab_size = seed, vocab_size
        self.device = torch.device("cpu")  # where vectors are made from now on
        self._held: dict[int, Tensor] = {}

    def at(self, position: int) -> Tensor:
        """The noise at an absolute position, float64 [V]."""
        if position not in self._held:
            self._held.update(zip(itertools.count(position), self.made(position), strict=False))
        return self._held[position]

    def made(self, position: int) -> Iterable[Tensor]:
        """The noise at this position, and at some behind it where that costs little."""
        return self.made_by_tensors(position) if self.device.type == "cuda" else [gumbel(self.seed, position, self.vocab_size)]

    def made_by_tensors(self, position: int) -> Iterable[Tensor]:
        """The noise at this position and those behind it, made on the device: [AHEAD, V]."""
        positions = torch.arange(position, position + AHEAD, device=self.device)
        return gumbel_on(torch.full_like(positions, wrapped(self.seed)), positions, self.vocab_size)

    def forget_before(self, position: int) -> None:
        self._held = {held: vector for held, vector in self._held.items() if held >= position}


def draw(logits_V: Tensor, sampling: Sampling, noise_V: Tensor | None) -> int:
    """The target's token: argmax of logit / temperature plus noise over the allowed tokens; ties go to the lowest id. Greedy: no noise."""
    if sampling.greedy:
        return best(logits_V)
    assert noise_V is not None, "above temperature 0 a draw needs noise"
    scores_V = logits_V.to(noise_V.device, torch.float64) / sampling.temperature
    if unfiltered(sampling):
        return best(scores_V + noise_V)
    scores_V, noise_V = scores_V.cpu(), noise_V.cpu()
    ids = allowed(scores_V, sampling)
    if ids is None:
        return best(scores_V + noise_V)
    return int(ids[best(scores_V[ids] + noise_V[ids])])


def best(scores: Tensor) -> int:
    """argmax. On a CPU numpy's takes a third of the time of PyTorch's; on a GPU PyTorch's, so that one number travels instead of all."""
    return int(scores.argmax() if scores.is_cuda else scores.numpy().argmax())


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities [V], float64, with which `draw` draws each token; one-hot when greedy."""
    if sampling.greedy:
        return torch.zeros(logits_V.shape[0], dtype=torch.float64).index_fill_(0, logits_V.argmax().cpu(), 1.0)
    scores_V = logits_V.double().cpu() / sampling.temperature
    ids = allowed(scores_V, sampling)
    if ids is None:
        return scores_V.softmax(0)
    return torch.zeros_like(scores_V).index_copy_(0, ids, scores_V[ids].softmax(0))


def unfiltered(sampling: Sampling) -> bool:
    """Whether no token is ruled out before one is drawn; greedy text knows no filter."""
    return sampling.greedy or (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)


def allowed(scores_V: Tensor, sampling: Sampling) -> Tensor | None:
    """The ids [A], ascending, that top-k, top-p and min-p leave; None: all. Order and meaning are transformers'; of equal scores at a
    boundary the lower id stays."""
    ids: Tensor | None = None
    if 0 < sampling.top_k < scores_V.shape[0]:
        ids = top_ids(scores_V, sampling.top_k)
    if sampling.top_p < 1:
        ids = nucleus(scores_V, ids, sampling.top_p)
    if sampling.min_p > 0:
        ids = torch.arange(scores_V.shape[0]) if ids is None else ids
        kept = scores_V[ids]
        ids = ids[kept >= kept.max() + np.log(sampling.min_p)]
    return ids


def top_ids(scores: Tensor, count: int) -> Tensor:
    """The `count` best ids, ascending; of equal scores at the boundary the lower ids."""
    boundary = scores.topk(count).values[-1]
    above = (scores > boundary).nonzero()[:, 0]
    level = (scores == boundary).nonzero()[: count - above.shape[0], 0]
    return torch.cat([above, level]).sort().values


def nucleus(scores_V: Tensor, ids: Tensor | None, top_p: float) -> Tensor:
    """The ids, ascending, of tokens whose likelier tokens together have less than `top_p` of the probability."""
    ids = torch.arange(scores_V.shape[0]) if ids is None else ids
    probabilities = scores_V[ids].softmax(0)
    likely = probabilities >= 1e-4  # where these alone hold top_p, the nucleus lies among them: sort few instead of all
    if probabilities[likely].sum() >= top_p:
        ids, probabilities = ids[likely], probabilities[likely]
    ranked = probabilities.sort(dim=-1, descending=True, stable=True)
    above = ranked.values.cumsum(0) - ranked.values
    return ids[ranked.indices[above < top_p]].sort().values
