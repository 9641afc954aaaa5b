"""Claims about what self-written conversations begin with: text to ask about, system messages, words of the tokenizer's own, loops."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch

from eyas.model.rows import chain_rows
from eyas.model.target import Target
from eyas.train.questions import SHORTEST_TEXT, Asked, Questions
from eyas.train.selfplay import Finished, Writer
from tests.tiny import byte_tokenizer, tiny_target
from tests.train.test_selfplay import END, SETTINGS, answer, forgetful, repeats
from tests.train.writing import QUESTIONS, template

FOUR = [*QUESTIONS, Asked(("And what of an eyas?",)), Asked(("Who?",))]
PATIENT = replace(SETTINGS, longest_question=80, longest_answer=80)
ABOUT_TEXTS = replace(PATIENT, task_share=0.6, tasks=("Say it again: {}", "{} In short?"), open_tasks=("{} Now",))


@cache
def roomy() -> Target:
    """Ends its turns often enough, and has room for a text in a question."""
    loose = tiny_target(vocab_size=263, eos_token_ids=(END,), max_position_embeddings=768, prepare=False)
    loose.lm_head.weight[END] *= 1.7
    return loose.prepare()


@torch.inference_mode()
def written(indices, slots, settings, by=roomy, questions=()) -> dict[int, Finished | None]:
    return dict(Writer(by(), template(), settings, questions, slots).write(iter(indices)))


def question(finished: Finished) -> str:
    """The text of a conversation's first question."""
    tokens = finished.row.tokens[: finished.row.answers[0].start - len(template().after)]
    return str(byte_tokenizer().decode(tokens)).split("<|im_start|>user\n")[-1]


def test_a_question_about_a_text_holds_the_answer_that_the_conversation_before_it_ended_with():
    found = written(range(64), 12, ABOUT_TEXTS)
    questions, kinds = Questions(template(), ABOUT_TEXTS, (), 1024), set()
    for index, finished in found.items():
        if finished is None or not finished.row.start.text:
            continue
        before = found[index - 1]
        assert before is not None and questions.follows(index) and index % ABOUT_TEXTS.per_shard
        text = template().text_of(before.row.last_answer()).strip()
        begins = [task.replace("{}", text) for task in ABOUT_TEXTS.tasks]
        asked, opened = question(finished), f"{text} Now"
        assert asked in begins or asked.startswith(opened)
        kinds.add(begins.index(asked) if asked in begins else "open")
        assert finished.row.start.whole == (asked in begins)
    assert kinds == {0, 1, "open"}, "not every kind was asked: an empty claim"


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_what_follows_does_not_depend_on_how_many_are_written_at_once(slots):
    def texts(found):
        return {index: finished and finished.row.tokens for index, finished in found.items()}

    whole = texts(written(range(32), 7, ABOUT_TEXTS))
    assert texts(written(range(32), slots, ABOUT_TEXTS)) == whole
    assert texts(written(range(16, 32), slots, ABOUT_TEXTS)) == {index: text for index, text in whole.items() if index >= 16}


def test_a_short_text_or_one_without_room_for_an_answer_is_not_asked_about():
    questions = Questions(template(), ABOUT_TEXTS, (), 1024)
    index = next(filter(questions.follows, itertools.count()))
    text = list(b"a text of some bytes that is long enough")
    assert questions.begin(index, text).text and not questions.begin(index, text[: SHORTEST_TEXT - 1]).text
    assert not Questions(template(), ABOUT_TEXTS, (), 2 * len(questions.begin(index, text).text)).begin(index, text).text


def test_a_given_question_is_never_replaced_by_one_about_a_text():
    settings = replace(ABOUT_TEXTS, seeded_share=1.0, task_share=1.0)
    assert not any(map(Questions(template(), settings, QUESTIONS, 1024).follows, range(64)))
    regenerated = replace(ABOUT_TEXTS, regenerate=True, task_share=1.0)
    assert not any(map(Questions(template(), regenerated, QUESTIONS, 1024).follows, range(64)))


def test_a_share_of_conversations_has_another_system_message_and_the_states_of_its_own_opening():
    """What was handed over is what the target makes of the whole text, read at once."""
    settings = replace(PATIENT, system_share=0.5, systems=("Be brief.", "Be a hawk."))
    found = [finished for finished in written(range(40), 6, settings).values() if finished is not None]
    heads = [str(byte_tokenizer().decode(finished.row.tokens)).split("<|im_end|>")[0] for finished in found]
    others = [head for head in heads if head.endswith(("Be brief.", "Be a hawk."))]
    assert {head.split()[-1] for head in others} == {"brief.", "hawk."} and 0.2 < len(others) / len(found) < 0.8
    usual = {head for head in heads if head not in others}
    assert len(usual) == 1, "the others keep the template's own"
    for finished in found[:8]:
        tokens = finished.row.tokens[:-1]
        with torch.inference_mode():
            cache = roomy().new_cache(1, len(tokens))
            out = roomy()(chain_rows(0, tokens, 0), cache, settings.taps, slice(0, 1))
        torch.testing.assert_close(finished.features.float(), out.tapped.float(), atol=0.05, rtol=0.02)


def test_an_opening_may_be_followed_by_a_word_of_the_tokenizers_own():
    class Words:
        def __getattr__(self, name):
            return getattr(byte_tokenizer(), name)

        def __call__(self, *texts, **settings):
            return byte_tokenizer()(*texts, **settings)

        def get_vocab(self):
            return {
                "\u0120falcons": 7,
                "\u0120of": 8,
                "\u2581Paris": 9,
                "falcon": 10,
                "\u0120fa1cons": 11,
                "\u0120Rome": 12,
                "\u0120home": 13,
            }

    cut = template().__class__(Words(), (END,))
    assert cut.words() == [7, 9, 12], "long words and names, each with the space before it"
    settings = replace(SETTINGS, openings=("Why",), opening_share=1.0, topic_share=0.5)
    questions = Questions(cut, settings, (), 1024)
    begun = [tuple(questions.begin(index, ()).words) for index in range(60)]
    why = tuple(cut.tokens("Why"))
    assert set(begun) == {why, *((*why, word) for word in (7, 9, 12))}
    assert 0.3 < begun.count(why) / 60 < 0.7


def test_a_share_of_answers_goes_round_for_so_many_tokens_before_it_is_cut():
    settings = replace(SETTINGS, seeded_share=1.0, longest_answer=100, answer_temperatures=(0.0, 0.5), loop_share=0.5, longest_loop=20)
    found = [
        finished for finished in written(range(60), 8, settings, by=forgetful, questions=FOUR).values() if finished and finished.row.looped
    ]
    late = {finished.row.start.spare: len(answer(finished)) - repeats(answer(finished)) for finished in found}
    assert late == {0: 0, 20: 20}
    for finished in found:
        assert len(answer(finished)) - repeats(answer(finished)) == finished.row.start.spare
