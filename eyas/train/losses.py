"""What a draft is taught with: the paper's cross-entropy against the target's distribution, or losses of acceptance itself.

Knows states, a head and distributions over the draft vocabulary; knows nothing of documents or steps. The head is the training's largest
matrix, so its gradient is taken in the forward pass, a chunk of rows at a time: logits [N, D] are never held whole.

A loss of one's own is `register`ed by a plugin: a plain function of log q and p, or a rule with its slope, as those here are.

p is the teacher's distribution, q the draft's, and acceptance sum_v min(p_v, q_v) the chance that EAGLE's rule keeps a token drawn from q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError

CHUNK = 512  # rows of logits held at once; more is slower (the rows leave the cache) and less pays the overhead more often
DECAY = 3.0  # of the cross-entropy's part in lk-lambda, per acceptance (arXiv 2602.23881)

Loss = Callable[[Tensor, Tensor], Tensor]  # (log q, p), each [n, D] -> loss [n], in operations that autograd knows
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (log q, q, p), each [n, D] -> loss [n] and its slope by logits [n, D]


def cross_entropy(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """-sum p log q (EAGLE-3, draft model training)."""
    return -torch.einsum("nd,nd->n", p, log_q), q.sub_(p)


def acceptance(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """sum min(p, q) [n, 1] and its slope by the logits of q [n, D]."""
    slope = torch.where(q < p, q, 0.0)
    accepted = torch.minimum(p, q).sum(-1, keepdim=True)
    return accepted, slope.sub_(q * slope.sum(-1, keepdim=True))


def lk_alpha(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """-log of acceptance (arXiv 2602.23881): learns from a cold start too, since its slope grows where acceptance is low."""
    accepted, slope = acceptance(q, p)
    accepted = accepted.clamp_min(1e-6)
    return -accepted[:, 0].log(), slope.div_(-accepted)


def lk_lambda(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """w cross-entropy + (1 - w)(1 - acceptance), w = exp(-3 acceptance) held fixed (arXiv 2602.23881)."""
    accepted, slope = acceptance(q, p)
    w = (-DECAY * accepted).exp()
    entropy, by_logits = cross_entropy(log_q, q, p)
    return (w * entropy[:, None] + (1 - w) * (1 - accepted))[:, 0], by_logits.mul_(w).sub_(slope.mul_(1 - w))


LOSSES: dict[str, Rule] = {"soft": cross_entropy, "lk-alpha": lk_alpha, "lk-lambda": lk_lambda}


def register(name: str, loss: Loss | None = None, rule: Rule | None = None) -> None:
    """Add a loss of one's own, from a plugin: as it stands in a paper, or as a rule that brings its slope. By autograd the head's part of a
    step takes 1.1 times as long with cross-entropy, 1.4 times with -log acceptance."""
    if name in LOSSES:
        raise EyasError(f"loss {name!r} exists already; choose another name")
    if rule is None and loss is not None:
        rule = by_autograd(name, loss)
    elif rule is None or loss is not None:
        raise EyasError(f"loss {name!r} needs either a loss, whose slope is found, or a rule that brings its own")
    LOSSES[name] = rule


def by_autograd(name: str, loss: Loss) -> Rule:
    """A rule whose slope autograd finds, a chunk of rows at a time as every other's."""

    def rule(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = log_q.detach().requires_grad_()  # as good as any: what is added to a whole row changes nothing
            terms = loss(logits.log_softmax(-1), p)
            if terms.shape != log_q.shape[:1] or not terms.requires_grad:
                raise EyasError(f"loss {name!r} must make one differentiable number of each row, [{len(log_q)}], not {tuple(terms.shape)}")
            (slope,) = torch.autograd.grad(terms.sum(), logits)
        return terms.detach(), slope

    return rule


class Columns(NamedTuple):
    """Tokens of the draft vocabulary that a batch's losses look at, and how many each stands for."""

    ids: Tensor  # [C] ascending
    weight: Tensor  # [C] 1 for those that matter, D' / m for m drawn from the D' others


def choose_columns(teacher_RD: Tensor, likeliest: int, drawn: int, seed: int) -> Columns:
    """All tokens among the `likeliest` of some row's distribution, and `drawn` of the others by chance: sums over columns by weight then
    estimate sums over all tokens without bias."""
    D = teacher_RD.shape[1]
    certain = torch.zeros(D, dtype=torch.bool, device=teacher_RD.device)
    certain[teacher_RD.topk(min(likeliest, D)).indices.flatten()] = True
    others = (~certain).nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed), device="cpu")[:drawn]
    picked = others[order.to(others.device)]
    weight = torch.ones(D, dtype=teacher_RD.dtype, device=teacher_RD.device)
    weight[picked] = len(others) / max(len(picked), 1)
    certain[picked] = True
    ids = certain.nonzero()[:, 0]
    return Columns(ids, weight[ids])


class HeadLoss(torch.autograd.Function):
    """sum over n of weight_n * loss(softmax(x_n W^T), teacher of n), and its terms [N] to look at; teacher rows sum to 1."""

    @staticmethod
    @torch.amp.custom_fwd(
        device_type="cuda", cast_inputs=torch.float32
    )  # a distribution wants float32, whatever the layer below computed in
    def forward(
        ctx: Any,
        x_NH: Tensor,
        head_DH: Tensor,
        teacher_RD: Tensor,
        teacher_of_N: Tensor,
        weight_N: Tensor,
        rule: Rule,
        share_D: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dx, dhead = torch.empty_like(x_NH), torch.empty_like(head_DH) if ctx.needs_input_grad[1] else None
        terms = torch.empty_like(weight_N)
        for start in range(0, x_NH.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            x, teacher, weight = x_NH[rows], teacher_RD[teacher_of_N[rows]], weight_N[rows, None]
            logits = x @ head_DH.t()
            if share_D is not None:
                logits += share_D
            log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
            loss, dlogits = rule(log_q, log_q.exp(), teacher)
            terms[rows] = weight[:, 0] * loss
            dlogits.mul_(weight)
            torch.mm(dlogits, head_DH, out=dx[rows])
            if dhead is None:
                continue
            if start == 0:
                torch.mm(dlogits.t(), x, out=dhead)
            else:
                dhead.addmm_(dlogits.t(), x)
        ctx.save_for_backward(dx, dhead)
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dhead = ctx.saved_tensors
        if dloss != 1:  # the loss itself is what is derived, as a rule: then both are done
            dx, dhead = dx * dloss, None if dhead is None else dhead * dloss
        return dx, dhead, None, None, None, None, None


def head_loss(
    x_NH: Tensor,
    head_DH: Tensor,
    teacher_RD: Tensor,
    teacher_of_N: Tensor,
    weight_N: Tensor,
    loss: str = "soft",
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over rows of a loss (a key of LOSSES) of softmax(x W^T) against the teacher's distribution, and its terms [N].

    Row n's teacher is `teacher_RD[teacher_of_N[n]]`. N must not be 0. With `columns` only those tokens are looked at, each as often as it
    stands for: the head is the largest product, and most of its tokens matter to no row of a batch.
    """
    if columns is None:
        return HeadLoss.apply(x_NH, head_DH, teacher_RD, teacher_of_N, weight_N, LOSSES[loss], None)
    teacher = teacher_RD[:, columns.ids] * columns.weight
    return HeadLoss.apply(x_NH, head_DH[columns.ids], teacher, teacher_of_N, weight_N, LOSSES[loss], columns.weight.log())
