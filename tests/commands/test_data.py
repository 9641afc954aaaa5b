"""What `eyas train` learns from a file of conversations, and what it says of those it could not use."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import pytest
from rich.console import Console
from transformers.utils import chat_template_utils

from eyas.commands.data import FOREIGN, from_conversations, regenerated_questions
from eyas.config import EyasError, TrainSettings
from eyas.files.tokenizer import load_tokenizer
from eyas.train.build import Studied, hold_out
from eyas.train.features import Example
from eyas.train.questions import Asked
from eyas.train.template import Template
from tests.tiny import CHATML


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@pytest.fixture
def read(models, tmp_path, capsys):
    """Examples of rows written to a file, the facts of them, and the lines that were said."""

    def from_rows(*rows, target="target", apart=(), **settings):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
        studied = target if isinstance(target, Studied) else Studied.at(models / target, (1, 2, 4))
        examples, facts = from_conversations(path, studied, TrainSettings(**settings), Console(stderr=True, highlight=False), apart)
        return examples, facts["data"], capsys.readouterr().err.splitlines()

    return from_rows


def test_what_max_length_cuts_away_is_said_with_the_length_that_keeps_it(read):
    rows = [talk("q" * length, f"an answer {number}") for number, length in enumerate((1, 1, 1, 90, 90))]
    examples, facts, said = read(*rows, talk("q", "cut off " * 9), max_length=100)
    assert len(examples) == 4 and facts["skipped"] == 2
    assert said[0] == "skipped: 2 conversations, the first on entry 4: longer than max_length=100, with too little of an answer before it"
    assert said[1] == "skipped 2 of 6 conversations"
    lost, longest = facts["answer_tokens_cut"], int(said[2].partition("--set max_length=")[2].partition(" ")[0])
    assert lost == 2 * len("an answer 3<") + (longest - 90 - len("an answer 3") + 1 + len("cut off ") * 9) - len("\n") - 100
    assert said[2].startswith(f"3 documents are longer than max_length=100: {lost} of ")
    examples, facts, said = read(*rows, talk("q", "cut off " * 9), max_length=longest)
    assert len(examples) == 6 and facts["answer_tokens_cut"] == 0 and max(len(example.tokens) for example in examples) == longest
    assert not any("max_length" in line for line in said)


def test_conversations_are_rendered_under_the_variables_of_the_run_and_on_one_day(read, models, tmp_path, monkeypatch):
    """A row's own variables stand first; what the template does not read is refused; text that is kept has the same date on any day."""
    thoughtful = tmp_path / "thoughtful"
    shutil.copytree(models / "target", thoughtful)
    (thoughtful / "chat_template.jinja").write_text("{{ strftime_now('%d %b%F%-d%U%c%s %Y') }} {{ mood }} " + CHATML)
    tokenizer = load_tokenizer(thoughtful)

    def texts(rows, **variables):
        return [tokenizer.decode(one.tokens) for one in read(*rows, target=Studied.at(thoughtful, (1, 2, 4), variables))[0]]

    rows = [talk("q", "an answer"), talk("q", "another answer", chat_template_kwargs={"mood": "glad"})]
    found = texts(rows, mood="calm")
    assert [text.partition(" 2026 ")[2].split(" ")[0] for text in found] == ["calm", "glad"]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert texts(rows, mood="calm") == found
    with pytest.raises(EyasError, match="the chat template reads no variable mod"):
        texts(rows, mod="calm")


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.fromisoformat("2042-05-06")


