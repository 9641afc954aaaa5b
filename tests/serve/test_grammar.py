"""Claims about structured output: an answer has the form that was asked for, in exactly plain decoding's tokens, whatever the tree."""

from __future__ import annotations

import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from eyas.decode.grammar import Grammar
from eyas.decode.sequence import Sequence
from eyas.decode.tree import Tree
from eyas.serve import forms
from eyas.serve.forms import Form, Forms
from tests.serve.serving import CHAT, TEXT, ask, events
from tests.tiny import byte_tokenizer

TREES = [{"method": "plain"}, {"tree": "8x2x3"}, {"tree": "20x4x3"}, {}]


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 5}
SCHEMAS = {
    "enum": ({"enum": ["hawk", "owl", "ä kite"]}, lambda found: found in ("hawk", "owl", "ä kite")),
    "nested": (
        closed(bird=closed(name=SHORT, sees={"type": "boolean"}), n={"enum": [1, 2]}),
        lambda found: len(found["bird"]["name"]) <= 5 and found["bird"]["sees"] in (True, False) and found["n"] in (1, 2),
    ),
    "pattern": ({"type": "string", "pattern": "^[a-c]{3}-[0-9]{2}$"}, lambda found: re.fullmatch("[a-c]{3}-[0-9]{2}", found)),
    "maxLength": (closed(text=SHORT), lambda found: len(found["text"]) <= 5),
    "range": ({"type": "integer", "minimum": 10, "maximum": 130}, lambda found: 10 <= found <= 130),
    "items": ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}, lambda found: 2 <= len(found) <= 4),
    "anyOf": ({"anyOf": [closed(a={"const": 1}), closed(b={"type": "null"})]}, lambda found: found in ({"a": 1}, {"b": None})),
    "$ref": (
        {"$defs": {"Word": {"enum": ["x", "yy"]}}, **closed(w={"$ref": "#/$defs/Word"})},
        lambda found: found["w"] in ("x", "yy"),
    ),
}


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


def content(answer) -> str:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"]


@pytest.mark.parametrize("temperature", [0, 1.1])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_fits_its_schema_and_is_plain_decodings_for_every_tree(client, name, temperature):
    schema, fits = SCHEMAS[name]
    body = ask(max_tokens=200, temperature=temperature, response_format=schema_format(schema, strict=True))
    texts = {content(client.post(CHAT, json=body | {"eyas": tree})) for tree in TREES}
    (text,) = texts
    assert fits(json.loads(text)), text
    streamed = events(client.post(CHAT, json=body | {"stream": True}).text)[:-1]
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in streamed) == text


def test_other_laws_hold_beside_a_schema(client):
    law = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "frequency_penalty": 0.7, "logit_bias": {"65": -100}, "min_tokens": 30}
    body = ask(max_tokens=200, response_format=schema_format(closed(text=SHORT)), logprobs=True, **law)
    answers = [client.post(CHAT, json=body | {"eyas": tree}).json()["choices"][0] for tree in TREES]
    assert all(each == answers[0] for each in answers)
    assert len(json.loads(answers[0]["message"]["content"])["text"]) <= 5
    assert all(each["logprob"] > float("-inf") for each in answers[0]["logprobs"]["content"])  # the model's own, before the grammar


FORMS = [
    ({"regex": "(ab|c){2,4}"}, lambda text: re.fullmatch("(ab|c){2,4}", text)),
    ({"choice": ["a hawk", 'an "owl"', "é\\"]}, lambda text: text in ("a hawk", 'an "owl"', "é\\")),
    ({"grammar": 'start: "x" /[0-9]{1,3}/ end\nend: "!" | "?"'}, lambda text: re.fullmatch("x[0-9]{1,3}[!?]", text)),
    ({"grammar": 'root ::= "a" | "b" "c"'}, lambda text: text in ("a", "bc")),
    ({"json": {"enum": [1, 22]}}, lambda text: text in ("1", "22")),
    ({"json": '{"enum": [1, 22]}'}, lambda text: text in ("1", "22")),
]


