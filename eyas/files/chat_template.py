"""A conversation as a tokenizer's chat template writes it, with all that it holds.

Templates differ in how they want what is not plain text: arguments of a call as JSON text or as an object, no content as "" or as null,
thoughts in a field or in the content. The spelling that a template shows is found by rendering. What it cannot show is an error, never left
out. Knows tokenizers and messages; knows nothing of files, training or prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

from eyas.config import EyasError
from eyas.files.chat_data import Conversation, Message

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)  # what templates raise on input they do not expect
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
THOUGHT_FIELDS = re.compile(r"reasoning_content|[.'\"](reasoning|thinking)\b")  # by which templates read thoughts
DIRECTIVES = "aAbBcCdDeFGhHIjklmMnpPrRSTuUVwWxXyYzZ"  # of strftime, but for those that depend on the machine's time zone
PROBE, NAME_PROBE = "\ue000{}\ue000", "\ue003{}\ue003"  # private-use characters: stand in for a message's text, a speaker's name


def on_one_day(template: str) -> str:
    """A template that writes the date, made to write the same one on every day, by a macro in place of transformers' strftime_now."""
    if "strftime_now" not in template:
        return template
    day = datetime(2026, 1, 1)
    directives = {f"%{letter}": day.strftime(f"%{letter}") for letter in DIRECTIVES}
    directives = {f"%-{letter[1]}": text.lstrip("0") or "0" for letter, text in directives.items()} | directives
    filters = "".join(f" | replace({directive!r}, {text!r})" for directive, text in directives.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}\n{template}"  # the line break is the tag's own


class Written(NamedTuple):
    """A conversation in the template's own spelling, and the text it makes of it."""

    conversation: Conversation
    text: str


class NotShown(EyasError):
    """A template that leaves something out."""


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> Written:
    """What the template makes of messages (a `Conversation` brings tools and variables); `prompt`: up to where the answer begins.

    Raises EyasError, in one line, where the template refuses them, and `NotShown` where it leaves out something that they hold: tools,
    calls, a turn's text.
    """
    conversation = as_conversation(messages)
    problems: list[EyasError] = []
    for form in spellings(conversation, template_text(tokenizer, conversation)):
        try:
            text = apply(tokenizer, form, prompt)
            check_shown(tokenizer, form, text, prompt)
        except NotShown as error:
            problems.insert(0, error)  # says more than that another spelling fails
        except TEMPLATE_ERRORS as error:
            refused = f"the chat template cannot render this conversation ({one_line(error)}); change it or leave it out"
            problems.append(EyasError(refused))
        else:
            return Written(form, text)
    raise problems[0]


