"""Calls of tools in what a model says, found as the text comes: what stands before a call is told at once, and a call when it closes.

However a text is cut into pieces, the same calls and the same content come of it. Knows how models write calls; knows nothing of answers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

from eyas.serve.forms import call_begins

OPENS, CLOSES = "<tool_call>", "</tool_call>"
CONTENT, THOUGHTS = "content", "reasoning_content"
CALLS, THINKING = "tool_calls", "thinking"  # fields of transformers' response templates


class Call(NamedTuple):
    name: str
    arguments: str  # JSON text


class Said(NamedTuple):
    """Text of a field of the message."""

    text: str
    field: str = CONTENT


Found = list[Call | Said]


class Reader(Protocol):
    """Reads one answer."""

    def push(self, text: str, tokens: Sequence[int]) -> Found:
        """What is certain now that this text and these tokens have come."""
        ...

    def finish(self) -> Found:
        """The rest, at the answer's end."""
        ...


class ForcedCall:
    """An answer that a grammar makes one call. One that was cut is content."""

    def __init__(self, names: Collection[str]) -> None:
        self.names, self.text = names, ""

    def push(self, text: str, tokens: Sequence[int]) -> Found:
        self.text += text
        return []

    def finish(self) -> Found:
        for name in self.names:
            begins = call_begins(name)
            if self.text.startswith(begins) and is_object(self.text):
                return [Call(name, self.text[len(begins) : -1])]
        return [Said(self.text)] if self.text else []


