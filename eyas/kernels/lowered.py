"""The dense products of a training step in bfloat16, on CPUs that multiply it faster than float32.

Each matrix is rounded once a step, by whichever worker needs it first; each input once, where it is made. Products are oneDNN's, which sums
in float32 and rounds what comes out. Whatever lies between products stays in float32, and so do the weights themselves. A matrix's gradient
is one product over the rows of all its uses, taken at the end: an unroll uses a matrix at every step, and deep steps have few rows.

`kernels/linear.py` asks here whether a thread computes so. Knows linear layers and rows; knows nothing of networks or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

Layers = tuple[nn.Linear, ...]  # that read the same input: their matrices are stacked


class Matrices:
    """Matrices in bfloat16, for all workers; each is made when it is first asked for."""

    def __init__(self) -> None:
        self.made: dict[Layers, Tensor] = {}
        self.lock = Lock()

    def of(self, layers: Layers) -> Tensor:
        """The stacked weights [sum of out, in]."""
        with self.lock:
            if layers not in self.made:
                parts = [layer.weight.detach().bfloat16() for layer in layers]
                self.made[layers] = parts[0] if len(parts) == 1 else torch.cat(parts)
            return self.made[layers]

    def clear(self) -> None:
        """The weights have changed: what was made of them is forgotten."""
        self.made.clear()


@dataclass
class Uses:
    """What the gradient of some stacked matrices is made of: for each use its output's gradients [N, out] and its inputs [N, in]."""

    reached: Tensor  # a leaf of autograd, which the product takes as an input: so the product is reached where x needs no gradient
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def gradient(self) -> Tensor:
        outputs, inputs = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.pairs, strict=True))
        return outputs.t() @ inputs


class Part:
    """One worker's part of a step."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.uses: dict[Layers, Uses] = {}

    def product(self, layers: Layers, x: Tensor) -> Tensor:
        """y [N, sum of out] = x [N, in] W^T + b, in the number format of x."""
        if layers not in self.uses:
            trained = any(layer.weight.requires_grad for layer in layers)
            self.uses[layers] = Uses(torch.zeros((), device=x.device, requires_grad=trained))
        uses = self.uses[layers]
        y = Product.apply(x, uses.reached, self.matrices.of(layers), uses)
        if layers[0].bias is None:
            return y
        return y + (layers[0].bias if len(layers) == 1 else torch.cat([layer.bias for layer in layers]))

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradients of a loss that was computed in this part, in the parameters' own number format."""
        reached = [uses.reached for uses in self.uses.values() if uses.reached.requires_grad]
        found = torch.autograd.grad(loss, [*parameters, *reached], allow_unused=True)[: len(parameters)]
        of_matrices: dict[Tensor, Tensor] = {}
        for layers, uses in self.uses.items():
            if uses.pairs:
                parts = uses.gradient().split([layer.out_features for layer in layers])
                for layer, part in zip(layers, parts, strict=True):
                    before = of_matrices.get(layer.weight)  # a matrix may be in several stacks
                    of_matrices[layer.weight] = part.to(layer.weight.dtype) if before is None else before + part
        gradients = []
        for parameter, direct in zip(parameters, found, strict=True):
            shares = [share for share in (direct, of_matrices.get(parameter)) if share is not None]
            gradients.append(sum(shares[1:], shares[0]) if shares else torch.zeros_like(parameter))
        return gradients


class Product(torch.autograd.Function):
    """x W^T with operands in bfloat16. The matrix's gradient is left to `Uses`."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, reached: Tensor, weight_OI: Tensor, uses: Uses) -> Tensor:
        low_NI = x_NI.bfloat16()
        ctx.save_for_backward(low_NI, weight_OI)
        ctx.uses, ctx.dtype = uses, x_NI.dtype
        return (low_NI @ weight_OI.t()).to(x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low_NI, weight_OI = ctx.saved_tensors
        low_NO = dy_NO.bfloat16()
        if reached := ctx.needs_input_grad[1]:
            ctx.uses.pairs.append((low_NO, low_NI))
        dx_NI = (low_NO @ weight_OI).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx_NI, dy_NO.new_zeros(()) if reached else None, None, None


def logits(x_NH: Tensor, head_DH: Tensor, likely_N: Tensor) -> Tensor:
    """x W^T [N, D] in float32 from operands in bfloat16. oneDNN rounds what it sums, here the distances from the logit of `likely_N`: so
    logits near this one are off by 2^-8 of their distance, not of their size, which at a size of 20 would be a 16th."""
    middle_N1 = (x_NH * head_DH[likely_N]).sum(-1, keepdim=True)
    return torch.addmm((-middle_N1).expand(-1, len(head_DH)), x_NH, head_DH.t()) + middle_N1.float()


part_of_thread: ContextVar[Part | None] = ContextVar("part_of_thread", default=None)


@contextmanager
def lowered(matrices: Matrices) -> Iterator[Part]:
    """Within the block this thread's loose products are computed in bfloat16, and belong to the part that is handed out."""
    part = Part(matrices)
    token = part_of_thread.set(part)
    try:
        yield part
    finally:
        part_of_thread.reset(token)
