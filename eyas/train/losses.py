"""What a draft is taught with: cross-entropy against the target's law over the draft vocabulary.

Knows states, a head and laws; knows nothing of documents or steps. The head is the training's largest matrix, so its gradient is taken
in the forward pass, a chunk of rows at a time: logits [N, D] are never held whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows of logits held at once; more is slower (the rows leave the cache) and less pays the overhead more often


class SoftCrossEntropy(torch.autograd.Function):
    """sum over n of weight_n * H(teacher of n, softmax(x_n W^T)), and its terms [N] to look at; teacher rows sum to 1."""

    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, head_DH: Tensor, teacher_RD: Tensor, teacher_of_N: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        dx, dhead = torch.empty_like(x_NH), torch.empty_like(head_DH)
        terms = torch.empty_like(weight_N)
        for start in range(0, x_NH.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            x, teacher, weight = x_NH[rows], teacher_RD[teacher_of_N[rows]], weight_N[rows, None]
            logits = x @ head_DH.t()
            normaliser = logits.logsumexp(-1, keepdim=True)
            terms[rows] = weight[:, 0] * (normaliser[:, 0] - torch.einsum("nd,nd->n", teacher, logits))
            dlogits = logits.sub_(normaliser).exp_().sub_(teacher).mul_(weight)
            torch.mm(dlogits, head_DH, out=dx[rows])
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
            dx, dhead = dx * dloss, dhead * dloss
        return dx, dhead, None, None, None


def soft_cross_entropy(x_NH: Tensor, head_DH: Tensor, teacher_RD: Tensor, teacher_of_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum over rows of the cross-entropy of softmax(x W^T) against the teacher's law, and its terms [N].

    Row n's teacher is `teacher_RD[teacher_of_N[n]]` (EAGLE-3, draft model training). N must not be 0.
    """
    return SoftCrossEntropy.apply(x_NH, head_DH, teacher_RD, teacher_of_N, weight_N)
