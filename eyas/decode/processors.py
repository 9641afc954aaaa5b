"""What is done to the target's logits before a token is drawn: bias, penalties, no end before so many tokens.

Each processor depends on the text so far and on a path below it, so every node of a tree has its own logits. Order and arithmetic are
transformers'; presence and frequency penalties, which transformers lacks, are OpenAI's, where vLLM has them. Knows tokens and logits; knows
nothing of trees, temperature or noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eyas.config import Request, Sampling
from eyas.decode.tree import Tree

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


class Processor:
    """A processor that drafters use too: it processes the logits of several paths at once, and of a part of the vocabulary."""

    def __call__(self, text: list[int], path: Sequence[int], logits_V: Tensor) -> Tensor:
        return self.rows(text, [path], logits_V[None], None)[0]

    def rows(self, text: list[int], paths: Sequence[Sequence[int]], logits_RC: Tensor, columns_V: Tensor | None) -> Tensor:
        """The logits [R, C] after each of R paths. `columns_V`: each token's column, -1: none; None: column i is token i."""
        raise NotImplementedError

    def aside(self) -> AbstractContextManager[None]:
        """In this context it is asked about rows that the target draws nothing at: a draft's guesses, and what a watcher wants to know."""
        return nullcontext()

    def forces(self, text: list[int]) -> bool:
        """Whether it says by itself what follows the text, so that no draft need be asked."""
        return False

    def fit(self, text: list[int], tree: Tree, nodes: int, deepest: int) -> Tree:
        """A tree of guesses below the text without those that will be ruled out for sure; with some of its own, up to `nodes` in all and
        `deepest` levels."""
        return tree


def placed(ids: Tensor, columns_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ids that have a column, and their columns."""
    if columns_V is None:
        return ids, ids
    columns = columns_V[ids]
    return ids[columns >= 0], columns[columns >= 0]


class LogitBias(Processor):
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Sequence[tuple[int, float]]) -> None:
        self.ids = torch.tensor([token for token, _ in bias])
        self.values_V = torch.zeros(int(self.ids.max()) + 1).index_copy(0, self.ids, torch.tensor([float(value) for _, value in bias]))

    def rows(self, text: list[int], paths: Sequence[Sequence[int]], logits_RC: Tensor, columns_V: Tensor | None) -> Tensor:
        ids, columns = placed(self.ids, columns_V)
        values = self.values_V[ids].to(logits_RC).expand(len(paths), -1)
        return logits_RC.index_add(1, columns.to(logits_RC.device), values)


class Penalties(Processor):
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

    def rows(self, text: list[int], paths: Sequence[Sequence[int]], logits_RC: Tensor, columns_V: Tensor | None) -> Tensor:
        self.count(text, logits_RC.shape[1] if columns_V is None else columns_V.shape[0])
        ids, columns = placed(self.seen, columns_V)
        columns = columns.to(logits_RC.device)
        out_RC = logits_RC.index_copy(1, columns, self.penalised(logits_RC[:, columns], self.counts_V[ids]))
        below = [(row, token, times) for row, path in enumerate(paths) for token, times in Counter(path).items()]
        if below:  # tokens of the paths, written anew with their own counts
            rows, ids, times = torch.tensor(below).unbind(1)
            columns = ids if columns_V is None else columns_V[ids]
            has = columns >= 0
            places = rows[has].to(logits_RC.device), columns[has].to(logits_RC.device)
            out_RC[places] = self.penalised(logits_RC[places], (self.counts_V[ids] + times)[has])
        return out_RC

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
        """Logits [.., S] of tokens that were seen; `counts` [S]: how often each is in the answer."""
        counts = counts.to(logits)
        if self.repetition != 1:
            logits = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
        return logits - self.frequency * counts - self.presence * (counts > 0)


class NoEndBefore(Processor):
    """Rules out the ids that end an answer until the text has `length` tokens."""

    def __init__(self, length: int, ends: Collection[int]) -> None:
        self.length, self.ends = length, torch.tensor(sorted(ends))

    def rows(self, text: list[int], paths: Sequence[Sequence[int]], logits_RC: Tensor, columns_V: Tensor | None) -> Tensor:
        early = torch.tensor([len(text) + len(path) < self.length for path in paths])
        if not bool(early.any()):
            return logits_RC
        ruled_out_RC = torch.zeros(logits_RC.shape, dtype=torch.bool)
        ruled_out_RC[:, placed(self.ends, columns_V)[1]] = True
        return logits_RC.masked_fill((ruled_out_RC & early[:, None]).to(logits_RC.device), float("-inf"))
