"""Training examples and the target's states at their tokens: from shards that self-play wrote, or from a pass of the target on the fly.

Either way an example is tokens with answer numbers, and `states` gives features [M, taps * H], last hidden states [M, H] and the target's
likeliest tokens [M] for a list of examples. Knows documents, shards and the target's pass; knows nothing of the draft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment
from eyas.train.conversations import Document

SCORED = 256  # rows whose logits over the whole vocabulary are held at once


@dataclass(frozen=True)
class Example:
    """A document, and where its states are stored."""

    tokens: list[int]
    answers: list[int]  # for each token the number of its answer; -1 outside
    greedy: bool = False  # whether the answer is the target's own at temperature 0
    source: Path | None = None  # its shard; None: the target computes its states
    start: int = 0  # first row of its states in `source`
    conversation: int | None = None  # the same number for documents that were made of one conversation; None: it has no others

    @property
    def key(self) -> str:
        """Its name in messages: its shard and first row there, or a hash of its tokens."""
        if self.source is not None:
            return f"{self.source.parent.name}/{self.source.name}:{self.start}"
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:10]


class States(NamedTuple):
    features: Tensor  # [M, 3H]
    hidden: Tensor  # [M, H] after the target's final norm
    target_argmax: Tensor  # [M] int64, the target's argmax; -1 where not computed


class StateSource(Protocol):
    def states(self, examples: Sequence[Example]) -> States: ...


def shard_examples(paths: Sequence[Path], max_length: int) -> list[Example]:
    """Examples of self-written shards. The last token of each was never read by the target: it is only a label."""
    examples = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tokens, lengths = file.get_tensor("tokens").tolist(), file.get_tensor("lengths").tolist()
            numbers, temperatures = file.get_tensor("answers").tolist(), file.get_tensor("temperatures").tolist()
        place = row = 0  # where a document begins among the shard's tokens, and among its states
        for length, temperature in zip(lengths, temperatures, strict=True):
            kept = slice(place, place + min(length, max_length))
            if sum(number >= 0 for number in numbers[kept]) >= 8:
                examples.append(Example(tokens[kept], numbers[kept], temperature == 0, path, row))
            place, row = place + length, row + length - 1
    return examples


class ShardStates:
    """Reads the states that self-play stored; only those that are asked for are held in memory."""

    def states(self, examples: Sequence[Example]) -> States:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for example in examples:
            with safe_open(example.source, framework="pt") as file:
                rows = slice(example.start, example.start + len(example.tokens) - 1)
                part = [file.get_slice(name)[rows] for name in ("features", "hidden", "favourites")]
            # the last token has no state; a row of zeros keeps rows and tokens in step, and no anchor reads it
            features, hidden, target_argmax = (torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) for tensor in part)
            parts.append((features, hidden, target_argmax))
        features, hidden, target_argmax = (torch.cat(column) for column in zip(*parts, strict=True))
        return States(features, hidden, target_argmax.long())


class TargetStates:
    """Runs the target over the documents, all of them in one flat pass."""

    def __init__(self, target: TargetModel, taps: Sequence[int]) -> None:
        self.target, self.taps = target, taps

    @torch.no_grad()
    def states(self, examples: Sequence[Example]) -> States:
        with self.target.device:  # wherever the draft may train
            return self.read(examples)

    def read(self, examples: Sequence[Example]) -> States:
        lengths = [len(example.tokens) for example in examples]
        cache = self.target.new_cache(len(examples), max(lengths))
        tokens = torch.tensor([token for example in examples for token in example.tokens])
        positions = torch.cat([torch.arange(length) for length in lengths])
        answers = torch.tensor([number for example in examples for number in example.answers])
        asked = torch.cat([answers[1:] >= 0, torch.tensor([False])]).nonzero()[:, 0]  # rows whose next token is an answer's
        rows = Rows(tokens, positions, [Segment(slot, length) for slot, length in enumerate(lengths)])
        out = self.target(rows, cache, self.taps, slice(0, 0))
        target_argmax = torch.full((len(tokens),), -1)
        for part in asked.split(SCORED):
            target_argmax[part] = self.target.head(out.hidden[part]).argmax(-1)
        return States(out.tapped, out.hidden, target_argmax)


class TapsOf:
    """A source with the features of some of another source's taps, so that one text serves drafts that read different layers."""

    def __init__(self, source: StateSource, held: Sequence[int], wanted: Sequence[int]) -> None:
        self.source, self.count, self.places = source, len(held), [list(held).index(tap) for tap in wanted]

    def states(self, examples: Sequence[Example]) -> States:
        states = self.source.states(examples)
        parts = states.features.chunk(self.count, -1)
        return states._replace(features=torch.cat([parts[place] for place in self.places], -1))


def document_examples(documents: Sequence[Document], conversations: Sequence[int | None] | None = None) -> list[Example]:
    """Examples of documents; `conversations`: for each the number of the conversation that it was made of."""
    numbers = conversations or [None] * len(documents)
    return [Example(document.tokens, document.answers, conversation=number) for document, number in zip(documents, numbers, strict=True)]
