"""Claims about self-written data: it is what the target says through its template, and each conversation a function of its index."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache

import pytest
import torch
from transformers.utils import chat_template_utils

from eyas.config import PLAIN, EyasError, Sampling
from eyas.decode.generate import Decoder
from eyas.model.target import Target
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Finished, Writer
from eyas.train.template import Template
from tests.tiny import CHATML, byte_tokenizer, tiny_target
from tests.train import writing
from tests.train.writing import END, QUESTIONS, template

SETTINGS = replace(writing.SETTINGS, opening_share=0.0)
SAMPLED = replace(SETTINGS, seeded_share=1.0, answer_temperatures=(1.0,))  # few are dropped, no two are alike


def talkative() -> Target:
    """Says <|im_end|> often enough that questions and answers end by themselves. Not yet prepared."""
    loose = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False)
    loose.lm_head.weight[END] *= 1.6
    return loose


@cache
def target() -> Target:
    return talkative().prepare()


@cache
def forgetful() -> Target:
    """Its attention says nothing, so the next token hangs on the last one alone and greedy text soon runs in a circle."""
    loose = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False)
    for block in loose.model.layers:
        block.self_attn.o_proj.weight.zero_()
    return loose.prepare()


@torch.inference_mode()
def written(count: int, slots: int = 6, settings: SelfPlay = SETTINGS, questions=(), first: int = 0, by=target) -> list[Finished]:
    """The first `count` conversations to be finished that are not dropped."""
    writer = Writer(by(), template(), settings, questions, slots)
    kept = (finished for _, finished in writer.write(itertools.count(first)) if finished is not None)
    return list(itertools.islice(kept, count))


@cache
def forty() -> tuple[Finished, ...]:
    return tuple(written(40, questions=QUESTIONS))


def answer(finished: Finished) -> list[int]:
    return finished.row.tokens[finished.row.answers[0].start :]


def test_every_conversation_follows_the_template():
    """before + question + after + answer, and the whole reads back as the template writes it."""
    before, after, tokenizer = template().before, template().after, byte_tokenizer()
    assert tokenizer.decode(before).endswith("<|im_start|>user\n") and tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    asked, ended = set(), 0
    for finished in forty():
        tokens, start = finished.row.tokens, finished.row.answers[0].start
        assert tokens[: len(before)] == before and tokens[start - len(after) : start] == after
        question = tokens[len(before) : start - len(after)]
        assert 3 <= len(question) <= SETTINGS.longest_question
        assert not set(question) & template().ends and not set(answer(finished)[:-1]) & template().ends
        assert 8 <= len(answer(finished)) <= SETTINGS.longest_answer
        asked.add(tokenizer.decode(question))
        ended += answer(finished)[-1] == END
        assert len(finished.features) == len(finished.hidden) == len(finished.target_argmax) == len(tokens) - 1 == finished.row.read
    given = asked & {question.turns[0][: SETTINGS.longest_question] for question in QUESTIONS}
    assert len(given) == 2 and len(asked) > 20 and ended > 3


def test_several_turns_follow_the_template_and_every_answer_is_marked():
    """Rendered by the template itself, the turns give the same text; each answer's mark covers it and its end-of-turn token."""
    settings = replace(SETTINGS, turns=(1, 3), longest=400)
    tokenizer, counts = byte_tokenizer(), []
    for finished in written(40, settings=settings, questions=QUESTIONS):
        row = finished.row
        counts.append(len(row.answers))
        assert len(finished.features) == len(row.tokens) - 1 and row.answers[-1].stop == len(row.tokens)
        assert row.numbers() == [number for number in row.numbers() if number < len(row.answers)]
        start, rebuilt = len(template().before), list(template().before)
        for number, places in enumerate(row.answers):
            if number:
                start = row.answers[number - 1].stop - 1 + len(template().again)
                rebuilt += template().again[1:]
            rebuilt += row.tokens[start : places.start - len(template().after)] + template().after + row.tokens[places.start : places.stop]
            last = row.tokens[places.stop - 1]
            assert last == END or number == len(row.answers) - 1
        assert rebuilt == row.tokens
    assert (
        1 in counts and 2 in counts and max(counts) <= 3 and tokenizer.decode(template().again).startswith("<|im_end|>\n<|im_start|>user")
    )


def test_answers_at_temperature_0_are_plain_greedy_decoding():
    greedy = [finished for finished in forty() if finished.row.start.temperature == 0]
    assert 4 < len(greedy) < 20
    prompts = [finished.row.tokens[: finished.row.answers[0].start] for finished in greedy]
    texts = []
    for texts in Decoder(target()).run(prompts, PLAIN, Sampling(), [0] * len(prompts), SETTINGS.longest_answer):  # noqa: B007
        pass
    for text, finished in zip(texts, greedy):
        own = answer(finished)
        assert own == text.tokens[text.prompt_length :][: len(own)]
        assert own[-1] == END or len(own) == SETTINGS.longest_answer or repeats(own)
        rows = slice(finished.row.answers[0].start - 1, finished.row.read)
        assert finished.target_argmax[rows].tolist() == own