@pytest.mark.parametrize(("form", "fits"), FORMS, ids=[str(form)[:40] for form, _ in FORMS])
def test_other_forms_hold_for_chat_and_for_text(client, form, fits):
    law = {"temperature": 1.0, "seed": 3, "max_tokens": 100, "structured_outputs": form}
    for tree in TREES[:2]:
        assert fits(content(client.post(CHAT, json=ask() | law | {"eyas": tree})))
        (choice,) = client.post(TEXT, json={"prompt": "a hawk", **law, "eyas": tree}).json()["choices"]
        assert choice["finish_reason"] == "stop" and fits(choice["text"])


def test_any_object_is_json_and_several_answers_each_have_the_form(client):
    form = {"type": "json_object", "schema": {"type": "object", "maxProperties": 1, "additionalProperties": {"enum": [1]}}}
    law = {
        "max_tokens": 400,
        "temperature": 1.0,
        "logit_bias": {str(client.post("/tokenize", json={"content": '"'}).json()["tokens"][0]): 6},
    }
    told = client.post(CHAT, json=ask(n=3, response_format=form, **law)).json()["choices"]
    assert all(isinstance(json.loads(each["message"]["content"]), dict) for each in told)
    cut = client.post(CHAT, json=ask(response_format={"type": "json_object"}, temperature=1.0)).json()["choices"][0]
    assert cut["message"]["content"].startswith("{")


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BAD = [
    ({"response_format": {"type": "yaml"}}, "is not served"),
    ({"response_format": {"type": "json_schema"}}, "json_schema must be an object"),
    ({"response_format": {"type": "json_object", "schema": 123}}, "a schema must be an object"),
    ({"response_format": schema_format({"type": "objekt"})}, "Invalid type: objekt"),
    ({"response_format": schema_format({"type": 123})}, "type"),
    ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "uniqueItems"),
    ({"response_format": schema_format({"$ref": "https://example.com/schema"})}, "does not fetch resources"),
    ({"response_format": schema_format({"type": "string", "pattern": "(?<=a)b"})}, "response_format: "),
    ({"response_format": schema_format({"$ref": "#"})}, "response_format: "),
    ({"response_format": schema_format(nested(40))}, "nested more than 32 deep"),
    ({"response_format": schema_format({"enum": [f"{number}" for number in range(20_000)]})}, "larger than 65536 bytes"),
    ({"structured_outputs": {"regex": "("}}, "unclosed group"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "must have one of json, regex, choice, grammar"),
    ({"structured_outputs": {"choice": []}}, "choice must be a list of strings"),
    ({"structured_outputs": {"grammar": "start: %%"}}, "structured_outputs: "),
    ({"structured_outputs": {"json": "{"}}, "is no JSON"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "both say"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "do not go together"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=lambda each: str(each)[:60])
def test_forms_that_cannot_be_are_refused_in_one_line(client, wrong, words):
    answer = client.post(CHAT, json=ask() | wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"] and "\n" not in error["message"] and "<state>" not in error["message"], (
        error
    )
    assert error["param"] in ("response_format", "structured_outputs", "ignore_eos")


