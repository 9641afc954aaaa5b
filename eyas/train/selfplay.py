"""The target writes its own training data: it asks itself questions through its chat template's open user turn, and answers them.

A batched sampler over flat rows with continuous refill: the next conversation takes a finished one's slot at once. It hands over the
features and last hidden states that the target computes on the way, so training needs no second pass of the target.
Knows the target and the template; knows nothing of files (shards.py), processes (writers.py) or drafts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eyas.decode.sampling import uniforms
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.train.questions import Asked, Beginning, Questions, SelfPlay
from eyas.train.template import Template

SLOTS = 64  # conversations in flight for each worker: with more the products gain nothing and the keys leave the CPU's cache


@dataclass
class Conversation:
    """One conversation while it is written."""

    index: int  # its number among all conversations of the run
    start: Beginning
    tokens: list[int]  # those that the target has read
    waiting: list[int]  # the tokens after them: known, but not yet read by the target
    read: int  # number of tokens the target has read
    part: int  # position where the question or answer under way begins
    asked: tuple[str, ...] = ()  # the given questions that are still to come
    asking: bool = True  # whether a question is under way, not an answer
    looped: bool = False  # whether its answer was cut because it repeats itself
    answers: list[range] = field(default_factory=list)  # positions of the finished answers, their end-of-turn tokens included
    grams: set[tuple[int, ...]] = field(default_factory=set)  # runs of `loop_gram` tokens in the answer under way
    repeated: int = 0  # tokens that ended such a run a second time

    def numbers(self) -> list[int]:
        """For each token the number of the answer it belongs to, or -1."""
        found = [-1] * len(self.tokens)
        for number, places in enumerate(self.answers):
            found[places.start : places.stop] = [number] * len(places)
        return found

    def last_answer(self) -> list[int]:
        """The tokens of its last answer, without the one that ended it."""
        return self.tokens[self.answers[-1].start : self.answers[-1].stop - 1]


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
        self.questions = Questions(template, settings, given, self.capacity)
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
        runs = self.runs(indices)
        waiting = dict(zip(range(self.cache.slots), runs, strict=False))
        rows = {slot: self.begin(slot, run.pop(0)) for slot, run in waiting.items()}
        while rows:
            for slot, outcome in list(self.step(rows)):
                yield rows[slot].index, outcome
                text = outcome.row.last_answer() if outcome and not outcome.row.looped else []
                run = waiting[slot] = waiting[slot] or next(runs, [])
                if run:
                    rows[slot] = self.begin(slot, run.pop(0), text)
                else:
                    del rows[slot]

    def runs(self, indices: Iterator[int]) -> Iterator[list[int]]:
        """The indices, each with those that follow it: they are written one after the other in one slot."""
        run: list[int] = []
        for index in indices:
            if run and not self.questions.follows(index):
                yield run
                run = []
            run.append(index)
        if run:
            yield run

    def begin(self, slot: int, index: int, text: Sequence[int] = ()) -> Conversation:
        """Begin conversation `index` in `slot`: with the template's opening, then a given question or the first words of one, where the
        conversation has such. `text`: of the conversation before it."""
        start = self.questions.begin(index, text)
        before, opened = start.before, 0 if start.own_system else len(start.before) - 1
        self.cache.copy_prefix(self.opening, 0, slot, opened)
        self.handed_over[slot, :opened] = self.opening_states[:opened]
        self.target_argmax[slot] = -1
        waiting = before[opened:] + start.text
        row = Conversation(index, start, before[:opened], waiting + start.words, opened, opened + len(waiting), start.asked)
        if row.asked:
            self.ask(row)
        elif start.whole or not self.template.chat:
            self.open_answer(row)
        return row

    def ask(self, row: Conversation) -> None:
        """Append the next given question, and open its answer."""
        longest = self.capacity // 2 if self.settings.regenerate else self.settings.longest_question
        row.waiting = row.waiting + self.template.tokens(row.asked[0])[:longest]
        row.asked = row.asked[1:]
        self.open_answer(row)

    def open_answer(self, row: Conversation) -> None:
        """Close the question with the template, so that the next token drawn is an answer's first."""
        row.waiting = row.waiting + self.template.after
        row.part, row.asking = row.read + len(row.waiting), False
        row.grams.clear()

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
            row.tokens += row.waiting
            row.read += count
            row.waiting = [token]
            if self.over(row, token):
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
        """Draw one token for each conversation, with temperature and top-p, from its likeliest candidates. The draw takes one uniform
        number keyed by (the conversation's seed, position)."""
        settings = self.settings
        asking = torch.tensor([row.asking for row in rows])
        temperature = torch.tensor([1.0 if row.asking else row.start.temperature for row in rows])
        values, ids = logits.float().topk(min(settings.candidates, logits.shape[-1]), -1)
        distribution = (values / temperature.clamp_min(1e-4)[:, None]).softmax(-1)
        above = distribution.cumsum(-1) - distribution
        top_p = torch.where(asking, settings.question_top_p, settings.answer_top_p)
        distribution = distribution.masked_fill(above >= top_p[:, None], 0.0)
        u = torch.tensor([uniforms(row.start.seed, row.read + len(row.waiting), 1)[0] for row in rows], dtype=torch.float32)
        place = (distribution.cumsum(-1) <= (u * distribution.sum(-1))[:, None]).sum(-1).clamp_max(distribution.shape[-1] - 1)
        place = torch.where(temperature > 0, place, 0)  # at temperature 0 the likeliest, however near the second is
        return ids.gather(1, place[:, None])[:, 0].tolist()

    def over(self, row: Conversation, token: int) -> bool:
        """Take a drawn token, and say whether the conversation is over with it. A question's end opens the answer; an answer's end opens
        the next question, if there is to be one."""
        settings, drawn = self.settings, row.read + 1 - row.part  # tokens of the question or answer under way, this one included
        full = row.read + 2 >= self.capacity
        if row.asking:
            if token in self.template.ends and drawn > 3 and row.read + len(self.template.after) + 8 < self.capacity:
                row.waiting = []
                self.open_answer(row)
                return False
            return token in self.template.ends or drawn > settings.longest_question or full
        gram = (*row.tokens[-settings.loop_gram + 1 :], token)
        row.repeated += drawn >= settings.loop_gram and gram in row.grams
        row.looped = row.repeated > row.start.spare
        row.grams.add(gram)
        if not (row.looped or token in self.template.ends or drawn >= settings.longest_answer or full):
            return False
        row.answers.append(range(row.part, row.read + 1))
        again = self.template.again
        if row.looped or len(row.answers) >= row.start.turns or not again or token != again[0]:
            return True
        if row.read + len(again) + 16 > self.capacity:
            return True
        row.waiting = list(again)
        row.part, row.asking = row.read + len(again), True
        if row.asked:
            self.ask(row)
            return row.read + len(row.waiting) + 8 > self.capacity
        return False

    def finish(self, slot: int, row: Conversation) -> Finished | None:
        """The conversation, cut behind its last answer; None if its answers have too few tokens. The last token may be written but not
        read: it has no feature, and as a label it needs none."""
        if sum(map(len, row.answers)) < 8:
            return None
        row.tokens = (row.tokens + row.waiting)[: row.answers[-1].stop]
        row.read = len(row.tokens) - 1
        states = self.handed_over[slot, : row.read]
        width = len(self.settings.taps) * self.target.config.hidden_size
        return Finished(row, states[:, :width].clone(), states[:, width:].clone(), self.target_argmax[slot, : row.read].clone())