def test_at_temperature_0_a_near_tie_goes_to_the_better_one():
    """Where a second token trails by less than sampling at a tiny temperature can tell apart."""
    writer = Writer(target(), template(), SETTINGS, (), 1)
    logits = torch.zeros(40, 263)
    logits[:, 5], logits[:, 9] = 7.00001, 7.0
    rows = [writer.begin(0, index) for index in range(40)]
    for row in rows:
        row.asking, row.start.temperature = False, 0.0
    assert writer.choose(logits, rows) == [5] * 40


def test_the_questions_distribution_is_the_targets_within_top_p():
    """Every token sampled at temperature 1 lies in the nucleus of the target's distribution, and many are not its likeliest."""
    sampled = [finished for finished in forty() if finished.row.start.temperature == 1.0]
    total = likeliest = 0
    for finished in sampled:
        logits = finished.hidden.double() @ tiny_head().T  # hidden states were cut to bfloat16, hence the slack below
        for row in range(finished.row.answers[0].start - 1, finished.row.read):
            distribution = logits[row].softmax(-1)
            token = finished.row.tokens[row + 1]
            assert float(distribution[distribution > distribution[token]].sum()) < SETTINGS.answer_top_p + 0.01
            total, likeliest = total + 1, likeliest + (token == int(finished.target_argmax[row]))
    assert total > 50 and 0.05 < likeliest / total < 0.95


@cache
def tiny_head() -> torch.Tensor:
    head = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False).lm_head.weight.detach().clone()
    head[END] *= 1.6
    return head


def by_index(conversations) -> dict[int, list[int]]:
    return {finished.row.index: finished.row.tokens for finished in conversations}


@pytest.mark.parametrize("slots", [2, 11])
def test_a_conversation_is_a_function_of_settings_and_index(slots):
    wide, other = by_index(forty()), by_index(written(10, slots, questions=QUESTIONS))
    shared = wide.keys() & other.keys()
    assert len(shared) >= 8
    assert all(wide[index] == other[index] for index in shared)
    fresh = by_index(written(3, slots, questions=QUESTIONS, first=20))
    assert min(fresh) >= 20 and all(wide[index] == tokens for index, tokens in fresh.items() if index in wide)
    seeded = by_index(written(3, slots, settings=replace(SETTINGS, seed=2)))
    assert not set(map(tuple, wide.values())) & set(map(tuple, seeded.values()))


def test_a_finished_slot_is_taken_by_the_next_conversation_at_once():
    """Every pass of the target reads all slots, and no index is begun twice or left out, until there are no more."""
    writer = Writer(target(), template(), SETTINGS, (), 4)
    begun, widths = [], []
    begin, step = writer.open, writer.step

    def counted_begin(slot, row):
        begun.append(row.index)
        begin(slot, row)

    def counted_step(rows):
        widths.append(len(rows))
        assert all(row.waiting for row in rows.values()) and [row.read for row in rows.values()] == [writer.cache.lengths[s] for s in rows]
        return step(rows)

    writer.open, writer.step = counted_begin, counted_step
    with torch.inference_mode():
        ended = [index for index, _ in writer.write(iter(range(13)))]
    assert begun == list(range(13)) and sorted(ended) == begun and ended != begun
    full = widths.count(4)
    assert widths == sorted(widths, reverse=True) and full > len(widths) / 2  # all slots are in use until no index is left


def test_an_opening_begins_the_question_that_the_target_finishes():
    """With a share of 1 every question begins with one of the openings, several of them, and goes on in the target's own words."""
    settings = replace(SETTINGS, openings=("Why", "How d"), opening_share=1.0)
    before, after = len(template().before), len(template().after)
    asked = [byte_tokenizer().decode(f.row.tokens[before : f.row.answers[0].start - after]) for f in written(20, settings=settings)]
    assert all(question.startswith(("Why", "How d")) and len(question) > 3 for question in asked)
    assert {question[:3] for question in asked} == {"Why", "How"} and len(set(asked)) > 10


