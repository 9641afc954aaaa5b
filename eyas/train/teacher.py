"""The distribution that teaches: what the target would say next, over the draft vocabulary, from its last hidden state.

Knows the target's head and the steps from it to the logits; knows nothing of drafts or documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eyas.kernels.lowered import logits, part_of_thread
from eyas.model.protocols import TargetModel
from eyas.model.vocab import DraftVocab


@dataclass
class Teacher:
    """The target's head, cut to the D tokens of the draft vocabulary; its distribution is renormalised among them (EAGLE-3, draft model
    training)."""

    head_DH: Tensor
    member_V: Tensor  # bool: whether a target token is in the draft vocabulary
    bias_D: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, target: TargetModel, vocab: DraftVocab, dtype: torch.dtype) -> Teacher:
        """The teacher made from a target. The target must not be prepared yet: preparing drops the head's weights, which are read here."""
        head, bias = target.head_weight.detach(), target.head_bias
        cut = None if bias is None else bias.detach()[vocab.ids].to(dtype)
        member = vocab.member().to(head.device)
        return cls(head[vocab.ids].to(dtype), member, cut, target.logit_scale, target.logit_softcap)

    @cached_property
    def narrow_DH(self) -> Tensor:
        return self.head_DH.bfloat16()

    @cached_property
    def place_V(self) -> Tensor:
        """The draft's id of each target token, int64 [V]; of one outside the draft vocabulary, some other's."""
        return (self.member_V.cumsum(0) - 1).clamp_min(0)

    def distribution(self, hidden_MH: Tensor, argmax_M: Tensor | None = None) -> Tensor:
        """The target's distributions [M, D] over the draft vocabulary, from last hidden states [M, H]. With the ids of the target's
        likeliest tokens the product is in bfloat16 where the thread's others are; that is exact enough where these tokens are in the draft
        vocabulary, and other rows teach nothing."""
        if argmax_M is None or part_of_thread.get() is None:
            with torch.autocast(hidden_MH.device.type, enabled=False):  # logits of 20 in bfloat16 would be off by a 16th
                logits_MD = hidden_MH.to(self.head_DH.dtype) @ self.head_DH.t()
        else:
            logits_MD = logits(hidden_MH.bfloat16(), self.narrow_DH, self.place_V[argmax_M.clamp_min(0)])
        if self.bias_D is not None:
            logits_MD += self.bias_D
        logits_MD *= self.scale
        if self.softcap is not None:
            logits_MD = self.softcap * (logits_MD / self.softcap).tanh()
        return logits_MD.softmax(-1)

    def within(self, argmax_M: Tensor) -> Tensor:
        """Whether the target's likeliest token is in the draft vocabulary, bool [M]. `argmax_M`: ids of these tokens."""
        return self.member_V[argmax_M.clamp_min(0)]
