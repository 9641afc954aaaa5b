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
    """sum over n of weight_n * H(teacher_n, softmax(x_n W^T)); teacher rows sum to 1."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, head_DH: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> Tensor:
        dx, dhead = torch.empty_like(x_NH), torch.zeros_like(head_DH)
        loss = x_NH.new_zeros(())
        for start in range(0, x_NH.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            x, teacher, weight = x_NH[rows], teacher_ND[rows], weight_N[rows, None]
            logits = x @ head_DH.t()
            normaliser = logits.logsumexp(-1, keepdim=True)
            loss += (weight[:, 0] * (normaliser[:, 0] - (teacher * logits).sum(-1))).sum()
            dlogits = logits.sub_(normaliser).exp_().sub_(teacher).mul_(weight)
            torch.mm(dlogits, head_DH, out=dx[rows])
            dhead.addmm_(dlogits.t(), x)
        ctx.save_for_backward(dx, dhead)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        dx, dhead = ctx.saved_tensors
        return dx * dloss, dhead * dloss, None, None


def soft_cross_entropy(x_NH: Tensor, head_DH: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted sum over rows of the cross-entropy of softmax(x W^T) against the teacher's law (EAGLE-3, draft model training)."""
    return SoftCrossEntropy.apply(x_NH, head_DH, teacher_ND, weight_N)
