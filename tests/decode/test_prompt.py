"""A prompt is what the chat template makes of it, with all that it holds, or one line that says what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eyas.config import EyasError, Request
from eyas.decode.prompt import conversation_of, is_many, render
from eyas.engine import Engine, load
from eyas.files.chat_data import Conversation
from tests.tiny import CHATML, PARTS, byte_tokenizer, save_tiny_target

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}{{ m.mood }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{{ ' (calm)' if not enable_thinking is defined or not enable_thinking }}:{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    directory = save_tiny_target(tmp_path_factory.mktemp("prompts") / "target")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return load(directory, precision="fp32")


def text(engine: Engine, prompt: Any, **more: Any) -> str:
    return engine.tokenizer.decode(engine.encode(prompt, **more))


def test_a_string_is_a_user_turn(engine):
    assert text(engine, "hi") == text(engine, HI) == "user: hi\nassistant (calm):"


def test_messages_are_what_chat_apis_take(engine):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
    assert text(engine, [{"role": "user", "content": parts}]) == "user: hi\nthere\nassistant (calm):"
    turns = [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "12", "tool_call_id": "1"}]
    wanted = f"TOOLS {json.dumps(TOOLS)}\nuser: hi\nassistant: CALL weather {{}}\ntool: 12\nassistant (calm):"
    assert text(engine, turns, tools=TOOLS) == text(engine, Conversation(turns, TOOLS)) == wanted


def test_a_template_that_takes_parts_alone_gets_parts():
    """As those of LLaVA, Idefics and SmolVLM do: a string shows nothing there, as in servers, which find that out too."""
    tokenizer, hi = byte_tokenizer(PARTS), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for prompt in ("hi", HI, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]):
        assert tokenizer.decode(render(tokenizer, prompt, False, Path())) == hi
    strict = byte_tokenizer("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML)
    talk = [{"role": "system", "content": "s"}, *HI]  # a question alone shows nothing here, as text or as parts
    assert strict.decode(render(strict, talk, False, Path())).startswith("<|im_start|>system\ns<|im_end|>")


def test_a_conversation_is_left_as_it_is(engine):
    conversation = Conversation(HI)
    text(engine, conversation, tools=TOOLS, chat_template_kwargs={"enable_thinking": True})
    assert conversation.tools is None and conversation.variables == {} and conversation == HI


def test_roles_and_fields_that_only_the_template_knows_reach_it(engine):
    turns = [{"role": "Critic", "content": [{"type": "text", "text": "dull"}], "mood": " (cross)"}]
    assert text(engine, turns) == "Critic (cross): dull\nassistant (calm):"


def test_variables_of_the_template_are_set(engine):
    assert text(engine, "hi", chat_template_kwargs={"enable_thinking": True}) == "user: hi\nassistant:"
    own = Conversation(HI)
    own.variables = {"enable_thinking": False}
    assert text(engine, own, chat_template_kwargs={"enable_thinking": True}) == "user: hi\nassistant (calm):", "its own stand first"


def test_generate_and_stream_set_them_too(engine):
    asked = {"chat_template_kwargs": {"enable_thinking": True}, "tools": TOOLS}
    wanted = len(engine.encode("hi", **asked))
    assert wanted != len(engine.encode("hi"))
    assert engine.generate("hi", max_new_tokens=2, **asked).prompt_tokens == wanted
    *_, result = engine.stream(HI, Request(max_new_tokens=2, **asked))
    assert not isinstance(result, str) and result.prompt_tokens == wanted


def test_a_variable_may_name_one_of_several_templates():
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain {{ a }}{{ messages[0].content }}", "rag": "rag {{ b }}{{ messages[0].content }}"}
    assert tokenizer.decode(render(tokenizer, "x", False, Path())) == "plain x"
    assert tokenizer.decode(render(tokenizer, "x", False, Path(), None, {"chat_template": "rag", "b": "y"})) == "rag yx"
    with pytest.raises(EyasError, match="the chat template reads no variable a"):
        conversation_of(tokenizer, HI, None, {"chat_template": "rag", "a": 1})


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "a prompt is text, a list of messages, or a list of token ids, not None"),
        (b"hi", "not bytes; decode them first"),
        (7, "not 7"),
        ({"role": "user", "content": "hi"}, "a prompt is text, a list of messages, or a list of token ids"),
        (torch.tensor([1, 2]), "give ids.tolist()"),
        ([None], "a prompt is text, a list of messages, or a list of token ids, not None"),
        ([HI, None], "not None"),
        ([{"role": "user", "content": 5}], "message 1 has content that is not a string"),
        ([*HI, "hi"], "message 2 is not a JSON object"),
        ([{"content": "hi"}], "message 1 does not say who speaks"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "message 1 has a part of type 'image_url'"),
        ([{"role": "user", "content": ["hi", 5]}], "message 1 has a part that is no text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}], "message 1"),
        ([1, "x"], "must be token ids"),
        ([1, 2.5], "must be token ids"),
    ],
)
def test_what_cannot_be_a_prompt_is_one_line(engine, prompt, reason):
    with pytest.raises(EyasError) as caught:
        engine.generate(prompt, max_new_tokens=2)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"chat_template_kwargs": [1]}, "must be an object of variables"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' is no variable"),
        ({"chat_template_kwargs": {5: 1}}, "5 is no variable"),
        ({"chat_template_kwargs": {"thinkng": True}}, "the chat template reads no variable thinkng"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "raw": True}, "are for a chat template"),
        ({"tools": TOOLS, "raw": True}, "are for a chat template"),
        ({"tools": [print]}, '"tools" is not a list of functions with names'),
        ({"tools": [{"name": "f", "parameters": {1j}}]}, "the tools are not what JSON can hold"),
        ({"tools": 5}, "the tools are not what JSON can hold"),
    ],
)
def test_tools_and_variables_that_cannot_be_used_are_one_line(engine, settings, reason):
    with pytest.raises(EyasError) as caught:
        engine.generate("hi", max_new_tokens=2, **settings)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EyasError):
        engine.generate([1, 2], max_new_tokens=2, **settings | {"raw": False})


def test_lists_of_prompts_are_told_apart():
    assert is_many(["a"]) and is_many([HI]) and is_many([[1, 2]]) and is_many([Conversation(HI)])
    assert not is_many("a") and not is_many(HI) and not is_many((1, 2)) and not is_many([]) and not is_many(Conversation(HI))


def test_tools_that_the_template_does_not_show_are_refused(tmp_path):
    directory = save_tiny_target(tmp_path)
    with pytest.raises(EyasError, match="the chat template does not show tools"):
        load(directory, precision="fp32").generate("hi", tools=TOOLS, max_new_tokens=2)