def test_questions_brought_to_be_answered_anew_are_asked_once_each_and_in_order():
    """Every turn of a file's conversation is put as it stands, under its own system message, and the target answers all of them."""
    brought = [Asked(("Who?", "And why?")), Asked(("What is an eyas?",), "You are a hawk."), Asked(("Where?",))]
    settings = replace(SETTINGS, regenerate=True, longest=400, answer_temperatures=(1.0,))
    writer = Writer(target(), template(), settings, brought, 2)
    with torch.inference_mode():
        rows = {index: finished.row for index, finished in writer.write(iter(range(3))) if finished is not None}
    tokenizer, found = byte_tokenizer(), 0
    for index, row in rows.items():
        text = tokenizer.decode(row.tokens)
        system = brought[index].system or "You are a helpful assistant"
        assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{brought[index].turns[0]}<|im_end|>")
        found += len(row.answers) == len(brought[index].turns)
        if len(row.answers) == 2:
            assert "<|im_start|>user\nAnd why?<|im_end|>\n<|im_start|>assistant\n" in text
    assert len(rows) >= 2 and found >= 2


def test_without_a_chat_template_the_target_writes_plain_text():
    """One answer from the text's first token on, and no question."""
    tokenizer = byte_tokenizer(None)
    plain = Template(tokenizer, (END,))
    writer = Writer(target(), plain, replace(SETTINGS, template=plain.text), (), 3)
    with torch.inference_mode():
        rows = [finished.row for _, finished in writer.write(iter(range(9))) if finished is not None]
    assert not plain.chat and rows
    for row in rows:
        assert row.tokens[:1] == plain.before and row.answers == [range(1, len(row.tokens))]


def repeats(tokens: list[int], gram: int = 16) -> int:
    """Length of the shortest beginning of `tokens` that holds the same 16 tokens in a row twice; 0 if none does."""
    seen = set()
    for end in range(gram, len(tokens) + 1):
        one = tuple(tokens[end - gram : end])
        if one in seen:
            return end
        seen.add(one)
    return 0


def test_a_loop_is_cut_where_sixteen_tokens_first_repeat():
    settings = replace(SAMPLED, longest_answer=90, answer_temperatures=(0.0, 0.5))
    looping = written(40, 8, settings=settings, by=forgetful, questions=[*QUESTIONS, Asked(("And what of an eyas?",)), Asked(("Who?",))])
    ends = [repeats(answer(finished)) for finished in looping]
    assert sum(map(bool, ends)) >= 6, "few answers looped: an empty claim"
    assert all(end in (0, len(answer(finished))) for end, finished in zip(ends, looping))
    assert [finished.row.looped for finished in looping] == list(map(bool, ends))


def test_a_small_context_ends_an_answer_and_is_never_passed():
    small = tiny_target(vocab_size=263, max_position_embeddings=96)
    lengths = [len(finished.row.tokens) for finished in written(5, 5, by=lambda: small)]
    assert 90 < max(lengths) <= 96


def test_a_template_that_writes_the_date_is_cut_alike_on_every_day(monkeypatch):
    """Else what was written before midnight would be written anew: the folder's name is a hash of the template's text."""
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML

    class Another(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat("2042-05-06")

    one = Template(byte_tokenizer(dated), (END,))
    assert one.text.startswith("01 Jan 2026\n") and one.again
    monkeypatch.setattr(chat_template_utils, "datetime", Another)
    other = Template(byte_tokenizer(dated), (END,))
    tokenizer = byte_tokenizer(dated)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("06 May 2042"), "as it is served"
    assert (one.text, one.before, one.again) == (other.text, other.before, other.again)
    assert one.before_with("Be brief.") == other.before_with("Be brief.")


def test_a_template_is_cut_under_the_variables_it_is_given():
    switched = CHATML + "{{ '<think></think>' if add_generation_prompt and enable_thinking is false }}"
    plain, still = Template(byte_tokenizer(switched), (END,)), Template(byte_tokenizer(switched), (END,), {"enable_thinking": False})
    assert still.text == plain.text + "<think></think>" and still.after == plain.after + still.tokens("<think></think>")
    assert still.before_with("Be brief.") == plain.before_with("Be brief.")
    with pytest.raises(EyasError, match="the chat template reads no variable thinking_off"):
        Template(byte_tokenizer(switched), (END,), {"thinking_off": True})
    with pytest.raises(EyasError, match="this target has none"):
        Template(byte_tokenizer(None), (END,), {"enable_thinking": False})


def test_variables_of_the_template_name_another_folder_and_none_the_same_as_ever():
    told = {name: value for name, value in asdict(SETTINGS).items() if name not in ("chat_template_kwargs", "read")}
    assert SETTINGS.digest() == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]
    assert replace(SETTINGS, chat_template_kwargs={"enable_thinking": False}).digest() != SETTINGS.digest()
    assert replace(SETTINGS, read="another tokenizer").digest() != SETTINGS.digest()


def test_a_template_that_hides_the_question_is_refused():
    with pytest.raises(EyasError, match="does not show a user turn as it is written; train from conversations with --data"):
        Template(byte_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}"), (END,))
