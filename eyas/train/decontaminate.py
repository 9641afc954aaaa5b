"""Keeps training apart from evaluation: leaves out conversations that ask what an evaluation asks.

Two prompts meet where they share 13 tokens in a row. Knows tokens and where a conversation's questions lie; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from eyas.train.features import Example
from eyas.train.template import Template

GRAM = 13


def grams(tokens: Sequence[int], size: int = GRAM) -> set[tuple[int, ...]]:
    """All runs of `size` tokens."""
    return {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}


def all_grams(texts: Iterable[str], tokens: Callable[[str], list[int]]) -> set[tuple[int, ...]]:
    """All runs of tokens in these texts; `tokens` turns a text into tokens."""
    return set().union(*(grams(tokens(text)) for text in texts))


def meets(turns: Iterable[Sequence[int]], evaluated: set[tuple[int, ...]]) -> bool:
    """Whether one of a conversation's questions shares a run with an evaluation prompt."""
    return any(grams(turn) & evaluated for turn in turns)


def questions(example: Example, template: Template) -> Iterator[list[int]]:
    """The user turns of a conversation that the target wrote: the tokens before each answer, without the template's own."""
    tokens, answers = example.tokens, example.answers
    start, number = len(template.before), 0
    for place in range(1, len(tokens)):
        if answers[place] == number and answers[place - 1] != number:
            yield tokens[start : place - len(template.after)]
        if answers[place] < 0 and answers[place - 1] == number:
            start, number = place - 1 + len(template.again), number + 1


def decontaminated(examples: Sequence[Example], prompts: Sequence[str], template: Template) -> tuple[list[Example], int]:
    """The examples whose questions share no run of tokens with any of the prompts, and how many were left out."""
    evaluated = all_grams(prompts, template.tokens)
    kept = [example for example in examples if not meets(questions(example, template), evaluated)]
    return kept, len(examples) - len(kept)