def test_a_form_that_takes_too_long_to_read_is_refused(client, monkeypatch):
    client.post(CHAT, json=ask(response_format={"type": "json_object"}))  # the vocabulary is read
    hold = threading.Event()
    monkeypatch.setattr(forms, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(forms, "grammar_of", lambda form: hold.wait(20))
    answers = [client.post(CHAT, json=ask(response_format={"type": "json_object"})) for _ in range(forms.MOST_AT_ONCE + 1)]
    assert [answer.status_code for answer in answers] == [400] * forms.MOST_AT_ONCE + [429]  # those that go on are counted
    assert "seconds to read" in answers[0].json()["error"]["message"]
    hold.set()
    monkeypatch.undo()
    assert client.post(CHAT, json=ask(response_format={"type": "json_object"})).status_code == 200


def test_expressions_that_intersect_without_end_are_refused_and_leave_nothing_running(engine, monkeypatch):
    monkeypatch.setattr(forms, "MOST_SECONDS", 2.0)
    found = Forms(engine.tokenizer, engine.target.config.vocab_size, engine.target.config.eos_token_ids)
    endless = {"allOf": [{"type": "string", "pattern": f".*a{{{number}}}.*"} for number in range(1, 99)]}
    with pytest.raises(forms.Refused, match="seconds to read"):
        found.matcher(Form("json", endless, "response_format"))
    assert all(found.free.acquire(timeout=1) for _ in range(forms.MOST_AT_ONCE))
    found = {"allOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "maxLength": 3}]}
    assert Forms(engine.tokenizer, 300, [1]).matcher(Form("json", found, "response_format"))


def test_a_grammar_that_gives_up_ends_its_own_request_alone(client, monkeypatch):
    started = Grammar.mask

    def gives_up(self, path):
        if path or self.known > 60:
            self.given_up[tuple(path)] = "it has too many states"
            return None
        return started(self, path)

    assert client.post(CHAT, json=ask(response_format={"type": "json_object"})).status_code == 200
    monkeypatch.setattr(Grammar, "mask", gives_up)
    answer = client.post(CHAT, json=ask(response_format={"type": "json_object"}))
    assert answer.status_code == 500 and "too many states" in answer.json()["error"]["message"]
    streamed = client.post(CHAT, json=ask(response_format={"type": "json_object"}, stream=True)).text
    assert "event: error" in streamed and "[DONE]" not in streamed
    assert client.post(CHAT, json=ask()).status_code == 200 and client.get("/health").status_code == 200


# ---- guesses ----


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture
def grammar(tokenizer):
    found = Forms(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return Grammar(found.matcher(Form("regex", "ab(cde|xyz)f", "structured_outputs")), 2, found.ends)


def spell(tokenizer, text):
    return tokenizer(text)["input_ids"]


def paths(tokenizer, tree):
    above = [""]
    for row in range(1, len(tree)):
        above.append(above[tree.parents[row]] + tokenizer.decode([tree.tokens[row]]))
    return above[1:]


def test_guesses_that_the_grammar_forbids_are_cut_and_those_it_forces_join(tokenizer, grammar):
    prompt = spell(tokenizer, "hi")
    a, b, c, x = spell(tokenizer, "abcx")
    assert grammar.forces(prompt)
    text = [*prompt, a, b]
    assert not grammar.forces(text)  # c or x
    tree = Tree([b, c, x, a, c, a], [-1, 0, 0, 0, 1, 2], [0, 1, 1, 1, 2, 2], [0.0, -0.5, -1.5, -2.0, -1.0, -2.0])
    found = grammar.fit(text, tree, 20, 10)
    assert sorted(paths(tokenizer, found)) == ["c", "cd", "cde", "cdef", "x", "xy", "xyz", "xyzf"]
    assert sorted(paths(tokenizer, grammar.fit(text, tree, 20, 2))) == ["c", "cd", "x", "xy"]  # no deeper than the text may grow
    assert sorted(paths(tokenizer, grammar.fit(text, tree, 4, 10))) == ["c", "cd", "cde"]  # the likeliest, where there is no room
    assert len(grammar.fit(text, Tree.root(b), 1, 10)) == 1


def test_what_is_allowed_does_not_depend_on_what_was_asked_before(tokenizer, grammar):
    prompt, letters = spell(tokenizer, "hi"), dict(zip("abcdefxyz", spell(tokenizer, "abcdefxyz")))
    asked = ["", "a", "abx", "abc", "q", "abcdef", "ab", "abxyz", "abxz", "abcdef<", "abc"]
    wanted = {"": "a", "a": "b", "ab": "cx", "abx": "y", "abc": "d", "abxyz": "f"}
    for text in asked * 2:
        path = [letters.get(letter, letters["a"] + 40) for letter in text]
        mask = grammar.allowed(prompt, path)
        if text == "abcdef":
            assert mask.nonzero()[:, 0].tolist() == grammar.ends
        elif text in wanted:
            assert sorted(mask.nonzero()[:, 0].tolist()) == sorted(letters[letter] for letter in wanted[text])
        else:
            assert mask is None


def test_a_drafts_own_vocabulary_is_masked_by_what_its_columns_stand_for(tokenizer, grammar):
    prompt, (a, b) = spell(tokenizer, "hi"), spell(tokenizer, "ab")
    columns = torch.full((len(tokenizer),), -1)
    columns[[a, 5, 7]] = torch.arange(3)
    found = grammar.rows(prompt, [[], [a]], torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), columns)
    assert found.tolist() == [[1.0, float("-inf"), float("-inf")], [1.0, 2.0, 3.0]]  # it has no b, so it guesses as it likes
    logits = torch.full((1, len(tokenizer)), float("-inf"))
    assert grammar.rows(prompt, [[a]], logits, None)[0].isfinite().nonzero()[:, 0].tolist() == [b]


class GivesUp:
    """A matcher that gives up where a text of the grammar comes to certain tokens, and is of no use from then on."""

    def __init__(self, matcher, where, seen=()):
        self.matcher, self.where, self.seen, self.broken = matcher, where, list(seen), False

    def try_consume_tokens(self, tokens):
        taken = 0 if self.broken else self.matcher.try_consume_tokens(tokens)
        self.seen += tokens[:taken]
        return taken

    def rollback(self, count):
        del self.seen[len(self.seen) - count :]
        return self.matcher.rollback(count)

    def compute_bitmask(self):
        self.broken |= self.seen == self.where
        return self.matcher.compute_bitmask()

    def compute_ff_tokens(self):
        self.broken |= self.seen == self.where
        return self.matcher.compute_ff_tokens()

    def is_error(self):
        return self.broken or self.matcher.is_error()

    def get_error(self):
        return "too much to follow" if self.broken else self.matcher.get_error()

    def deep_copy(self):
        return GivesUp(self.matcher.deep_copy(), self.where, self.seen)


@pytest.mark.parametrize("guessed", ["nowhere", "in a draft's vocabulary", "in the target's"])
def test_a_matcher_that_gives_up_on_a_guess_fails_no_text_but_one_that_comes_there(tokenizer, grammar, guessed):
    prompt, (a, b, c, x) = spell(tokenizer, "hi"), spell(tokenizer, "abcx")
    columns, scores = torch.arange(len(tokenizer)), torch.zeros(1, len(tokenizer))
    careful = Grammar(GivesUp(grammar.settled, [a, b, x]), 2, grammar.ends)
    text = [*prompt, a, b]
    if guessed != "nowhere":
        asked = SimpleNamespace(tokens=text, processors=(careful,))
        Sequence.guessed(asked, [[x]], scores, columns if "draft" in guessed else None)  # type: ignore[arg-type]
        found = careful.fit(text, Tree([b, c, x], [-1, 0, 0], [0, 1, 1], [0.0, -0.5, -1.5]), 20, 10)
        assert "cdef" in paths(tokenizer, found)
    drawn = careful.rows(text, [[]], scores, None)[0].isfinite().nonzero()[:, 0].tolist()
    assert careful.failed is None and sorted(drawn) == sorted([c, x])
    assert careful.rows(text, [[x]], scores, None)[0].isfinite().nonzero()[:, 0].tolist() == grammar.ends
    assert careful.failed == "too much to follow"
    assert careful.rows([*text, x], [[]], scores, None)[0].isfinite().nonzero()[:, 0].tolist() == grammar.ends


def test_llama_cpps_names_for_forms_are_understood(client):
    assert content(client.post(CHAT, json=ask(json_schema={"const": 42}))) == "42"
    assert content(client.post(CHAT, json=ask(grammar='root ::= "a"{3,3} "b"'))) == "aaab"
    both = client.post(CHAT, json=ask(grammar='root ::= "a"', json_schema={"const": 1}))
    assert both.status_code == 400 and "both say what the answer is to be" in both.json()["error"]["message"]
    wrong = client.post(TEXT, json={"prompt": "a", "grammar": "root ::= this is (not valid"})
    assert wrong.status_code == 400 and "grammar" in wrong.json()["error"]["message"]
