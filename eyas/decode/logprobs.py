"""The log probability of each token of an answer, and of the likeliest ones in its place.

They are of the target's own distribution, before bias, penalties, temperature and filters, as OpenAI's API and vLLM (`raw_logprobs`) tell
them. Knows logits and ids; knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """What the target thought of one token of the answer."""

    token: int
    logprob: float  # natural logarithm
    top: list[tuple[int, float]]  # (id, log probability) of the likeliest tokens, likeliest first


class Piece(str):
    """A piece of a streamed text with the log probabilities of the tokens committed since the piece before.

    Text may be held back (half a character, the beginning of a stop string), so the tokens may be ahead of it.
    """

    logprobs: list[TokenLogprobs]

    def __new__(cls, text: str, logprobs: list[TokenLogprobs]) -> Piece:
        piece = super().__new__(cls, text)
        piece.logprobs = logprobs
        return piece


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of N tokens and the `count` likeliest in their places, from the logits each was drawn after."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logprobs_NV = logits_NV.log_softmax(-1)
    own = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])[:, 0].tolist()
    best = logprobs_NV.topk(min(count, logits_NV.shape[1]), -1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprobs(token, logprob, list(zip(of, at, strict=True)))
        for token, logprob, of, at in zip(tokens, own, ids, values, strict=True)
    ]
