"""Claims about tools: what the model may call is shown to it, its calls are parsed however the text comes, and a forced call is one."""

from __future__ import annotations

import json
import threading
import time
from typing import Literal

import openai
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from eyas.serve import jobs
from eyas.serve.app import make_app
from eyas.serve.calls import Call, HermesCalls, Said, TemplateCalls, joined
from eyas.serve.forms import Form
from tests.serve.serving import CHAT, ask, events, saved_engine, served
from tests.tiny import CHATML, byte_tokenizer

SHOWS_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" + CHATML


def tool(name="look", **properties):
    properties = properties or {"bird": {"enum": ["hawk", "owl"]}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": "looks", "parameters": schema}}


REFERS = {
    "type": "function",
    "function": {
        "name": "fly",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/To"}},
            "$defs": {"To": {"enum": [1, 2]}},
            "required": ["to"],
        }
        | {"additionalProperties": False},
    },
}
TOOLS = [tool(), REFERS]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return saved_engine(tmp_path_factory.mktemp("tools"), max_position_embeddings=1024)


@pytest.fixture
def shown(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", SHOWS_TOOLS)


@pytest.fixture
def says(monkeypatch):
    """Makes the model say exactly this."""
    return lambda text: monkeypatch.setattr(jobs, "form_of", lambda kind, values: Form("choice", [text], "tools"))


def choice_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def gathered(told):
    """The message that a stream's deltas add up to, and how it ended."""
    message, reason = {"content": None, "tool_calls": []}, None
    for each in told[:-1]:
        choice = each["choices"][0]
        delta, reason = choice["delta"], choice["finish_reason"] or reason
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            assert call["index"] == len(message["tool_calls"]) and call["id"].startswith("call_")
            message["tool_calls"].append(call)
    return message, reason


CHOICES = [
    ("required", {"look", "fly"}),
    ({"type": "function", "function": {"name": "fly"}}, {"fly"}),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "look"}}]}},
        {"look"},
    ),
]


@pytest.mark.parametrize(("choice", "names"), CHOICES, ids=[str(choice)[:30] for choice, _ in CHOICES])
def test_a_forced_call_is_one_with_its_own_arguments_whatever_the_tree(client, choice, names):
    body = ask(max_tokens=200, temperature=1.0, tools=TOOLS, tool_choice=choice)
    for seed in (1, 2, 3):
        found = []
        for tree in ({"method": "plain"}, {"tree": "12x3x3"}, {}):
            told = choice_of(client.post(CHAT, json=body | {"seed": seed, "eyas": tree}))
            (call,) = told["message"]["tool_calls"]
            assert told["finish_reason"] == "tool_calls" and told["message"]["content"] is None and call["type"] == "function"
            found.append((call["function"]["name"], call["function"]["arguments"]))
        assert len(set(found)) == 1
        name, arguments = found[0]
        assert name in names
        assert json.loads(arguments) in ([{"bird": "hawk"}, {"bird": "owl"}] if name == "look" else [{"to": 1}, {"to": 2}])
        message, reason = gathered(events(client.post(CHAT, json=body | {"seed": seed, "stream": True}).text))
        assert reason == "tool_calls" and message["content"] is None
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]] == [found[0]]


def test_a_forced_call_that_is_cut_is_content(client):
    body = ask(max_tokens=12, tools=TOOLS, tool_choice="required")
    told = choice_of(client.post(CHAT, json=body))
    assert told["finish_reason"] == "length" and told["message"]["content"].startswith('{"name":"')
    message, reason = gathered(events(client.post(CHAT, json=body | {"stream": True}).text))
    assert (message["content"], reason) == (told["message"]["content"], "length") and not message["tool_calls"]