class HermesCalls:
    """Calls as <tool_call>{"name": .., "arguments": {..}}</tool_call>, which Qwen, Hermes and many others write. What is no call of a tool
    on offer is content as it stands. Blanks beside a call belong to it."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.text = ""  # that is not told yet; inside a call what follows its opening
        self.blank = ""  # in front of `text`: a call that follows would drop it
        self.inside = self.called = False  # whether a call is open; whether nothing but blanks came since one
        self.searched = 0  # characters of an open call in which no end was found

    def push(self, text: str, tokens: Sequence[int] = ()) -> Found:
        self.text += text
        found: Found = []
        while self.inner(found) if self.inside else self.outer(found):
            pass
        return joined(found)

    def finish(self) -> Found:
        found: Found = []
        if self.inside:
            self.close(self.text, "", found)
        else:
            self.say(self.text, found)
        if self.blank and not self.called:
            found.append(Said(self.blank))
        return joined(found)

    def outer(self, found: Found) -> bool:
        """Tell what comes before a call; True: a call was opened."""
        before, opened, after = self.text.partition(OPENS)
        held = 0 if opened else next(length for length in range(len(OPENS) - 1, -1, -1) if self.text.endswith(OPENS[:length]))
        self.say(before[: len(before) - held], found)
        self.text = after if opened else before[len(before) - held :]
        self.inside, self.searched = bool(opened), 0
        return self.inside

    def say(self, text: str, found: Found) -> None:
        text = self.blank + text
        if self.called:
            text = text.lstrip()
        kept = text.rstrip()
        self.blank = text[len(kept) :]
        if kept:
            found.append(Said(kept))
            self.called = False

    def inner(self, found: Found) -> bool:
        """Tell a call that has closed; True: one has."""
        end = self.text.find(CLOSES, self.searched)
        if end < 0:
            self.searched = max(self.searched, len(self.text) - len(CLOSES) + 1)
            return False
        body = self.text[:end]
        if self.in_a_string(body):
            self.searched = end + 1
            return True
        self.text = self.text[end + len(CLOSES) :]
        self.close(body, CLOSES, found)
        return True

    @staticmethod
    def in_a_string(body: str) -> bool:
        try:
            json.loads(body)
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string")
        except (ValueError, RecursionError):
            pass
        return False

    def close(self, body: str, closes: str, found: Found) -> None:
        self.inside = False
        call = call_of(parsed(body), self.names)
        if call is None:
            self.say(OPENS + body + closes, found)
        else:
            found.append(call)
            self.blank, self.called = "", True


class TemplateCalls:
    """Calls as a tokenizer's response template says, by transformers' parser. It reads special tokens too, so it gets the tokens' own
    text, letter by letter: where a call turns out to be none, what was read of it is content."""

    def __init__(self, tokenizer: Any, parser: Any, names: Collection[str]) -> None:
        self.tokenizer, self.parser, self.names = tokenizer, parser, names
        self.window: list[int] = []  # tokens whose text may yet change, and some before
        self.shown = 0  # characters of their text that were read
        self.since = ""  # what was read since something was told
        self.broken = False

    def push(self, text: str, tokens: Sequence[int]) -> Found:
        self.window += tokens
        written = self.tokenizer.decode(self.window, skip_special_tokens=False)
        if written.endswith("\ufffd"):
            return []
        found = joined(self.read(written[self.shown :]))
        if tokens and tokens[-1] == self.tokenizer.eos_token_id and isinstance(last := found[-1] if found else None, Said):
            # where the template leaves it in, the token that ends a turn is no text of it
            found[-1] = Said(last.text.removesuffix(self.tokenizer.eos_token), last.field)
        self.shown = len(written)
        if len(self.window) > 64:
            self.window = self.window[-8:]
            self.shown = len(self.tokenizer.decode(self.window, skip_special_tokens=False))
        return [each for each in found if each != Said("", CONTENT)]

    def finish(self) -> Found:
        found = self.read(self.tokenizer.decode(self.window, skip_special_tokens=False)[self.shown :])
        if not self.broken:
            try:
                found += self.events(self.parser.finalize()[1])
            except ValueError:
                found.append(Said(self.since))
        return joined(found)

    def read(self, text: str) -> Found:
        found: Found = []
        for letter in text:
            if self.broken:
                found.append(Said(letter))
                continue
            self.since += letter
            try:
                found += self.events(self.parser.feed(letter))
            except ValueError:
                self.broken = True
                found.append(Said(self.since))
        return found

    def events(self, events: Sequence[dict[str, Any]]) -> Found:
        found: Found = []
        for event in events:
            field = {CONTENT: CONTENT, THINKING: THOUGHTS}.get(event["field"])
            if event["type"] == "region_chunk" and field:
                found.append(Said(event["text"], field))
            elif event["type"] == "region_close" and event["field"] == CALLS:
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                calls = [call_of(value.get("function", value) if isinstance(value, dict) else None, self.names) for value in values]
                found += [call for call in calls if call is not None] if all(calls) else [Said(self.since)]
            else:
                continue
            self.since = ""
        return found


def joined(found: Found) -> Found:
    """Neighbouring texts of one field as one."""
    out: Found = []
    for each in found:
        if isinstance(each, Said) and out and isinstance(last := out[-1], Said) and last.field == each.field:
            out[-1] = Said(last.text + each.text, each.field)
        else:
            out.append(each)
    return out


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_object(text: str) -> bool:
    return isinstance(parsed(text), dict)


def call_of(value: Any, names: Collection[str]) -> Call | None:
    """A call of one of these tools, if it is one."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments)
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:
        return None


def reader_of(tokenizer: Any, tools: Sequence[dict[str, Any]], must: bool, prompt: str) -> Reader:
    """What reads an answer that may call these tools; under `must` it is a call. `prompt`: what the answer follows, special tokens
    included."""
    names = [tool["function"]["name"] for tool in tools]
    if must:
        return ForcedCall(names)
    template = getattr(tokenizer, "response_template", None)
    if template is not None:
        try:
            from transformers.utils.chat_parsing import ResponseParser
        except ImportError:  # of a transformers that does not have it yet
            return HermesCalls(names)
        with contextlib.suppress(ValueError):  # a template that it cannot read
            return TemplateCalls(tokenizer, ResponseParser(template, prefix=prompt, tools=list(tools)), names)
    return HermesCalls(names)
