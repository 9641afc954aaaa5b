"""The losses: the paper's cross-entropy against the target's distribution, and losses of acceptance itself.

Knows states, a head and distributions over the draft vocabulary; knows nothing of documents or steps. The head is the training's largest
matrix, so its gradient is taken in the forward pass, a chunk of rows at a time: logits [N, D] are never held whole.

A plugin adds a loss with `register`: a plain function of log q and p, or a rule that also returns its slope, as those here do.

p is the teacher's distribution, q the draft's, and acceptance = sum_v min(p_v, q_v) is the chance that EAGLE's rule keeps a token drawn
from q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError
from eyas.kernels import lowered

CHUNK = 512  # rows of logits held at once; more is slower (the rows leave the cache) and less pays the overhead more often
CHUNK_CUDA = 8192  # elsewhere, where launches are the overhead and logits take memory alone
DECAY = 3.0  # in lk-lambda the cross-entropy weighs exp(-DECAY * acceptance) (arXiv 2602.23881)

Loss = Callable[[Tensor, Tensor], Tensor]  # (log q, p), each [n, D] -> loss [n], in operations that autograd knows
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (log q, q, p), each [n, D] -> loss [n], its slope by q's logits [n, D]


def cross_entropy(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """-sum p log q, and its slope by the logits of q (EAGLE-3, draft model training). The slope is written over q."""
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
    """Add a loss from a plugin: either `loss`, as it stands in a paper, or `rule`, which brings its slope. Autograd finds the slope of a
    `loss`; the head's part of a step then takes 1.1 times as long with cross-entropy, 1.4 times with -log acceptance. Raises `EyasError`
    for a name that is taken, and for both or neither."""
    if name in LOSSES:
        raise EyasError(f"loss {name!r} exists already; choose another name")
    if rule is None and loss is not None:
        rule = by_autograd(name, loss)
    elif rule is None or loss is not None:
        raise EyasError(f"loss {name!r} needs either a loss, whose slope is found, or a rule that brings its own")
    LOSSES[name] = rule


def by_autograd(name: str, loss: Loss) -> Rule:
    """A rule made of a loss: autograd finds its slope, a chunk of rows at a time."""

    def rule(log_q: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = log_q.detach().requires_grad_()  # these may stand for the logits: a constant added to a whole row changes nothing
            terms = loss(logits.log_softmax(-1), p)
            if terms.shape != log_q.shape[:1] or not terms.requires_grad:
                raise EyasError(f"loss {name!r} must make one differentiable number of each row, [{len(log_q)}], not {tuple(terms.shape)}")
            (slope,) = torch.autograd.grad(terms.sum(), logits)
        return terms.detach(), slope

    return rule


class Columns(NamedTuple):
    """The tokens of the draft vocabulary that a batch's losses are computed over, and how many tokens each stands for."""

    ids: Tensor  # [C] draft ids, ascending
    weight: Tensor  # [C] 1 for tokens likely in the batch, D' / m for the m tokens drawn from the D' others


def choose_columns(teacher_RD: Tensor, likeliest: int, drawn: int, seed: int) -> Columns:
    """Choose all tokens that are among the `likeliest` of any row's distribution, and draw `drawn` of the others at random. A weighted sum
    over these columns estimates the sum over all tokens without bias."""
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
    """The sum over n of weight_n * loss(softmax(x_n W^T), teacher of n), and its terms [N], through which no gradient flows. Teacher rows
    sum to 1."""

    @staticmethod
    # a distribution needs float32, whatever format the layer below computed in
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(
        ctx: Any,
        x_NH: Tensor,
        head_DH: Tensor,
        teacher_RD: Tensor,
        teacher_of_N: Tensor,
        weight_N: Tensor,
        rule: Rule,
        share_D: Tensor | None,
        low: bool,
    ) -> tuple[Tensor, Tensor]:
        dx, dhead = torch.empty_like(x_NH), torch.empty_like(head_DH) if ctx.needs_input_grad[1] else None
        terms = torch.empty_like(weight_N)
        narrow = torch.bfloat16 if low else head_DH.dtype
        head_DH = head_DH.to(narrow)
        likely_R = teacher_RD.argmax(-1) if low else None
        chunk = CHUNK if x_NH.device.type == "cpu" else CHUNK_CUDA
        for start in range(0, x_NH.shape[0], chunk):
            rows = slice(start, start + chunk)
            x, teacher, weight = x_NH[rows].to(narrow), teacher_RD[teacher_of_N[rows]], weight_N[rows, None]
            logits = x @ head_DH.t() if likely_R is None else lowered.logits(x, head_DH, likely_R[teacher_of_N[rows]])
            if share_D is not None:
                logits += share_D
            log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
            loss, dlogits = rule(log_q, log_q.exp(), teacher)
            terms[rows] = weight[:, 0] * loss
            dlogits = dlogits.mul_(weight).to(narrow)
            if low:
                dx[rows] = dlogits @ head_DH
            else:
                torch.mm(dlogits, head_DH, out=dx[rows])
            if dhead is None:
                continue
            if low:
                share = dlogits.t() @ x
                dhead = dhead.copy_(share) if start == 0 else dhead.add_(share)
            elif start == 0:
                torch.mm(dlogits.t(), x, out=dhead)
            else:
                dhead.addmm_(dlogits.t(), x)
        ctx.save_for_backward(dx, dhead)
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dhead = ctx.saved_tensors
        if dloss.device.type != "cpu" or dloss != 1:  # mostly 1: then both are right already; to look would make CUDA wait
            dx, dhead = dx * dloss, None if dhead is None else dhead * dloss
        return dx, dhead, None, None, None, None, None, None


def head_loss(
    x_NH: Tensor,
    head_DH: Tensor,
    teacher_RD: Tensor,
    teacher_of_N: Tensor,
    weight_N: Tensor,
    loss: str = "soft",
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over rows of a loss (a key of LOSSES) of softmax(x W^T) against the teacher's distribution, and its terms [N].

    Row n's teacher is `teacher_RD[teacher_of_N[n]]`. N must not be 0. With `columns` only those tokens are computed, and each counts for as
    many as it stands for: the head is the largest product, and most tokens matter to no row of a batch.
    """
    low = lowered.part_of_thread.get() is not None
    if columns is None:
        return HeadLoss.apply(x_NH, head_DH, teacher_RD, teacher_of_N, weight_N, LOSSES[loss], None, low)
    teacher = teacher_RD[:, columns.ids] * columns.weight
    return HeadLoss.apply(x_NH, head_DH[columns.ids], teacher, teacher_of_N, weight_N, LOSSES[loss], columns.weight.log(), low)
