"""Claims about keeping training apart from evaluation: a shared run of 13 tokens in any question, and nothing else, leaves one out."""

from __future__ import annotations

from eyas.train.decontaminate import GRAM, decontaminated, questions
from eyas.train.features import Example
from eyas.train.template import Template
from tests.tiny import byte_tokenizer

TEMPLATE = Template(byte_tokenizer(), (257,))


def conversation(*turns: tuple[str, str]) -> Example:
    """Question and answer, turn after turn, as self-play lays them out."""
    tokens, answers = list(TEMPLATE.before), [-1] * len(TEMPLATE.before)
    for number, (question, answer) in enumerate(turns):
        asked = TEMPLATE.tokens(question) + TEMPLATE.after
        said = [*TEMPLATE.tokens(answer), 257]
        tokens, answers = tokens + asked + said, answers + [-1] * len(asked) + [number] * len(said)
        if number < len(turns) - 1:
            tokens, answers = tokens + TEMPLATE.again[1:], answers + [-1] * (len(TEMPLATE.again) - 1)
    return Example(tokens, answers)


def test_questions_are_found_in_every_turn():
    asked = [("How high can a hawk fly?", "High."), ("And an owl?", "Less."), ("Who?", "You.")]
    found = [byte_tokenizer().decode(turn) for turn in questions(conversation(*asked), TEMPLATE)]
    assert found == [question for question, _ in asked]


def test_conversations_that_ask_what_an_evaluation_asks_are_left_out():
    shared = "a" * GRAM
    first, second = conversation((f"x{shared}y", "no")), conversation(("hello", "no"), (f"{shared}z", "no"))
    short, answered = conversation(("a" * (GRAM - 1), "no")), conversation(("hi", f"it is {shared}"))
    kept, dropped = decontaminated([first, second, short, answered], ["unlike", f"what is {shared}?"], TEMPLATE)
    assert kept == [short, answered] and dropped == 2
