"""Claims about writing in steps of fixed shapes: it says what the writer of any rows says, however many slots and lanes there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch

from eyas.train import fixed_writer
from eyas.train.fixed_writer import FixedWriter, fits
from eyas.train.questions import SelfPlay
from eyas.train.selfplay import Writer
from tests.tiny import tiny_target
from tests.train.test_selfplay import SETTINGS, forgetful, target
from tests.train.writing import QUESTIONS, template

KINDS = replace(
    SelfPlay("tiny", "chat", SETTINGS.taps),
    longest_question=40,
    longest_answer=60,
    longest=240,
    turns=(1, 2, 3),
    seeded_share=0.3,
    longest_text=40,
    longest_loop=20,
    loop_share=0.5,
    per_shard=6,
)


@cache
def said_by_any_rows(settings: SelfPlay, count: int, by) -> dict[int, tuple | None]:
    with torch.inference_mode():
        found = Writer(by(), template(), settings, QUESTIONS, 5).write(iter(range(count)))
        return {index: finished and told(finished.row) for index, finished in found}


def said_in_steps(settings: SelfPlay, count: int, by, slots: int) -> dict[int, tuple | None]:
    found = FixedWriter(by(), template(), settings, QUESTIONS, slots).write(iter(range(count)))
    return {index: row and told(row) for index, row in found}


def told(row) -> tuple:
    return row.tokens, row.answers, row.start.temperature, row.looped, row.read


@pytest.mark.parametrize("slots", [1, 7, 64])
@pytest.mark.parametrize("settings", [SETTINGS, KINDS], ids=["questions", "kinds"])
def test_steps_of_fixed_shapes_write_what_any_rows_write(settings, slots):
    wanted = said_by_any_rows(settings, 20, target)
    assert sum(each is not None for each in wanted.values()) >= 5
    assert said_in_steps(settings, 20, target, slots) == wanted


@pytest.mark.parametrize("stretch", [1, 3, 50])
def test_the_length_of_a_stretch_does_not_matter(monkeypatch, stretch):
    monkeypatch.setattr(fixed_writer, "STRETCH", stretch)
    assert said_in_steps(KINDS, 20, target, 8) == said_by_any_rows(KINDS, 20, target)


def test_loops_are_cut_as_elsewhere():
    settings = replace(KINDS, answer_temperatures=(0.0,), loop_gram=6)
    wanted = said_by_any_rows(settings, 20, forgetful)
    assert any(each and each[3] for each in wanted.values())
    assert said_in_steps(settings, 20, forgetful, 6) == wanted


def test_conversations_ask_about_the_text_before_them():
    """Given questions aside, what follows a conversation in its slot is decided by what that one said."""
    settings = replace(KINDS, task_share=1.0, seeded_share=0.0)
    found = said_in_steps(settings, 24, target, 8)
    assert found == said_by_any_rows(settings, 24, target)
    asking = FixedWriter(target(), template(), settings, (), 2).dialogues
    assert sum(map(asking.questions.follows, range(24))) > 12


def test_writing_may_be_left_off_and_slots_may_be_more_than_conversations():
    writer = FixedWriter(target(), template(), SETTINGS, (), 64)
    first = list(itertools.islice(writer.write(itertools.count()), 10))
    assert len(first) == 10
    assert {index for index, _ in writer.write(iter(range(3)))} == {0, 1, 2}


def test_targets_with_a_window_or_another_family_are_left_to_the_writer_of_any_rows():
    assert fits(target()) and not fits(tiny_target(sliding_window=8))
