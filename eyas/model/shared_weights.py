"""What a draft borrows of its target: the embedding it reads and the head it speaks through, neither trained nor saved with it.

Knows weights; knows nothing of what a draft computes between the two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import LAST_HIDDEN
from eyas.kernels.linear import Dense
from eyas.model.cache import Pool, pool_on
from eyas.model.vocab import DraftVocab


class FrozenHead(nn.Linear):
    """The target's own head, cut to a draft vocabulary: read by a draft, never trained, never saved."""

    @classmethod
    def of(cls, target: Any, vocab: DraftVocab) -> FrozenHead:
        """Of a target that is not yet prepared. A softcap is left out: it changes how sure a draft is, not what it prefers."""
        weight_VH, bias_V = target.head_weight.detach(), target.head_bias
        with torch.device("meta"):
            head = cls(weight_VH.shape[1], len(vocab), bias=bias_V is not None, dtype=weight_VH.dtype)
        head.weight = nn.Parameter(weight_VH[vocab.ids.to(weight_VH.device)] * target.logit_scale, requires_grad=False)
        if bias_V is not None:
            head.bias = nn.Parameter(bias_V.detach()[vocab.ids] * target.logit_scale, requires_grad=False)
        return head


class Borrowing:
    """Beside `nn.Module` among a network's bases. Borrowed parts lie in lists: they are not the network's own."""

    wants: tuple[int, ...] = LAST_HIDDEN  # what it reads of the target
    levels: int | None = None  # how deep it can guess; None: as deep as is asked for
    accuracies: list[list[float]] | None = None  # of its guesses by depth and rank, where they were measured
    pool: Pool | None = None  # once prepared on CUDA, where steps may be captured

    def borrow(self, embedding_VH: Tensor, head: nn.Linear | None = None) -> None:
        self.embedding, self.frozen = [embedding_VH], [head]
        self.head = None if head is None else Dense(head)

    @property
    def witness(self) -> Tensor:
        """A parameter that stays when products are packed."""
        return next(parameter for parameter in self.parameters() if parameter.dim() == 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.witness.dtype

    @property
    def device(self) -> torch.device:
        return self.witness.device

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self.embedding[0]).to(self.dtype)

    def packed(self, products: list[Dense], bits: int) -> Any:
        """Ready for inference: these products packed, and the head, whose logits stay wide."""
        for product in products:
            product.pack(bits=bits)
            for layer in product.layers:
                layer.weight = None
        if self.head:
            self.frozen[0].to(self.dtype)
            self.pack_wide(self.head, bits)
            self.frozen[0].weight = None
        self.pool = pool_on(self.device)
        return self.eval().requires_grad_(False)

    def pack_wide(self, head: Dense, bits: int) -> None:
        head.pack(torch.float64 if self.dtype == torch.float64 else torch.float32, bits)