def test_tools_are_shown_but_not_under_none_and_only_those_that_may_be_called(engine, client, shown):
    def prompt_tokens(**more):
        return client.post(CHAT, json=ask(max_tokens=1, **more)).json()["usage"]["prompt_tokens"]

    bare = prompt_tokens()
    assert prompt_tokens(tools=TOOLS, tool_choice="none") == bare == prompt_tokens(tools=[]) == prompt_tokens(tool_choice="auto")
    assert prompt_tokens(tools=TOOLS) == prompt_tokens(tools=TOOLS, tool_choice="auto") > bare
    one = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]}}
    assert bare < prompt_tokens(tools=TOOLS, tool_choice=one) == prompt_tokens(tools=TOOLS[:1]) < prompt_tokens(tools=TOOLS)


CALL = '<tool_call>\n{"name": "look", "arguments": {"bird": "a hawk </tool_call> 🦅"}}\n</tool_call>'
LOOK = Call("look", '{"bird": "a hawk </tool_call> 🦅"}')


def test_calls_among_what_the_model_says_are_parsed_whole_and_in_a_stream(client, shown, says):
    says(f"I look. <tool {CALL}\n{CALL}")
    told = choice_of(client.post(CHAT, json=ask(max_tokens=300, tools=TOOLS)))
    assert told["message"]["content"] == "I look. <tool" and told["finish_reason"] == "tool_calls"
    assert [(each["function"]["name"], each["function"]["arguments"]) for each in told["message"]["tool_calls"]] == [LOOK, LOOK]
    assert len({each["id"] for each in told["message"]["tool_calls"]}) == 2
    streamed = events(client.post(CHAT, json=ask(max_tokens=300, tools=TOOLS, stream=True)).text)
    message, reason = gathered(streamed)
    assert (message["content"], reason) == ("I look. <tool", "tool_calls")
    assert [(each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]] == [LOOK, LOOK]


def test_an_answer_without_calls_is_as_the_model_wrote_it(client, shown, says):
    for text in ("  I see <tool_call>nothing</tool_call>.\n", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'):
        says(text)
        told = choice_of(client.post(CHAT, json=ask(max_tokens=200, tools=TOOLS)))
        assert told["message"]["content"] == text and "tool_calls" not in told["message"] and told["finish_reason"] == "stop"


BAD = [
    ({"tools": [tool(), tool()]}, "two tools named look"),
    ({"tools": [tool("a b")]}, "a function's name is"),
    ({"tools": [{"type": "web_search"}]}, "must be an object of type function"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 5}}]}, "parameters must be"),
    ({"tools": [tool(f"t{number}") for number in range(129)]}, "up to 128 tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "swim"}}}, "there is no such tool"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "must name a function"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice must be auto, none, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "tool_choice must be"),
    ({"tool_choice": "required"}, "needs tools"),
    ({"tools": TOOLS}, "knows no tools; set tool_choice to required"),
    ({"tools": [tool(a={"type": "array", "uniqueItems": True})], "tool_choice": "required"}, "uniqueItems"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "both say"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "leaves no room for calls"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=lambda each: str(each)[:50])
def test_tools_that_cannot_be_are_refused_in_one_line(client, wrong, words):
    answer = client.post(CHAT, json=ask() | wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"] and "\n" not in error["message"], error


# ---- pieces ----

ANSWERS = [
    (f"Hello \n {CALL} and <tool_", [Said("Hello"), LOOK, Said("and <tool_")]),
    (f"{CALL}\n\n{CALL}", [LOOK, LOOK]),
    ('<tool_call>{"name": "look"}</tool_call>', [Call("look", "{}")]),
    ('<tool_call>{"name": "look", "arguments": "{\\"a\\": 1}"}', [Call("look", '{"a": 1}')]),  # the end tag is left out, arguments are text
    (" <tool_call>no</tool_call> <tool_call>{", [Said(" <tool_call>no</tool_call> <tool_call>{")]),
    ("a < b <tool <tool_call", [Said("a < b <tool <tool_call")]),
    (
        '<tool_call>{"name": "look", "arguments": {"a": 1e999}}</tool_call>',
        [Said('<tool_call>{"name": "look", "arguments": {"a": 1e999}}</tool_call>')],
    ),
    ('<tool_call>{"name": "swim", "arguments": {}}</tool_call>', [Said('<tool_call>{"name": "swim", "arguments": {}}</tool_call>')]),
    (" only blanks \n", [Said(" only blanks \n")]),
    ("", []),
]


def cut(draw, whole):
    places = sorted(draw.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)])]


