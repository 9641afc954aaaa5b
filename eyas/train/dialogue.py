"""One self-written conversation, and the rules by which it begins, goes on and ends.

Whoever writes reads the waiting tokens with the target, draws the next one, and hands it to `Dialogues.go_on`. What a conversation says is
a function of (settings, index) and of what the target finds likely. Knows the template and its tokens; knows nothing of targets, of caches
or of how many conversations are written at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eyas.train.questions import Asked, Beginning, Questions, SelfPlay
from eyas.train.template import Template

SHORTEST = 8  # tokens of answers that a conversation has at least


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
        return self.answer(-1)

    def answer(self, number: int) -> list[int]:
        """The tokens of a finished answer, without the one that ended it."""
        return self.tokens[self.answers[number].start : self.answers[number].stop - 1]


class Dialogues:
    """The rules. `capacity`: tokens of a conversation."""

    def __init__(self, template: Template, settings: SelfPlay, given: Sequence[Asked], capacity: int) -> None:
        self.template, self.settings, self.capacity = template, settings, capacity
        self.questions = Questions(template, settings, given, capacity)

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

    def begin(self, index: int, text: Sequence[int] = ()) -> Conversation:
        """Conversation `index`, none of it read yet: the template's opening, then a given question or the first words of one, where it has
        such. `text`: of the conversation before it."""
        start = self.questions.begin(index, text)
        waiting = start.before + start.text
        row = Conversation(index, start, [], waiting + start.words, 0, len(waiting), start.asked)
        if row.asked:
            self.ask(row)
        elif start.whole or not self.template.chat:
            self.open_answer(row)
        return row

    def ask(self, row: Conversation) -> None:
        """Append the next given question, and open its answer."""
        row.waiting = row.waiting + self.given_tokens(row.asked[0])
        row.asked = row.asked[1:]
        self.open_answer(row)

    def given_tokens(self, question: str) -> list[int]:
        """The tokens of a given question, as many as are asked."""
        longest = self.capacity // 2 if self.settings.regenerate else self.settings.longest_question
        return self.template.tokens(question)[:longest]

    def open_answer(self, row: Conversation) -> None:
        """Close the question with the template, so that the next token drawn is an answer's first."""
        row.waiting = row.waiting + self.template.after
        row.part, row.asking = row.read + len(row.waiting), False
        row.grams.clear()

    def go_on(self, row: Conversation, token: int) -> bool:
        """The target has read what waited, and `token` was drawn. Says whether the conversation is over with it; if it is not, what waits
        now is to be read next."""
        row.tokens += row.waiting
        row.read = len(row.tokens)
        row.waiting = [token]
        return self.over(row, token)

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

    def finish(self, row: Conversation) -> bool:
        """Cut a conversation that is over behind its last answer, and say whether its answers have tokens enough. The last token may be
        written but not read: it has no feature, and as a label it needs none."""
        if sum(map(len, row.answers)) < SHORTEST:
            return False
        row.tokens = (row.tokens + row.waiting)[: row.answers[-1].stop]
        row.read = len(row.tokens) - 1
        return True


class Flight:
    """The conversations in flight: which slot has which, and which follows it there."""

    def __init__(self, dialogues: Dialogues, runs: Iterator[list[int]], slots: int) -> None:
        """`runs`: of the indices to be written; several flights may share them."""
        self.dialogues, self.runs = dialogues, runs
        self.waiting = dict(zip(range(slots), self.runs, strict=False))
        self.rows = {slot: dialogues.begin(run.pop(0)) for slot, run in self.waiting.items()}

    def follow(self, slot: int, kept: Conversation | None) -> Conversation | None:
        """The conversation that comes next in a slot, where one ended (None: it was dropped); None if there is none, and none will be."""
        text = kept.last_answer() if kept and not kept.looped else []
        run = self.waiting[slot] = self.waiting[slot] or next(self.runs, [])
        if not run:
            del self.rows[slot]
            return None
        row = self.rows[slot] = self.dialogues.begin(run.pop(0), text)
        return row


def asked_with(settings: SelfPlay, rows: Sequence[Conversation]) -> tuple[list[float], list[float]]:
    """The temperature and the top-p with which each of these draws."""
    temperatures = [1.0 if row.asking else row.start.temperature for row in rows]
    return temperatures, [settings.question_top_p if row.asking else settings.answer_top_p for row in rows]


def drawn(logits_NV: Tensor, temperature_N: Tensor, top_p_N: Tensor, u_N: Tensor, candidates: int) -> Tensor:
    """One token for each row [N], with temperature and top-p, from its likeliest candidates; `u_N` is uniform in (0, 1). All float32."""
    values, ids = logits_NV.float().topk(min(candidates, logits_NV.shape[-1]), -1)
    distribution = (values / temperature_N.clamp_min(1e-4)[:, None]).softmax(-1)
    above = distribution.cumsum(-1) - distribution
    distribution = distribution.masked_fill(above >= top_p_N[:, None], 0.0)
    place = (distribution.cumsum(-1) <= (u_N * distribution.sum(-1))[:, None]).sum(-1).clamp_max(distribution.shape[-1] - 1)
    place = torch.where(temperature_N > 0, place, 0)  # at temperature 0 the likeliest, however near the second is
    return ids.gather(1, place[:, None])[:, 0]
