"""A node's score: the log of the chance that the target draws this token here, given the noise it will draw with.

The draft ranks its candidates with the target's own noise (Gumbel coupling, Daliri et al. 2024): it guesses what will be drawn, not
what is likely. Some verifiers draw with other randomness; for these the draft draws its candidates with noise of its own. Knows a
draft's logits, the filters and the request; knows nothing of trees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import Sampling
from eyas.decode.copying import CopyLaw, mixed
from eyas.decode.drafter import TreeRequest
from eyas.decode.sampling import allowed, unfiltered
from eyas.kernels.step import MOST, Ranked, Ranking
from eyas.model.vocab import DraftVocab

PARTS = 8  # into which `top` splits a row of logits on CUDA


class Children(NamedTuple):
    """The children of each of R nodes, best (or first drawn) first."""

    tokens: list[list[int]]  # R lists of the target's ids
    log_scores: list[list[float]]  # log of a child's chance given its parent
    distributions: list[Tensor] | None = None  # [V] each, where the tokens were drawn from them without replacement


def children(
    request: TreeRequest,
    level: int,
    nodes: Sequence[int],
    guessed: Tensor | Ranked,
    vocab: DraftVocab | None,
    laws: Sequence[CopyLaw | None] | None = None,
) -> Children:
    """The children of R nodes at depth `level`, from the draft's logits [R, D] there, which the kernel may have ranked; where there is a
    copy law from both. Without `vocab` the draft's ids are the target's."""
    if request.draws is not None and request.shape.fixed:
        return drawn_children(request, nodes, logits_of(guessed), vocab)  # from the draft's own law alone: the verifier counts on it
    if isinstance(guessed, Tensor) or not kernel_ranks(request):
        guessed = ranked(logits_of(guessed), request.sampling, noise_at(request, level, vocab), request.shape.top_k)
    count, names = request.shape.top_k, vocab.id_list() if vocab else None
    ids = guessed.ids if names is None else [[names[each] for each in row[:count]] for row in guessed.ids]
    found = Children([row[:count] for row in ids], [row[:count] for row in guessed.scores])
    if laws is not None and any(laws):
        join_laws(found, laws, guessed, request.noise(request.position + level + 1) if request.noise else None, vocab)
    return found


def noise_at(request: TreeRequest, level: int, vocab: DraftVocab | None) -> Tensor | None:
    """The noise [D] that the target will draw the children of nodes at depth `level` with."""
    noise_V = request.noise(request.position + level + 1) if request.noise else None
    return noise_V if noise_V is None or vocab is None else noise_V[vocab.on(noise_V.device)]


def kernel_ranks(request: TreeRequest) -> bool:
    """Whether the native kernel can rank a request's candidates: by logits, or by these at a temperature with noise, unfiltered."""
    drawn = request.draws is not None and request.shape.fixed
    return request.shape.top_k <= MOST and unfiltered(request.sampling) and not (request.processed or drawn)


def ranking_of(request: TreeRequest, level: int, vocab: DraftVocab | None) -> Ranking:
    """How the kernel shall rank the children of nodes at depth `level`; by their logits alone where it cannot."""
    if request.sampling.greedy or not kernel_ranks(request):
        return Ranking()
    noise_D = noise_at(request, level, vocab)
    return Ranking(request.sampling.temperature, None if noise_D is None else noise_D.float().cpu())


def logits_of(guessed: Tensor | Ranked) -> Tensor:
    """Logits [R, D] that may have come with a ranking by themselves."""
    return guessed if isinstance(guessed, Tensor) else guessed.numbers


def ranked(logits_RD: Tensor, sampling: Sampling, noise_D: Tensor | None, count: int) -> Ranked:
    """The `count` best candidates of each row, as the kernel finds them."""
    noisy_RD = noisy(logits_RD, sampling, noise_D)
    scores, ids = best_children(noisy_RD.log_softmax(-1), count)
    return Ranked(noisy_RD, noisy_RD.logsumexp(-1).tolist(), scores.tolist(), ids.tolist())


