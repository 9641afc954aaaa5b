"""`eyas lesson ttt`: two drafts that differ in their unroll steps alone, told step by step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eyas.commands import lesson
from eyas.commands.parser import parser
from eyas.train.texts import pack_text, read_facts, read_text
from eyas.train.trainer import Budget

pytestmark = pytest.mark.usefixtures("writes_here")


def words(models, *more) -> list:
    return ["lesson", "ttt", "--target", models / "target", "--self-play", "300", "--workers", "1", "--taps", "1,2,4", *more]


def test_two_drafts_learn_from_one_text_and_are_told_step_by_step(models, run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    trained = []
    own = lesson.trained
    monkeypatch.setattr(lesson, "trained", lambda setup, variant, *rest: trained.append((setup, variant)) or own(setup, variant, *rest))
    picture = tmp_path / "steps.svg"
    status, out, err = run(*words(models, "--steps", "2", "--plot", picture))
    assert status == 0, err
    (one, first), (seven, second) = trained
    assert first.settings == {"unroll_steps": 1} and second.settings == {"unroll_steps": 7}
    assert one.settings == seven.settings and one.examples == seven.examples and one.held_out == seven.held_out
    assert not {tuple(each.tokens) for each in one.examples} & {tuple(each.tokens) for each in one.held_out}
    assert "trained with one unroll step" in out and "trained with seven" in out
    for step in range(1, 8):
        assert re.search(rf"│ {step} +│ \d\.\d\d █* +│ \d\.\d\d █* +│", out), out
    assert "reads its own output" in out and "training with one unroll step" in err
    assert b"<svg" in picture.read_bytes()


def test_a_text_of_the_target_that_lies_here_is_taken(models, run, tmp_path, monkeypatch):
    folders, text = [], tmp_path / "text.safetensors"
    own = lesson.from_self_play
    monkeypatch.setattr(lesson, "from_self_play", lambda options, words, *rest: folders.append(words.folder) or own(options, words, *rest))
    assert run(*words(models, "--steps", "1"))[0] == 0
    pack_text(folders, text)
    monkeypatch.setattr(lesson, "TEXT", text)
    monkeypatch.setattr(lesson, "from_self_play", lambda *_: 1 / 0)
    status, _, err = run(*(word for word in words(models, "--steps", "1") if word not in ("--self-play", "300")))
    assert status == 0 and "conversations train" in err


def test_the_text_that_comes_along_is_the_embedded_targets():
    facts, conversations = read_facts(lesson.TEXT), list(read_text(lesson.TEXT))
    assert sum(number >= 0 for each in conversations for number in each.answers) == facts.counts.answer_tokens > 30_000
    recipe = Path(__file__).parents[2] / "recipes" / "text" / "smollm2-135m-1.safetensors"
    assert conversations == [each for each, _ in zip(read_text(recipe), conversations)]
    assert {each["target"] for each in facts.settings} == {each["target"] for each in read_facts(recipe).settings}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--minutes", "0"], "--minutes must be above 0, not 0.0"),
        (["--self-play", "-3"], "--self-play must be above 0, not -3"),
        (["--plot", "steps.txt"], "--plot steps.txt: a picture's name ends in .png or .svg or .pdf"),
    ],
)
def test_what_cannot_be_taught_is_one_line(models, refused, more, line):
    assert refused(*words(models, *more)) == line


def test_where_nothing_is_asked_for_both_drafts_read_the_same_tokens():
    told = [lesson.budget_of(parser().parse_args(["lesson", "ttt", *more])) for more in ([], ["--minutes", "2"], ["--steps", "3"])]
    assert told == [Budget(tokens=lesson.TOKENS), Budget(minutes=2.0), Budget(steps=3)]
    assert told[0].told() == "60,000 answer tokens"


def test_another_lesson_is_refused_in_one_line(refused):
    assert "ttt" in refused("lesson", "medusa")