def apply(tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> str:
    """The template's text for messages in its own spelling, unchecked; raises whatever the template raises."""
    conversation, template = as_conversation(messages), template_text(tokenizer, as_conversation(messages))
    variables = dict(conversation.variables)
    if conversation.kept and "strftime_now" in template:
        variables["chat_template"] = on_one_day(template)
    turns = list(map(in_parts, conversation)) if wants_parts(template) else list(conversation)
    text = tokenizer.apply_chat_template(turns, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt, **variables)
    assert isinstance(text, str)  # of one conversation, not tokenized
    return text


@lru_cache(maxsize=16)
def wants_parts(template: str) -> bool:
    """Whether a template shows text only where the content is a list of parts, as those of models that read images too may do."""
    if "content" not in template:
        return False
    from transformers.utils.chat_template_utils import render_jinja_template

    def shows(turn: Message) -> bool:
        try:
            (text,), _ = render_jinja_template([[turn]], chat_template=template, bos_token="", eos_token="")
        except Exception:  # a template may refuse anything, in any way
            return False
        return PROBE in text

    turn = {"role": "user", "content": PROBE}
    return not shows(turn) and shows(in_parts(turn))


def in_parts(message: Message) -> Message:
    """A message whose content is a list of one part of text, where it is text."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def try_apply(tokenizer: Any, messages: Sequence[Message], prompt: bool = False) -> str | None:
    """Many templates refuse an empty conversation or an odd order; for a helper's rendering that is an answer, not an error."""
    try:
        return apply(tokenizer, messages, prompt)
    except TEMPLATE_ERRORS:
        return None


def check_read(tokenizer: Any, conversation: Conversation, variables: Mapping[str, Any]) -> None:
    """Raise EyasError for variables that the template does not read: they would change nothing."""
    template = template_text(tokenizer, conversation)
    unread = [name for name in variables if template and name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", template)]
    if unread:
        raise EyasError(f"the chat template reads no variable {', '.join(unread)}; leave it out of chat-template-kwargs")


def as_conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    return messages if isinstance(messages, Conversation) else Conversation(map(dict, messages))


def changed(conversation: Conversation, change: Callable[[int, Message], Message]) -> Conversation:
    """The conversation with each message put through `change`, which gets its index too; the given one is left as it is."""
    return conversation.with_messages(change(index, message) for index, message in enumerate(conversation))


def template_text(tokenizer: Any, conversation: Conversation) -> str:
    """The template that will write this conversation; "" where there is none (which rendering says). A variable `chat_template` names one
    of several."""
    try:
        return tokenizer.get_chat_template(conversation.variables.get("chat_template"), tools=conversation.tools) or ""
    except ValueError:
        return ""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- spellings ----


def spellings(conversation: Conversation, template: str) -> Iterator[Conversation]:
    """The conversation in every spelling that this template may want, the likeliest first; mostly there is but one."""
    plain = changed(conversation, lambda _, message: thoughts_where_read(message, template))
    calls = any(message.get("tool_calls") for message in plain)
    # A developer's message is the system's, under its earlier name, for every template that does not know the newer one.
    names = ("developer", "system") if "developer" in template else ("system",)
    for developer in names if any(message["role"] == "developer" for message in plain) else ("developer",):
        for arguments in (given, as_objects, as_texts) if calls else (given,):
            for empty in ("", None) if any(message.get("content") is None for message in plain) else ("",):
                yield changed(plain, lambda _, message: spelled(message, developer, arguments, empty))  # noqa: B023 (used at once)


def thoughts_where_read(message: Message, template: str) -> Message:
    """An answer's thoughts in fields of their own where the template reads such; else as they are."""
    if message["role"] != "assistant":
        return message
    content, thought = message.get("content"), message.get("reasoning_content")
    fields = THOUGHT_FIELDS.search(template)
    if fields and not thought and content and THOUGHT_ENDS in content:
        before, _, content = content.partition(THOUGHT_ENDS)
        thought, content = before.rpartition(THOUGHT_BEGINS)[2].strip("\n"), content.lstrip("\n")
        message = {**message, "content": content}
    if thought and fields:
        return {**message, "reasoning_content": thought, "reasoning": thought, "thinking": thought}
    return message


def spelled(message: Message, developer: str, arguments: Callable[[Any], Any], empty: str | None) -> Message:
    message = {**message, "role": developer} if message["role"] == "developer" else message
    content = empty if message.get("content") is None else message.get("content")
    if not message.get("tool_calls"):
        return {**message, "content": content}
    calls = [
        {**call, "function": {**call["function"], "arguments": arguments(call["function"]["arguments"])}} for call in message["tool_calls"]
    ]
    return {**message, "content": content, "tool_calls": calls}


def given(arguments: Any) -> Any:
    return arguments


def as_objects(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def as_texts(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# ---- what is shown ----


def calls_are_shown(tokenizer: Any, conversation: Conversation, text: str, prompt: bool) -> bool:
    """Whether the calls stand in the text, with their arguments as JSON: neither as JSON text within JSON nor as Python writes objects."""
    arguments = [call["function"]["arguments"] for message in conversation for call in message.get("tool_calls", ())]
    if not arguments:
        return True
    for held in arguments:
        if isinstance(held, str):
            twice = (json.dumps(held), json.dumps(held, ensure_ascii=False))
            if held not in text or any(wrapped in text for wrapped in twice):
                return False
        elif repr(held) in text and repr(held) != json.dumps(held):
            return False
    without = changed(conversation, lambda _, message: {key: value for key, value in message.items() if key != "tool_calls"})
    emptied = changed(
        conversation, lambda _, message: spelled(message, "developer", lambda held: "{}" if isinstance(held, str) else {}, "")
    )
    hidden = [without, *([emptied] if any(held not in ({}, "{}") for held in arguments) else [])]
    return all(try_apply(tokenizer, other, prompt) != text for other in hidden)


def check_shown(tokenizer: Any, conversation: Conversation, text: str, prompt: bool) -> None:
    """Raise NotShown where the calls, the tools, a turn that is no answer, or a speaker's name does not stand in the text.

    Thoughts of earlier answers are left out by design; who renders answers looks for each. A tool's name stands in its call too.
    """
    if not calls_are_shown(tokenizer, conversation, text, prompt):
        raise NotShown("the chat template does not show tool calls")
    if conversation.tools and try_apply(tokenizer, conversation.with_tools(None), prompt) == text:
        raise NotShown("the chat template does not show tools")
    shown = try_apply(tokenizer, changed(conversation, probed), prompt)
    if shown is None:  # a template that looks into what it is given
        return
    for index, message in enumerate(conversation):
        if message["role"] != "assistant" and PROBE.format(index) not in shown:
            raise NotShown(f"the chat template does not show a message of role {message['role']}")
        if named(message) and NAME_PROBE.format(index) not in shown:
            raise NotShown("the chat template does not show who speaks by name; take the names out, or write them into the content")


def probed(index: int, message: Message) -> Message:
    content = {} if message["role"] == "assistant" else {"content": PROBE.format(index)}
    return {**message, **content, **({"name": NAME_PROBE.format(index)} if named(message) else {})}


def named(message: Message) -> bool:
    return bool(message.get("name")) and message["role"] != "tool"