def join_laws(found: Children, laws: Sequence[CopyLaw | None], guessed: Ranked, noise_V: Tensor | None, vocab: DraftVocab | None) -> None:
    """Let the children of each node that has a copy law be those of the draft's law and this one together, as many as there were. One
    look into the tensors serves all nodes."""
    columns, width = vocab.column_list() if vocab else None, guessed.numbers.shape[1]
    tokens = [token for law in laws if law is not None for token in law.following]
    places = tokens if columns is None else [columns[token] for token in tokens]
    owners = [row for row, law in enumerate(laws) if law is not None for _ in law.following]
    indices = [row * width + max(place, 0) for row, place in zip(owners, places, strict=True)]
    numbers = guessed.numbers.take(torch.tensor(indices, device=guessed.numbers.device)).tolist()
    known = [n - guessed.whole[row] if place >= 0 else -math.inf for n, row, place in zip(numbers, owners, places, strict=True)]
    noise = None if noise_V is None else noise_V.take(torch.tensor(tokens, device=noise_V.device)).tolist()
    at = 0
    for law, whole, its_tokens, its_scores in zip(laws, guessed.whole, found.tokens, found.log_scores, strict=True):
        if law is None:
            continue
        own = slice(at, at + len(law.following))
        noisy_law = (whole, noise[own]) if noise is not None else (0.0, None)
        best = mixed(law, its_tokens, its_scores, known[own], *noisy_law)
        its_tokens[:], its_scores[:] = [token for _, token in best], [min(0.0, -minus) for minus, _ in best]
        at = own.stop


def drawn_children(request: TreeRequest, nodes: Sequence[int], logits_RD: Tensor, vocab: DraftVocab | None) -> Children:
    """Children drawn without replacement from the draft's distribution: the largest of log q plus Gumbel noise, in order (Kool et al.
    2019)."""
    draws = request.draws
    assert draws is not None
    log_q_RD = log_scores(logits_RD, request.sampling, None).double().cpu()
    noise_RD = torch.stack([draws(node, log_q_RD.shape[1]) for node in nodes])
    ids = (log_q_RD + noise_RD).topk(min(request.shape.top_k, log_q_RD.shape[1]), -1).indices
    q_RD = log_q_RD.softmax(-1)
    q_RV = q_RD.new_zeros(len(nodes), vocab.vocab_size).index_copy_(1, vocab.ids, q_RD) if vocab else q_RD
    return Children((vocab.to_target(ids) if vocab else ids).tolist(), log_q_RD.gather(1, ids).tolist(), list(q_RV))


def log_scores(logits_RD: Tensor, sampling: Sampling, noise_D: Tensor | None) -> Tensor:
    """The log scores [R, D] of all children: log softmax(log q + noise).

    Without noise (greedy, or a verifier that draws with other randomness) they are log q, as SafeAILab has it.
    """
    return noisy(logits_RD, sampling, noise_D).log_softmax(-1)


def noisy(logits_RD: Tensor, sampling: Sampling, noise_D: Tensor | None) -> Tensor:
    """log q + noise, where q is the draft's distribution at the target's temperature and with loosened filters; without noise, log q up to
    a constant."""
    scores = logits_RD if logits_RD.dtype == torch.float64 else logits_RD.float()
    scores = scores if sampling.greedy else scores / sampling.temperature
    if not sampling.greedy:
        scores = loosely_filtered(scores, sampling).log_softmax(-1)
    if noise_D is not None:
        scores = scores + noise_D.to(scores.device, scores.dtype)
    return scores


def loosely_filtered(scores_RD: Tensor, sampling: Sampling) -> Tensor:
    """Rule out the tokens that the target's filters surely will. The draft's distribution is only near the target's, hence the margin."""
    loose = replace(sampling, top_k=2 * sampling.top_k, top_p=(1 + sampling.top_p) / 2, min_p=sampling.min_p / 2)
    if (loose.top_k, loose.top_p, loose.min_p) == (0, 1.0, 0.0):
        return scores_RD
    filtered = torch.full_like(scores_RD, float("-inf"))
    for row, scores_D in enumerate(scores_RD):
        ids = allowed(scores_D.double().cpu(), loose)
        filtered[row, ids] = scores_D[ids]
    return filtered


def best_children(scores_RD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row: scores and draft ids [R, count], best first; of equal scores the lower id first."""
    count = min(count, scores_RD.shape[1])
    if count == 1:
        ids = scores_RD.argmax(-1, keepdim=True)
        return scores_RD.gather(1, ids), ids
    values, ids = (part.cpu() for part in top(scores_RD, min(count + 1, scores_RD.shape[1])))
    if bool((values[:, 1:] == values[:, :-1]).any()):  # topk leaves equals in any order, and may leave out the lower id
        values, ids = scores_RD.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def top(scores_RD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """topk of each row. On CUDA first of PARTS parts of a row, then of their best: for few long rows PyTorch's own launches many more
    kernels."""
    rows, width = scores_RD.shape
    if not scores_RD.is_cuda or width % PARTS or width < PARTS * count:
        return scores_RD.topk(count, -1)
    values, ids = scores_RD.view(rows, PARTS, -1).topk(count, -1)
    ids += torch.arange(0, width, width // PARTS, device=ids.device)[:, None]
    values, chosen = values.flatten(1).topk(count, -1)
    return values, ids.flatten(1).gather(1, chosen)
