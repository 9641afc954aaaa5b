"""Every way in which people write a conversation becomes OpenAI's messages, and nothing that changes its meaning is passed over."""

from __future__ import annotations

import json

import pytest

from eyas.config import EyasError
from eyas.files.chat_data import CHAT_KEYS, IGNORED_KEYS, MARKS, REASONING, REFUSED_KEYS, ROLES, message, messages_of

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        *({key: TALK} for key in CHAT_KEYS),
        {"messages": json.dumps(TALK)},  # as parquet files often have it
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "User", "content": ["q"]}, {"role": "Assistant", "content": [{"type": "text", "text": "a"}]}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"question": "q", "answer": "a"},
        {"input": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "context": None, "response": "a"},
        {"text": None, "messages": TALK, "conversations": []},
        {"messages": [], "conversations": TALK},
        {"messages": [{"role": "human", "from": "user", "value": "q"}, {"from": "ai", "value": "a", "content": "a"}]},
    ],
    ids=str,
)
def test_all_forms_are_the_same_conversation(row):
    found = messages_of(row)
    assert found == TALK and not found.unread and not found.not_learned and found.tools is None


def test_an_instruction_brings_its_input_its_system_and_what_came_before():
    row = {"instruction": "Sum up.", "input": "Hawks fly.", "output": "They fly.", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    assert [(turn["role"], turn["content"]) for turn in messages_of(row)] == [
        ("system", "Be brief."),
        *(("user", "Hi"), ("assistant", "Hello")),
        *(("user", "Sum up.\nHawks fly."), ("assistant", "They fly.")),
    ]


def test_text_parts_are_joined_by_a_line_break():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert message({"role": "user", "content": parts}, 1) == {"role": "user", "content": "a\nb\nc"}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_message_may_stand_beside_the_turns(key):
    assert messages_of({key: "s", "messages": TALK}) == [{"role": "system", "content": "s"}, *TALK]
    own = [{"role": "system", "content": "s"}, *TALK]
    assert messages_of({key: "s", "messages": own}) == own
    with pytest.raises(EyasError, match="begins with a system message and has another"):
        messages_of({key: "other", "messages": own})


def test_every_role_has_openais_name():
    assert {message({"from": role, "value": "x"}, 1)["role"] for role in ROLES} == {"system", "developer", "user", "assistant", "tool"}
    assert message({"role": "OBSERVATION", "content": "12"}, 1) == {"role": "tool", "content": "12"}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": '{"city": "Ulm"}'}]},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": '{"city": "Ulm"}'})},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
    ],
    ids=str,
)
def test_every_spelling_of_a_call_is_openais(turn):
    assert message(turn, 1) == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_calls_keep_their_ids_and_arguments_that_are_objects():
    calls = [{"id": "a1", "function": {"name": "f", "arguments": {"x": [1]}}}, {"function": {"name": "g"}}]
    assert message({"role": "assistant", "content": "Let me see.", "tool_calls": calls}, 1)["tool_calls"] == [
        {"id": "a1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert message({"role": "tool", "content": "12", "tool_call_id": "a1", "name": "f"}, 1) == {
        "role": "tool",
        "content": "12",
        "name": "f",
        "tool_call_id": "a1",
    }


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL["function"]]), [json.dumps(TOOL)]], ids=str)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_wrapped_as_openai_wraps_them(key, tools):
    assert messages_of({key: tools, "messages": TALK}).tools == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null", " "])
def test_no_tools_are_none(nothing):
    assert messages_of({"tools": nothing, "messages": TALK}).tools is None


@pytest.mark.parametrize("key", REASONING)
def test_thoughts_have_one_name(key):
    want = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert message({"role": "assistant", "content": "a", key: "hm"}, 1) == want
    assert message({"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}, 1) == want


@pytest.mark.parametrize("key", MARKS)
def test_marks_say_which_turns_are_not_learned(key):
    four = [*TALK, *TALK]
    assert messages_of({"messages": [four[0], {**four[1], key: 0}, four[2], {**four[3], key: True}]}).not_learned == {1}
    assert messages_of({"messages": four, key: [0, 1]}).not_learned == {1}
    assert messages_of({"messages": four, key: [0, 1, 0, 0], "system": "s"}).not_learned == {1, 3, 4}
    assert messages_of({"messages": four, key: False}).not_learned == {0, 1, 2, 3}
    assert messages_of({"messages": [four[0], {**four[1], key: 1}, *four[2:]], key: 0}).not_learned == {0, 2, 3}  # the turn's own counts
    with pytest.raises(EyasError, match=r"only 0 and 1 \(false and true\) can be honoured"):
        messages_of({"messages": [TALK[0], {**TALK[1], key: 0.5}]})
    with pytest.raises(EyasError, match="3 marks for 4 messages and 2 answers"):
        messages_of({"messages": four, key: [1, 0, 1]})


def test_text_in_the_targets_own_form_is_kept_as_it_is():
    found = messages_of({"text": "<|im_start|>user\nq<|im_end|>\n", "id": 3})
    assert found == [] and found.text == "<|im_start|>user\nq<|im_end|>\n" and not found.unread


def test_a_row_without_a_conversation_is_none():
    assert messages_of({"prompt": "q"}) is None and messages_of({"words": "q"}) is None and messages_of({"messages": None}) is None


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_what_would_change_the_meaning_is_refused_by_name(key):
    with pytest.raises(EyasError, match=f'"{key}" is'):
        messages_of({"messages": TALK, key: [1]})
    assert messages_of({"messages": TALK, key: []}) == TALK


def test_fields_that_are_not_read_are_named_and_those_known_to_say_nothing_are_not():
    row = {
        "messages": [{**TALK[0], "mood": "sad", "tone": None}, {**TALK[1], "id": 4}],
        "score": 5,
        "note": None,
        "conversations": TALK[:1],
        **dict.fromkeys(IGNORED_KEYS, "x"),
    }
    assert messages_of(row).unread == {'"score"', '"mood" of a message', '"conversations"'}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": "{}"}]}]}, "message 1 has a tool call that is not"),
        ({"messages": [{"role": "assistant", "tool_calls": {"name": "f"}}]}, "message 1 has tool_calls that are not a list"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": 7}]}, "message 1's reasoning is not a string"),
        ({"messages": [{"role": "user", "content": "q", "name": 7}]}, 'message 1\'s "name" is not a string'),
        ({"messages": TALK, "tools": "weather"}, '"tools" is text that is not JSON'),
        ({"messages": TALK, "tools": [{"parameters": {}}]}, '"tools" is not a list of functions with names'),
        ({"messages": TALK, "chat_template_kwargs": [1]}, '"chat_template_kwargs" is not an object'),
        ({"instruction": "q", "output": "a", "history": ["x"]}, '"history" is not a list'),
        ({"instruction": 7, "output": "a"}, '"instruction" is not a string'),
        ({"instruction": "q", "output": ["a", "another"]}, '"output" is not a string'),
        ({"messages": [{"role": "user", "from": "gpt", "content": "q"}]}, "message 1 has two roles, 'user' and 'gpt'; keep one"),
        ({"messages": [{"from": "user", "content": "q", "value": "p"}]}, "message 1 says two different things as content and value"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "message 1 does not say who speaks: it has no role or from, but 'human'"),
        ({"prompt": "q", "completion": 7}, "message 2 has content that is not a string"),
        ({"text": 7}, '"text" is not a string'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "\ud83d"}]}]}, "message 1's tool call holds half"),
    ],
    ids=str,
)
def test_what_cannot_be_used_says_why(row, reason):
    with pytest.raises(EyasError) as caught:
        messages_of(row)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
