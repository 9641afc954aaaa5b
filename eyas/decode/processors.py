"""What is done to the target's logits before a token is drawn: bias, penalties, no end before so many tokens.

Each processor depends on the text so far and on a path below it, so every node of a tree has its own logits. Order and arithmetic are
transformers'; presence and frequency penalties, which transformers lacks, are OpenAI's, where vLLM has them. Knows tokens and logits; knows
nothing of trees, temperature or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from eyas.config import Request, Sampling

# (the text's tokens, those of a path below it, the target's logits [V] after both) -> the logits [V] to draw from. The text of a sequence
# only grows.
LogitsProcessor = Callable[[list[int], Sequence[int], Tensor], Tensor]


def processors_of(request: Request, prompt_length: int, eos_ids: Collection[int]) -> tuple[LogitsProcessor, ...]:
    """The processors that a request asks for, in the order in which they run. `eos_ids`: the target's own end-of-turn ids."""
    sampling, ends = request.sampling, end_ids(request, eos_ids)
    found: list[LogitsProcessor] = []
    if sampling.logit_bias:
        found.append(LogitBias(sampling.logit_bias))
    if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0):
        found.append(Penalties(sampling, prompt_length))
    if request.min_new_tokens and ends:
        found.append(NoEndBefore(prompt_length + request.min_new_tokens, ends))
    return tuple(found)


def end_ids(request: Request, eos_ids: Collection[int]) -> frozenset[int]:
    """The ids that end an answer to this request."""
    return frozenset(request.stop_token_ids) | frozenset(() if request.ignore_eos else eos_ids)


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self.ids = torch.tensor([token for token, _ in bias])
        self.values = torch.tensor([value for _, value in bias], dtype=torch.float32)

    def __call__(self, text: list[int], path: Sequence[int], logits_V: Tensor) -> Tensor:
        ids = self.ids.to(logits_V.device)
        return logits_V.index_add(0, ids, self.values.to(logits_V))


class Penalties:
    """Repetition (over prompt and answer), frequency and presence penalties (over the answer alone).

    Only the logits of tokens that were seen are read and written. The text's part is counted once, as it grows.
    """

    def __init__(self, sampling: Sampling, prompt_length: int) -> None:
        self.repetition, self.presence = sampling.repetition_penalty, sampling.presence_penalty
        self.frequency, self.prompt_length = sampling.frequency_penalty, prompt_length
        self.forget()

    def forget(self) -> None:
        self.counted = 0  # tokens of the text that are counted
        self.seen = torch.empty(0, dtype=torch.int64)  # ids that are penalised, each once
        self.seen_V = torch.empty(0, dtype=torch.bool)  # the same as a mask; this and the next are made with the first logits
        self.counts_V = torch.empty(0)  # how often each token is in the answer

    def __call__(self, text: list[int], path: Sequence[int], logits_V: Tensor) -> Tensor:
        self.count(text, logits_V.shape[0])
        below = torch.tensor(path, dtype=torch.int64)
        ids = torch.cat([self.seen, below])  # where one is there twice, both write the same
        counts = self.counts_V[ids] + (ids[:, None] == below).sum(1) if len(path) else self.counts_V[ids]
        ids = ids.to(logits_V.device)
        return logits_V.index_copy(0, ids, self.penalised(logits_V[ids], counts.to(logits_V)))

    def count(self, text: list[int], vocab_size: int) -> None:
        """Count the tokens that the text has grown by."""
        if len(text) < self.counted:  # an earlier state of the text is asked about
            self.forget()
        if not len(self.counts_V):
            self.seen_V, self.counts_V = torch.zeros(vocab_size, dtype=torch.bool), torch.zeros(vocab_size)
        if len(text) > self.counted:
            answer = torch.tensor(text[max(self.counted, self.prompt_length) :], dtype=torch.int64)
            met = torch.tensor(text[self.counted :], dtype=torch.int64) if self.repetition != 1 else answer
            self.seen = torch.cat([self.seen, met[~self.seen_V[met]].unique()])
            self.seen_V[met] = True
            self.counts_V.index_add_(0, answer, torch.ones(len(answer)))
            self.counted = len(text)

    def penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Logits of tokens that were seen; `counts`: how often each is in the answer."""
        if self.repetition != 1:
            logits = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
        return logits - self.frequency * counts - self.presence * (counts > 0)


class NoEndBefore:
    """Rules out the ids that end an answer until the text has `length` tokens."""

    def __init__(self, length: int, ends: Collection[int]) -> None:
        self.length, self.ends = length, torch.tensor(sorted(ends))

    def __call__(self, text: list[int], path: Sequence[int], logits_V: Tensor) -> Tensor:
        if len(text) + len(path) >= self.length:
            return logits_V
        return logits_V.index_fill(0, self.ends.to(logits_V.device), float("-inf"))
