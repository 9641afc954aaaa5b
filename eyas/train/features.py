"""Training examples and the target's states at their tokens: from shards that self-play wrote, or from a pass of the target on the fly,
whose states may be kept.

Either way an example is tokens with answer numbers, and `states` gives features [M, taps * H], last hidden states [M, H] and the target's
likeliest tokens [M] for a list of examples. Knows documents, shards and the target's pass; knows nothing of the draft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from eyas.decode.memory import free_bytes
from eyas.launched import count_here
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment
from eyas.train.conversations import Document
from eyas.train.shards import Written, written_in

SCORED = 256  # rows whose logits over the whole vocabulary are held at once
LEAST_ANSWER = 8  # tokens of answers that a self-written example has at least
UNEVEN = 1.2  # a process has this many times its share of the examples at most, as a rule
KEPT_SHARE = {"cuda": 0.7, "cpu": 0.5}  # share of the free memory that kept states may take; training takes the rest


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
        row = 0  # where a conversation begins among the shard's states
        for written in written_in(path):
            examples += written_examples(written, max_length, path, row)
            row += len(written.tokens) - 1
    return examples


def written_examples(written: Written, max_length: int, source: Path | None = None, start: int = 0) -> list[Example]:
    """The example that a conversation makes, cut to `max_length` tokens; none where too little of an answer is left."""
    tokens, answers = written.tokens[:max_length], written.answers[:max_length]
    enough = sum(number >= 0 for number in answers) >= LEAST_ANSWER
    return [Example(tokens, answers, written.temperature == 0, source, start)] if enough else []


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


class KeptStates:
    """Another source's states, asked for once and kept in bfloat16, as shards keep them, on the device where they came to be. What does not
    fit into `rows` rows is asked for again each time."""

    def __init__(self, source: StateSource, rows: int) -> None:
        self.source, self.rows, self.used = source, rows, 0
        self.slabs: list[Tensor] = []  # features, hidden and target_argmax of all kept rows, once their widths are known
        self.places: dict[int, tuple[Example, slice]] = {}  # by id; an example that is held here keeps its id
        self.begun: set[int] = set()  # by id: those that have their rows, which another worker may still be writing
        self.lock = Lock()  # workers ask at once

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the examples whose states are not kept."""
        return [example for example in examples if id(example) not in self.places]

    @torch.no_grad()
    def states(self, examples: Sequence[Example]) -> States:
        missing = self.missing(examples)
        new: dict[int, list[Tensor]] = {}
        if missing:
            found = self.source.states(missing)
            columns = [found.features.bfloat16(), found.hidden.bfloat16(), found.target_argmax]
            parts = zip(*(column.split([len(example.tokens) for example in missing]) for column in columns), strict=True)
            new = {id(example): list(part) for example, part in zip(missing, parts, strict=True)}
            self.keep(missing, new)
        held = [new.get(id(example)) or [slab[self.places[id(example)][1]] for slab in self.slabs] for example in examples]
        features, hidden, target_argmax = (torch.cat(column) for column in zip(*held, strict=True))
        return States(features, hidden, target_argmax)

    def keep(self, examples: Sequence[Example], states: dict[int, list[Tensor]]) -> None:
        """Copy the states of these examples into the slabs, as far as there is room."""
        for example in examples:
            part, count = states[id(example)], len(example.tokens)
            with self.lock:
                if self.used + count > self.rows or id(example) in self.begun:
                    continue
                self.begun.add(id(example))
                self.slabs = self.slabs or [each.new_empty(self.rows, *each.shape[1:]) for each in part]
                place, self.used = slice(self.used, self.used + count), self.used + count
            for slab, each in zip(self.slabs, part, strict=True):
                slab[place] = each
            self.places[id(example)] = (example, place)


def kept_states(target: TargetModel, taps: Sequence[int], examples: Sequence[Example], processes: int = 1, taken: int = 0) -> KeptStates:
    """The states of these examples from a target that is prepared, kept as far as the memory of its device goes. `processes`: over how many
    the examples are dealt out; `taken`: bytes that each of these will take besides."""
    device = target.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    wanted = sum(len(example.tokens) for example in examples)
    if processes > 1:
        wanted = int(UNEVEN * wanted / processes) + max(len(example.tokens) for example in examples)
    row = 2 * (len(taps) + 1) * target.config.hidden_size + 8  # bytes
    takers = 1 if device.type == "cuda" else count_here()  # a CPU's memory is shared by all processes there
    room = wanted if free is None else max(int(KEPT_SHARE.get(device.type, 0.5) * (free / takers - taken)), 0) // row
    return KeptStates(TargetStates(target, taps), min(wanted, room))


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
