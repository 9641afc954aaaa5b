"""The fields of a request: one table that validates, and that /openapi.json and the docs are made of.

Nothing that changes the text is silently ignored: a known field with a value that cannot be honoured is refused, and an unknown one is
named once in the answer. Knows names, kinds and ranges; knows nothing of models or of HTTP.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eyas.config import short
from eyas.serve.refusals import Refused

CHAT, TEXT = "chat", "completions"
BOTH = (CHAT, TEXT)
MOST_STOPS, LONGEST_STOP, MOST_STOP_IDS = 16, 256, 128
MOST_BIASED, MOST_CHOICES, MOST_PROMPTS, MOST_TOOLS = 1024, 16, 64, 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ROLES = ["system", "developer", "user", "assistant", "tool"]
STRUCTURED = ("json", "regex", "choice", "grammar")
INT64 = 1 << 63


@dataclass(frozen=True)
class Field:
    """One field. `check` gives the value as it is used, or raises `Refused`; `schema` says in JSON schema what it takes."""

    name: str
    meaning: str
    check: Callable[[str, Any], Any]
    schema: dict[str, Any]
    default: Any = None
    of: tuple[str, ...] = BOTH


# ---- kinds ----


def number(least: float, most: float, above: bool = False) -> tuple[Callable[[str, Any], float], dict[str, Any]]:
    """A number from `least` (or above it) to `most`."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(f"{name} must be a number, not {short(value)}", name)
        if not least <= value <= most or (above and value == least):
            raise Refused(f"{name} must be {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}", name)
        return float(value)

    return check, {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most}


def integer(least: int, most: int) -> tuple[Callable[[str, Any], int], dict[str, Any]]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refused(f"{name} must be a whole number, not {short(value)}", name)
        if not least <= value <= most:
            raise Refused(f"{name} must be a whole number from {least} to {most}, not {short(value)}", name)
        return value

    return check, {"type": "integer", "minimum": least, "maximum": most}


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, not {short(value)}", name)
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} must be a string, not {short(value)}", name)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{name} must be an object, not {short(value)}", name)
    return value


def stops(name: str, value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    good = isinstance(found, list) and len(found) <= MOST_STOPS
    if not good or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in found):
        raise Refused(f"{name} must be a string or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters", name)
    return tuple(found)


def stop_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MOST_STOP_IDS or not all(is_whole(each) and each >= 0 for each in value):
        raise Refused(f"{name} must be a list of up to {MOST_STOP_IDS} token ids", name)
    return tuple(value)


def biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MOST_BIASED:
        raise Refused(f"{name} must be an object of up to {MOST_BIASED} token ids and what to add to their logits", name)
    found = {}
    for key, bias in value.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise Refused(f"{name}: {short(key)} is no token id", name)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise Refused(f"{name}: a bias is a number from -100 to 100, not {short(bias)}", name)
        found[int(key)] = float(bias)
    return found


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refused(f"{name} must be a list of messages, at least one", name)
    for place, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"{name}[{place}] must be an object with a role and its content", f"{name}[{place}]")
        if message["role"] not in ROLES:
            words = f"{name}[{place}] has the unknown role {short(message['role'])}; known are {', '.join(ROLES)}"
            raise Refused(words, f"{name}[{place}]")
    return value


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """One prompt or several, each text or token ids."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(is_whole, value)))
    found = [value] if one else value
    if not isinstance(found, list) or not 0 < len(found) <= MOST_PROMPTS:
        raise Refused(f"{name} must be a string, token ids, or up to {MOST_PROMPTS} of either", name)
    for each in found:
        good = isinstance(each, str) or (isinstance(each, list) and all(map(is_whole, each)))
        if not good or not each:
            raise Refused(f"{name} must be text or token ids, and not empty; found {short(each)}", name)
    return found


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS or not all(isinstance(each, dict) for each in value):
        raise Refused(f"{name} must be a list of up to {MOST_TOOLS} tools", name)
    names: set[str] = set()
    for place, tool in enumerate(value):
        where, function = f"{name}[{place}]", tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise Refused(f"{where} must be an object of type function, with the function", where)
        if not isinstance(function.get("name"), str) or not TOOL_NAME.fullmatch(function["name"]):
            raise Refused(f"{where}: a function's name is 1 to 64 of letters, digits, _ and -, not {short(function.get('name'))}", where)
        if function["name"] in names:
            raise Refused(f"{where}: there are two tools named {function['name']}", where)
        if not isinstance(function.get("parameters") or {}, dict):
            raise Refused(f"{where}: parameters must be a JSON schema, not {short(function['parameters'])}", where)
        names.add(function["name"])
    return value


def tool_choice(name: str, value: Any) -> str | dict[str, Any]:
    """ "auto", "none", "required", or {names: the tools that may be called, must: whether one is}."""
    if value in ("auto", "none", "required"):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        return {"names": [named(name, value)], "must": True}
    allowed = value.get("allowed_tools", value) if kind == "allowed_tools" else None
    listed, mode = (allowed.get("tools"), allowed.get("mode", "auto")) if isinstance(allowed, dict) else (None, None)
    if not isinstance(listed, list) or not listed or mode not in ("auto", "required"):
        known = "auto, none, required, a function, or allowed_tools with their mode, auto or required"
        raise Refused(f"{name} must be {known}; not {short(value)}", name)
    return {"names": [named(name, each) for each in listed], "must": mode == "required"}


def named(name: str, value: Any) -> str:
    """The name in {"type": "function", "function": {"name": ..}}."""
    function = value.get("function") if isinstance(value, dict) else None
    found = function.get("name") if isinstance(function, dict) else None
    if not isinstance(found, str):
        raise Refused(f"{name} must name a function, as {{'type': 'function', 'function': {{'name': ..}}}}", name)
    return found


def response_format(name: str, value: Any) -> dict[str, Any]:
    kind = mapping(name, value).get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise Refused(f"{name} {short(kind)} is not served; it may be text, json_object or json_schema", name)
    if kind == "json_schema" and not isinstance(value.get("json_schema"), dict):
        raise Refused(f"{name}.json_schema must be an object with the schema", name)
    schema = (value if kind == "json_object" else value.get("json_schema", {})).get("schema", {})
    if kind != "text" and not isinstance(schema, dict):
        raise Refused(f"{name}: a schema must be an object, not {short(schema)}", name)
    return value


def structured_outputs(name: str, value: Any) -> dict[str, Any]:
    """One form, by its kind."""
    found = {kind: each for kind, each in mapping(name, value).items() if each is not None}
    if len(found) != 1 or not set(found) <= set(STRUCTURED):
        raise Refused(f"{name} must have one of {', '.join(STRUCTURED)}", name)
    ((kind, form),) = found.items()
    if kind == "json" and isinstance(form, str):
        try:
            form = json.loads(form)
        except ValueError as error:
            raise Refused(f"{name}.json is no JSON ({short(str(error))})", name) from None
    if kind == "json" and not isinstance(form, dict):
        raise Refused(f"{name}.json must be a schema, not {short(form)}", name)
    if kind == "choice" and not (isinstance(form, list) and form and all(isinstance(each, str) and each for each in form)):
        raise Refused(f"{name}.choice must be a list of strings", name)
    if kind in ("regex", "grammar") and not (isinstance(form, str) and form):
        raise Refused(f"{name}.{kind} must be a string, not {short(form)}", name)
    return {kind: form}


def text_logprobs(name: str, value: Any) -> int | None:
    if value is True:
        return 0
    if value is False:
        return None
    if not is_whole(value) or not 0 <= value <= 20:
        raise Refused(f"{name} must be a whole number from 0 to 20", name)
    return value


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def only(*values: Any) -> tuple[Callable[[str, Any], Any], dict[str, Any]]:
    """One of a few values; what else there is elsewhere is not served."""

    def check(name: str, value: Any) -> Any:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise Refused(f"{name} {short(value)} is not served; leave it out", name)
        return value

    return check, {"enum": list(values)}


def anything(name: str, value: Any) -> Any:
    return value


# ---- the table ----

STRING, BOOLEAN, OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
ECHO = "whether the prompt's text comes first, with its log probabilities under logprobs; max_tokens may then be 0"
PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": STRING}}
SAID = {"role": {"enum": ROLES}, "content": {"anyOf": [STRING, {"type": "array", "items": PART}, {"type": "null"}]}}
MESSAGES = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"], "properties": SAID}}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
SOME = {"type": "string", "minLength": 1}
PROMPTS = {"anyOf": [SOME, IDS, {"type": "array", "items": {"anyOf": [SOME, IDS]}, "minItems": 1, "maxItems": MOST_PROMPTS}]}
STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
STRINGS = {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MOST_STOPS}]}
COUNTED = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, BOOLEAN]}
FIELDS: tuple[Field, ...] = (
    Field("model", "a name that the server goes by", text, STRING),
    Field("messages", "the conversation so far", messages, MESSAGES, of=(CHAT,)),
    Field("prompt", "text to go on with, or its token ids; several give several choices", prompts, PROMPTS, of=(TEXT,)),
    Field("max_completion_tokens", "tokens of the answer at most; -1: what fits", *integer(-1, 1 << 31), of=(CHAT,)),
    Field("max_tokens", "tokens of the answer at most; -1: what fits", *integer(-1, 1 << 31)),
    Field("temperature", "0: the likeliest token", *number(0, 2), default=1.0),
    Field("top_p", "the likeliest tokens that together have this probability", *number(0, 1, above=True), default=1.0),
    Field("top_k", "so many likeliest tokens; 0 or -1: all", *integer(-1, 1 << 31), default=0),
    Field("min_p", "tokens at least this share as likely as the likeliest", *number(0, 1), default=0.0),
    Field("repetition_penalty", "over prompt and answer", *number(0.01, 10), default=1.0),
    Field("frequency_penalty", "over the answer", *number(-2, 2), default=0.0),
    Field("presence_penalty", "over the answer", *number(-2, 2), default=0.0),
    Field("logit_bias", "token ids and what is added to their logits", biases, OBJECT),
    Field("seed", "what the answer is drawn with; told in the answer", *integer(-INT64, INT64 - 1)),
    Field("n", "answers", *integer(1, MOST_CHOICES), default=1),
    Field("stop", "strings that end the answer", stops, STRINGS, default=()),
    Field("stop_token_ids", "token ids that end it", stop_ids, {"type": "array", "items": {"type": "integer"}}, default=()),
    Field("min_tokens", "tokens before which nothing ends it", *integer(0, 1 << 31), default=0),
    Field("ignore_eos", "the model's own end does not end it", boolean, BOOLEAN, default=False),
    Field("logprobs", "whether log probabilities are told", boolean, BOOLEAN, default=False, of=(CHAT,)),
    Field("top_logprobs", "of so many likeliest tokens too", *integer(0, 20), default=0, of=(CHAT,)),
    Field("logprobs", "log probabilities of so many likeliest tokens", text_logprobs, COUNTED, of=(TEXT,)),
    Field("echo", ECHO, boolean, BOOLEAN, default=False, of=(TEXT,)),
    Field("stream", "whether the answer comes in pieces", boolean, BOOLEAN, default=False),
    Field("stream_options", "include_usage: a last piece with the counts", mapping, OBJECT),
    Field("response_format", "text, json_object or json_schema; always enforced", response_format, OBJECT, of=(CHAT,)),
    Field("structured_outputs", "json, regex, choice or grammar: the form of the answer", structured_outputs, OBJECT),
    Field("tools", "functions on offer, which the chat template shows", tools, {"type": "array", "items": OBJECT}, of=(CHAT,)),
    Field("tool_choice", "auto, none, required, a function, or allowed_tools", tool_choice, {"anyOf": [STRING, OBJECT]}, of=(CHAT,)),
    Field("chat_template_kwargs", "variables of the chat template", mapping, OBJECT, of=(CHAT,)),
    Field("add_generation_prompt", "whether an answer's beginning ends the prompt", boolean, BOOLEAN, of=(CHAT,)),
    Field("continue_final_message", "whether the answer goes on with the last message", boolean, BOOLEAN, default=False, of=(CHAT,)),
    Field("grammar", "as structured_outputs has it", text, STRING),
    Field("json_schema", "as structured_outputs has json", mapping, OBJECT),
    Field("cache_prompt", "whether rows of earlier prompts may be reused; no answer changes by it", boolean, BOOLEAN, default=True),
    Field("eyas", "tree: a shape as 16x4x4; method: the server's or plain; trace: true tells the rounds with the answer", mapping, OBJECT),
    Field("user", "not read", anything, {}),
    Field("metadata", "not read", anything, {}),
    Field("prediction", "not read", anything, {}, of=(CHAT,)),
    Field("id_slot", "not read", *integer(-1, 1 << 31)),
    Field("timings_per_token", "not read: timings come with the end", boolean, BOOLEAN),
    Field("return_progress", "not read", boolean, BOOLEAN),
    Field("verbose", "not read", boolean, BOOLEAN),
    Field("skip_special_tokens", "they are", *only(True)),
    Field("include_stop_str_in_output", "it is not", *only(False)),
    Field("use_beam_search", "is not served", *only(False)),
    Field("functions", "are tools by now", *only(None), of=(CHAT,)),
    Field("function_call", "is tool_choice by now", *only(None), of=(CHAT,)),
    Field("audio", "is not served", *only(None), of=(CHAT,)),
    Field("store", "nothing is stored", *only(False)),
    Field("service_tier", "there is one", *only("auto", "default")),
    Field("parallel_tool_calls", "as the model likes", anything, BOOLEAN, of=(CHAT,)),
    Field("best_of", "as many as n", anything, {}, of=(TEXT,)),
    Field("suffix", "is not served", *only(""), of=(TEXT,)),
    Field("modalities", "text", *only(["text"]), of=(CHAT,)),
)


def fields_of(kind: str) -> dict[str, Field]:
    return {field.name: field for field in FIELDS if kind in field.of}


def read(kind: str, body: Mapping[str, Any], strict: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The values of a body's fields with their defaults, and the names it has that are not known. Raises `Refused`. A null is a field left
    out."""
    known = fields_of(kind)
    unknown = [name for name in body if name not in known]
    if unknown and strict:
        raise Refused(f"unknown field {short(unknown[0])}", unknown[0])
    found = {name: field.default for name, field in known.items()}
    for name, value in body.items():
        if name in known and value is not None:
            found[name] = known[name].check(name, value)
    return found, unknown


def parsed(content: bytes) -> dict[str, Any]:
    """A body as JSON. Raises `Refused` for what is no object, for names given twice, and for numbers and characters that JSON has not."""
    try:
        body = json.loads(content.decode(), object_pairs_hook=unique, parse_constant=no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is no character
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except UnicodeError:
        raise Refused("the body is no UTF-8, or has half a character") from None
    except json.JSONDecodeError as error:
        raise Refused(f"the body is no JSON: {error.msg}, at character {error.pos}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise Refused(f"the body is no JSON ({short(str(error))})") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(f"{short(name)} is given twice", name)
        found[name] = value
    return found


def no_constant(name: str) -> float:
    raise Refused(f"{name} is no JSON number")