@given(st.sampled_from(ANSWERS), st.data())
def test_however_a_text_is_cut_the_same_calls_come_of_it(answer, draw):
    text, wanted = answer
    reader, found = HermesCalls(["look"]), []
    for piece in cut(draw, text):
        found += reader.push(piece)
        assert not any(isinstance(each, Said) and "<tool_call>{" in each.text for each in found) or wanted[-1:] != [LOOK]
    assert joined([*found, *reader.finish()]) == wanted


TEMPLATE = {
    "start_anchor": "<|im_start|>assistant",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {"close": "<|im_end|>"},
        "tool_calls": {
            "open": "<s>",
            "close": "</s>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
        },
    },
}
TEMPLATED = [
    ('Hi <s>{"name": "look", "arguments": {"bird": "🦅"}}</s><|im_end|>', [Said("Hi "), Call("look", '{"bird": "🦅"}')]),
    ("<think>hm</think>so<|im_end|>", [Said("hm", "reasoning_content"), Said("so")]),
    ("a <s>{broken</s> b", [Said("a <s>{broken</s> b")]),
]
KEEPS_END = TEMPLATE | {"fields": {**TEMPLATE["fields"], "content": {}}}


def templated(tokenizer, template):
    parsing = pytest.importorskip("transformers.utils.chat_parsing", reason="this transformers reads no response templates")
    return TemplateCalls(tokenizer, parsing.ResponseParser(template, prefix=""), ["look"])


@given(st.sampled_from(TEMPLATED), st.sampled_from([TEMPLATE, KEEPS_END]), st.data())
def test_a_tokenizers_own_response_template_is_read_too(answer, template, draw):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    text, wanted = answer
    reader, found = templated(tokenizer, template), []
    for piece in cut(draw, tokenizer(text)["input_ids"]):
        found += reader.push("", piece)
    assert joined([*found, *reader.finish()]) == wanted


# ---- the real client ----


class Sighting(BaseModel):
    bird: Literal["hawk", "owl"]
    count: int = Field(ge=1, le=20)
    note: str = Field(max_length=6)


class Look(BaseModel):
    """Look for a bird."""

    bird: Literal["hawk", "owl"]


@pytest.fixture(scope="module")
def real(engine):
    """OpenAI's client of a real server on loopback."""
    with served(engine, "--slots", "2") as (_, server):
        http = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=http.run)
        thread.start()
        while not http.started:
            time.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        http.should_exit = True
        thread.join(10)


SETTINGS = {"model": "target", "messages": [{"role": "user", "content": "What is there?"}], "seed": 4, "max_tokens": 200}


def test_openais_client_parses_a_pydantic_model(real):
    told = real.chat.completions.parse(**SETTINGS, response_format=Sighting).choices[0].message.parsed
    assert isinstance(told, Sighting)
    with real.chat.completions.stream(**SETTINGS, response_format=Sighting) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == told


def test_openais_client_gets_a_forced_call_whole_and_streamed(real):
    forced = {"tools": [openai.pydantic_function_tool(Look)], "tool_choice": {"type": "function", "function": {"name": "Look"}}}
    (call,) = real.chat.completions.parse(**SETTINGS, **forced).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Look)
    with real.chat.completions.stream(**SETTINGS, **forced) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds and final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments


def test_openais_client_gets_a_call_of_the_models_own_in_a_stream(real, shown, says):
    says(f"I look.{CALL}")
    with real.chat.completions.stream(**SETTINGS, tools=TOOLS) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content == "I look." and json.loads(final.message.tool_calls[0].function.arguments)["bird"].startswith("a hawk")
    with pytest.raises(openai.BadRequestError, match="two tools"):
        real.chat.completions.create(**SETTINGS, tools=[tool(), tool()])
