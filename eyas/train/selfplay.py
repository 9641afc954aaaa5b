"""The target writes its own training data: it asks itself questions through its chat template's open user turn, and answers them.

A batched sampler over flat rows with continuous refill: the next conversation takes a finished one's slot at once. It hands over the
features and last hidden states that the target computes on the way, so training needs no second pass of the target.
Knows the target and the template; knows nothing of files (shards.py), processes (writers.py) or drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eyas.decode.sampling import uniforms
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.train.dialogue import Conversation, Dialogues, Flight, asked_with, drawn
from eyas.train.questions import Asked, SelfPlay
from eyas.train.template import Template

SLOTS = 64  # conversations in flight for each worker: with more the products gain nothing and the keys leave the CPU's cache


class Finished(NamedTuple):
    """A finished conversation of n read tokens, with the target's states at each."""

    row: Conversation
    features: Tensor  # [n, taps * H] bfloat16
    hidden: Tensor  # [n, H] bfloat16, after the final norm
    target_argmax: Tensor  # [n] int32: the target's argmax over its full vocabulary, at rows the target was asked about (others -1)


class Writer:
    """Keeps `slots` conversations in flight; what a conversation says is a function of (settings, index) alone."""

    def __init__(self, target: TargetModel, template: Template, settings: SelfPlay, given: Sequence[Asked], slots: int) -> None:
        self.target, self.template, self.settings = target, template, settings
        self.capacity = min(settings.longest, target.config.max_position_embeddings)
        self.dialogues = Dialogues(template, settings, given, self.capacity)
        self.cache = target.new_cache(slots, self.capacity)
        width = (len(settings.taps) + 1) * target.config.hidden_size
        self.handed_over = torch.empty(slots, self.capacity, width, dtype=torch.bfloat16)
        self.target_argmax = torch.full((slots, self.capacity), -1, dtype=torch.int32)
        # Every conversation begins with the same tokens: they are read once, and their rows copied to each slot.
        opening = template.before[:-1]
        self.opening = target.new_cache(1, max(1, len(opening)))
        self.opening_states = torch.empty(0, width, dtype=torch.bfloat16)
        if opening:
            read = target(chain_rows(0, opening, 0), self.opening, settings.taps, slice(0, 1))
            self.opening_states = torch.cat([read.tapped, read.hidden], -1).to(torch.bfloat16)

    def write(self, indices: Iterator[int]) -> Iterator[tuple[int, Finished | None]]:
        """Write the conversations of these indices, and yield (index, conversation) as each ends; None for a conversation whose answers are
        too short. Of a shard's indices none may be left out: a conversation may ask about the text of the one before it."""
        flight = Flight(self.dialogues, self.dialogues.runs(indices), self.cache.slots)
        for slot, row in flight.rows.items():
            self.open(slot, row)
        while flight.rows:
            for slot, outcome in list(self.step(flight.rows)):
                yield flight.rows[slot].index, outcome
                if row := flight.follow(slot, outcome.row if outcome else None):
                    self.open(slot, row)

    def begin(self, slot: int, index: int) -> Conversation:
        """Begin conversation `index` in `slot`."""
        row = self.dialogues.begin(index)
        self.open(slot, row)
        return row

    def open(self, slot: int, row: Conversation) -> None:
        """Make a slot ready for a conversation of which nothing is read yet: the usual opening is taken from where it was read once."""
        opened = 0 if row.start.own_system else len(row.start.before) - 1
        self.cache.copy_prefix(self.opening, 0, slot, opened)
        self.handed_over[slot, :opened] = self.opening_states[:opened]
        self.target_argmax[slot] = -1
        row.tokens, row.waiting, row.read = row.waiting[:opened], row.waiting[opened:], opened

    def step(self, rows: dict[int, Conversation]) -> Iterator[tuple[int, Finished | None]]:
        """Read the waiting tokens of all conversations in one pass, and draw one token for each. Yields (slot, conversation) for each that
        is over; None for a conversation that is dropped."""
        slots = list(rows)
        counts = [len(row.waiting) for row in rows.values()]
        tokens = torch.tensor([token for row in rows.values() for token in row.waiting])
        positions = torch.cat([torch.arange(row.read, row.read + count) for row, count in zip(rows.values(), counts, strict=True)])
        last = torch.tensor(np.cumsum(counts) - 1)
        pass_rows = Rows(tokens, positions, [Segment(slot, count) for slot, count in zip(slots, counts, strict=True)])
        out = self.target(pass_rows, self.cache, self.settings.taps, last)
        self.hand_over(rows, counts, torch.cat([out.tapped, out.hidden], -1))
        ends = torch.tensor([row.read + count - 1 for row, count in zip(rows.values(), counts, strict=True)])
        self.target_argmax[torch.tensor(slots), ends] = out.logits.argmax(-1).int()
        chosen = self.choose(out.logits, list(rows.values()))
        for (slot, row), token, count in zip(rows.items(), chosen, counts, strict=True):
            self.cache.keep(slot, range(count))
            if self.dialogues.go_on(row, token):
                yield slot, self.finish(slot, row)

    def hand_over(self, rows: dict[int, Conversation], counts: list[int], states: Tensor) -> None:
        """Note the states [sum of counts, (taps + 1) * H] of the rows that the pass read."""
        states = states.to(torch.bfloat16)
        if all(count == 1 for count in counts):
            self.handed_over[torch.tensor(list(rows)), torch.tensor([row.read for row in rows.values()])] = states
            return
        for (slot, row), part in zip(rows.items(), states.split(counts), strict=True):
            self.handed_over[slot, row.read : row.read + len(part)] = part

    def choose(self, logits: Tensor, rows: list[Conversation]) -> list[int]:
        """Draw one token for each conversation. The draw takes one uniform number keyed by (the conversation's seed, position)."""
        u = [uniforms(row.start.seed, row.read + len(row.waiting), 1)[0] for row in rows]
        temperature, top_p, u = (torch.tensor(each, dtype=torch.float32) for each in (*asked_with(self.settings, rows), u))
        return drawn(logits, temperature, top_p, u, self.settings.candidates).tolist()

    def finish(self, slot: int, row: Conversation) -> Finished | None:
        """The conversation that is over, with its states; None if its answers have too few tokens."""
        if not self.dialogues.finish(row):
            return None
        states = self.handed_over[slot, : row.read]
        width = len(self.settings.taps) * self.target.config.hidden_size
        return Finished(row, states[:, :width].clone(), states[:, width:].clone(), self.target_argmax[slot, : row.read].clone())
