"""The weights that a draft shares with its target: its embedding and its head. They are neither trained nor saved with the draft.

Knows weights; knows nothing of what a draft computes between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import LAST_HIDDEN
from eyas.kernels.linear import Dense
from eyas.kernels.step import NativeStep
from eyas.model.cache import Pool, pool_on
from eyas.model.vocab import DraftVocab

if TYPE_CHECKING:
    from typing_extensions import Self

    from eyas.model.protocols import TargetModel


class FrozenHead(nn.Linear):
    """The target's own head, cut to a draft vocabulary: a draft uses it, and it is never trained or saved."""

    @classmethod
    def of(cls, target: TargetModel, vocab: DraftVocab, least: torch.dtype | None = None) -> FrozenHead:
        """The head made from a target, which must not be prepared yet, in its number format, or where that is narrower than `least` in this
        one. The target's softcap is left out: it changes how sure a draft is, not what it prefers."""
        weight_VH, bias_V = target.head_weight.detach(), target.head_bias
        with torch.device("meta"):
            head = cls(weight_VH.shape[1], len(vocab), bias=bias_V is not None, dtype=weight_VH.dtype)
        head.weight = nn.Parameter(weight_VH[vocab.ids.to(weight_VH.device)] * target.logit_scale, requires_grad=False)
        if bias_V is not None:
            head.bias = nn.Parameter(bias_V.detach()[vocab.ids] * target.logit_scale, requires_grad=False)
        return head if least is None else head.to(torch.promote_types(head.weight.dtype, least))


class SharedWeights(nn.Module):
    """Base class of a network that shares weights with its target; the first among its bases. Shared weights lie in lists, so that PyTorch
    does not take them for the network's own."""

    embedding: list[Tensor]  # [V, H]
    frozen: list[nn.Linear]  # the head, where it is the target's; else empty
    head: Dense  # the product with the head

    wants: tuple[int, ...] = LAST_HIDDEN  # what it reads of the target
    levels: int | None = None  # how deep it can guess; None: as deep as is asked for
    accuracies: list[list[float]] | None = None  # of its guesses, [depth - 1][rank], where they were measured
    one_call: NativeStep | None = None  # where the kernel can run a whole step
    pool: Pool | None = None  # once prepared on CUDA, where steps may be captured

    def share(self, embedding_VH: Tensor, head: nn.Linear | None = None) -> None:
        self.embedding, self.frozen = [embedding_VH], [] if head is None else [head]
        if head is not None:
            self.head = Dense(head)

    @property
    def witness(self) -> Tensor:
        """A parameter that packing keeps: it tells the network's number format and device."""
        return next(parameter for parameter in self.parameters() if parameter.dim() == 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.witness.dtype

    @property
    def device(self) -> torch.device:
        return self.witness.device

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self.embedding[0]).to(self.dtype)

    def packed(self, products: list[Dense], bits: int) -> Self:
        """Pack these products and the head for inference, and return the network. The head's logits are float32 or wider."""
        for product in products:
            product.pack(bits=bits)
            for layer in product.layers:
                layer.register_parameter("weight", None)
        if self.frozen:
            self.frozen[0].to(self.dtype)
            self.pack_wide(self.head, bits)
            self.frozen[0].register_parameter("weight", None)
        self.pool = pool_on(self.device)
        return self.eval().requires_grad_(False)

    def pack_wide(self, head: Dense, bits: int) -> None:
        head.pack(torch.float64 if self.dtype == torch.float64 else torch.float32, bits)