def test_tokens_that_the_target_does_not_know_are_a_cause(read, models, tmp_path):
    """The tokenizer was given a token, the model was not: conversations with it are left out, the others train."""
    longer = tmp_path / "longer"
    shutil.copytree(models / "target", longer)
    tokenizer = load_tokenizer(longer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(longer)
    studied = Studied.at(longer, (1, 2, 4))
    examples, _, said = read(talk("q", "an answer"), talk("use <|tool|>", "an answer"), target=studied)
    assert len(examples) == 1 and "entry 2: it holds '<|tool|>' (263), and the model knows ids up to 262 only" in said[0]
    with pytest.raises(EyasError, match="no conversation with an answer to learn from; the first was skipped since entry 1: it holds"):
        read(talk("use <|tool|>", "an answer"), target=studied)


def test_that_foreign_text_teaches_other_words_is_said_once(read):
    _, _, said = read(*(talk("q", f"an answer {number}") for number in range(3)))
    assert said == [FOREIGN] and "--regenerate" in FOREIGN


def test_complaints_are_counted_by_cause_and_unknown_fields_named_once(read):
    rows = [talk("q", f"an answer {number}", mood=number) for number in range(1, 4)]
    tools = [talk("q", "a", tools=[{"name": "f"}]) for _ in range(3)]
    _, facts, said = read(*tools, {"words": "x"}, *rows)
    assert facts["skipped"] == 4
    assert 'fields of conversations that are not read, and in how many they stand: "mood" (3)' in said[0]
    assert said[1] == "skipped: 3 conversations, the first on entry 1: the chat template does not show tools"
    assert said[2].startswith("skipped: entry 4: no conversation in it")
    assert said[3] == "skipped 4 of 7 conversations"


def test_a_target_without_a_chat_template_learns_plain_text(models, read, tmp_path):
    shutil.copytree(models / "target", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    examples, _, _ = read({"text": "Hawks fly high."}, {"text": "Owls fly low."}, target=tmp_path / "bare")
    assert [example.answers for example in examples] == [[-1] + [0] * 15, [-1] + [0] * 13]
    with pytest.raises(EyasError, match=r'has no chat template, .* or give plain text as {"text"'):
        read(talk("q", "an answer"), target=tmp_path / "bare")


def test_documents_of_one_conversation_know_of_each_other(models, read, tmp_path):
    """Where a template drops the thoughts of earlier answers, a conversation is several documents."""
    shutil.copytree(models / "target", tmp_path / "thinking")
    template = (tmp_path / "thinking" / "chat_template.jinja").read_text()
    dropping = "(m.content if loop.last else m.content.split('</think>')[-1])"
    (tmp_path / "thinking" / "chat_template.jinja").write_text(template.replace("m.content", dropping))
    thoughts = [turn for number in range(2) for turn in talk(f"q {number}", f"<think>hm {number}</think>an answer")["messages"]]
    examples, _, _ = read(talk("q", "an answer"), {"messages": thoughts}, talk("q", "another"), target=tmp_path / "thinking")
    assert [example.conversation for example in examples] == [None, 1, 1, None]


def test_preformatted_text_is_kept_apart_from_an_evaluation_too(read, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "Tell me: where is the nest"}) + "\n")
    text = "<|im_start|>user\nWhere is the nest?<|im_end|>\n<|im_start|>assistant\nIn a tree.<|im_end|>\n"
    examples, facts, _ = read({"text": text}, {"text": text.replace("Where is", "Who built")}, apart=[str(tmp_path / "eval.jsonl")])
    assert len(examples) == 1 and facts["kept_apart"]["dropped"] == 1


def test_documents_of_one_conversation_do_not_both_measure_and_train():
    examples = [Example([number], [0], conversation=number // 3) for number in range(30)]
    for seed in range(20):
        kept, held_out = hold_out(examples, TrainSettings(seed=seed, held_out=0.1))
        assert held_out and not {example.conversation for example in kept} & {example.conversation for example in held_out}
    alone = [Example([number], [0]) for number in range(30)]
    assert len(hold_out(alone, TrainSettings(held_out=0.1))[0]) == 27
    with pytest.raises(EyasError, match=r"one conversation is too little"):
        hold_out(examples[:3], TrainSettings())


def test_regenerate_asks_what_can_be_asked_anew(models, tmp_path, capsys):
    system = [{"role": "developer", "content": "Be brief."}]
    rows = [
        talk("one", "a"),
        {"messages": system + talk("two", "a")["messages"]},
        {"instruction": "three", "input": "more", "output": "a"},
        talk("four", "a", tools=[{"name": "f"}]),
        {"text": "five"},
        {"messages": system + [{"role": "system", "content": "Be long."}] + talk("six", "a")["messages"]},
        talk("seven", "a", chat_template_kwargs={"enable_thinking": False}),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    template = Template(load_tokenizer(models / "target"), [])
    asked, _ = regenerated_questions(str(path), template, Console(stderr=True, highlight=False))
    assert asked == [Asked(("one",), None), Asked(("two",), "Be brief."), Asked(("three\nmore",), None)]
    said = capsys.readouterr().err
    assert all(f"line {number}: it" in said for number in (4, 5, 6, 7)) and "skipped 4 lines" in said
