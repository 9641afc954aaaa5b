"""The form that an answer must have, as a request asks for it: a JSON schema, a regular expression, one of some texts, a grammar, a call.

Knows these fields' values and llguidance, which turns them into matchers; knows nothing of sequences, answers or HTTP.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from eyas.serve.fields import CHAT
from eyas.serve.refusals import Refused

if TYPE_CHECKING:
    from eyas.decode.grammar import Matcher

MOST_BYTES, MOST_DEPTH = 64 << 10, 32  # of a schema or a grammar
MOST_SECONDS = 5.0  # to compile it
MOST_AT_ONCE = 2  # that are compiled at a time, those included that nobody waits for any more
APART = "import sys; from llguidance import LLMatcher; LLMatcher.validate_grammar(sys.stdin.read())"
COMPACT = {"whitespace_flexible": False}  # JSON without blanks: a small model may write blanks for ever
LONGEST = 200  # characters of an error that are told


class Form(NamedTuple):
    """A form as it was asked for: `kind` of json, regex, choice, grammar, call."""

    kind: str
    value: Any
    field: str  # that asked for it


def form_of(kind: str, values: Mapping[str, Any]) -> Form | None:
    """The form that a request asks for, if any. Raises `Refused` where it asks for two."""
    found = [
        form
        for form in (*own(values), structured(values), *([response(values), forced(values)] if kind == CHAT else []))
        if form is not None
    ]
    if len(found) > 1:
        raise Refused(f"{found[0].field} and {found[1].field} both say what the answer is to be; leave one out", found[1].field)
    if found and values["ignore_eos"]:
        raise Refused(f"ignore_eos and {found[0].field} do not go together: an answer of that form has an end", "ignore_eos")
    if found and found[0].kind != "call" and kind == CHAT and calls_are_read(values):
        words = f"{found[0].field} leaves no room for calls; set tool_choice to none, or leave {found[0].field} out"
        raise Refused(words, found[0].field)
    return found[0] if found else None


def response(values: Mapping[str, Any]) -> Form | None:
    given = values["response_format"] or {}
    if given.get("type") == "json_object":
        return Form("json", given.get("schema", {"type": "object"}), "response_format")
    if given.get("type") == "json_schema":
        return Form("json", given["json_schema"].get("schema", {}), "response_format")
    return None


def own(values: Mapping[str, Any]) -> list[Form]:
    """Under the names that llama.cpp's server gives them."""
    named = (("json_schema", "json"), ("grammar", "grammar"))
    return [Form(kind, values[name], name) for name, kind in named if values[name] is not None]


def structured(values: Mapping[str, Any]) -> Form | None:
    for kind, value in (values["structured_outputs"] or {}).items():
        return Form(kind, value, "structured_outputs")
    return None


# ---- tools ----


def offered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that may be called."""
    tools, choice = values["tools"] or [], values["tool_choice"]
    if choice == "none":
        return []
    if isinstance(choice, dict):
        return [tool for tool in tools if tool["function"]["name"] in choice["names"]]
    return tools


def must_call(values: Mapping[str, Any]) -> bool:
    choice = values["tool_choice"]
    return choice == "required" or (isinstance(choice, dict) and choice["must"])


def calls_are_read(values: Mapping[str, Any]) -> bool:
    """Whether calls are looked for in what the model says as it likes."""
    return bool(offered(values)) and not must_call(values)


def forced(values: Mapping[str, Any]) -> Form | None:
    return Form("call", [tool["function"] for tool in offered(values)], "tools") if must_call(values) else None


def call_begins(name: str) -> str:
    """How a forced call begins; `}` ends it."""
    return f'{{"name":{json.dumps(name)},"arguments":'


# ---- grammars ----


class Forms:
    """Compiles forms for one model. `ends`: ids that end a turn. Raises `Refused`, with llguidance's words."""

    def __init__(self, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.ends = list(ends) or [end for end in (tokenizer.eos_token_id,) if end is not None]
        self.lock, self.free = threading.Lock(), threading.Semaphore(MOST_AT_ONCE)
        self.words: Any = None

    def matcher(self, form: Form) -> Matcher:
        """A matcher at the form's beginning."""
        check_size(form)
        found: list[Matcher | Refused | Exception] = []

        def compile_it() -> None:
            try:
                found.append(self.compiled(form))
            except Exception as error:
                found.append(error)
            finally:
                self.free.release()

        self.prepare(form.field)
        if not self.free.acquire(timeout=MOST_SECONDS):
            raise Refused(f"{form.field}: others are being read; try again soon", form.field, 429, "rate_limit_error", "queue_full")
        thread = threading.Thread(target=compile_it, daemon=True)
        thread.start()
        thread.join(2 * MOST_SECONDS)  # of which a process apart may take one half
        if not found:
            raise too_slow(form.field)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def prepare(self, field: str) -> None:
        """Read the vocabulary, once."""
        with self.lock:
            if self.words is not None:
                return
            if not self.ends:
                raise Refused(f"{field} needs a model with an end-of-turn token", field)
            try:
                from llguidance import hf
            except ImportError:
                raise Refused(f"{field} needs llguidance: pip install 'eyas[serve]'", field) from None
            try:
                self.words = hf.from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.ends)
            except Exception as error:  # it says of some tokenizers that it cannot read them, each in its own way
                raise Refused(f"{field} is not served for this model's tokenizer ({one_line(str(error))})", field) from None

    def compiled(self, form: Form) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = grammar_of(form)
        except ValueError as error:
            raise Refused(f"{form.field}: {one_line(str(error))}", form.field) from None
        if may_take_for_ever(form):
            tried_apart(grammar, form.field)
        found = LLMatcher(self.words, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if found.is_error():
            raise Refused(f"{form.field}: {one_line(found.get_error())}", form.field)
        found.compute_bitmask()  # limits are met at the first look, too
        if found.is_error():
            raise Refused(f"{form.field}: {one_line(found.get_error())}", form.field)
        return found


def grammar_of(form: Form) -> str:
    """A form in llguidance's own words. Raises `ValueError`, or `Refused`."""
    from llguidance import LLMatcher, grammar_from

    if form.kind == "json":
        return LLMatcher.grammar_from_json_schema(form.value, defaults=COMPACT)  # type: ignore[arg-type]
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.value)
    if form.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(literal, form.value)))
    if form.kind == "grammar":
        return grammar_from("grammar", form.value)
    rules = [
        f"call{number}: {literal(call_begins(each['name']))} arguments{number} {literal('}')}\n"
        f"arguments{number}: {json_rule(each.get('parameters') or {'type': 'object'})}"
        for number, each in enumerate(form.value)
    ]
    return LLMatcher.grammar_from_lark("\n".join([f"start: {' | '.join(f'call{number}' for number in range(len(rules)))}", *rules]))


def may_take_for_ever(form: Form) -> bool:
    """Whether a form may intersect regular expressions, which llguidance's limits do not bound."""
    text = json.dumps(form.value)
    return form.kind == "grammar" or '"allOf"' in text or text.count('"pattern') + text.count('"format"') > 1


def tried_apart(grammar: str, field: str) -> None:
    """Read a grammar in a process that ends when its time is over, as a thread would not. Raises `Refused` where it is."""
    try:
        subprocess.run([sys.executable, "-c", APART], input=grammar, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise too_slow(field) from None


def too_slow(field: str) -> Refused:
    return Refused(f"{field} took more than {MOST_SECONDS:g} seconds to read; make it simpler", field)


def json_rule(schema: Mapping[str, Any]) -> str:
    """A schema as a rule of its own, so that its references are its own too."""
    return f"%json {json.dumps({'x-guidance': COMPACT, **schema})}"


def literal(text: str) -> str:
    return json.dumps(text)


def check_size(form: Form) -> None:
    """Raise `Refused` for what is too large or too deep to be read."""
    if depth(form.value) > MOST_DEPTH + (form.kind == "call"):
        raise Refused(f"{form.field} is nested more than {MOST_DEPTH} deep", form.field)
    if len(json.dumps(form.value)) > MOST_BYTES:
        raise Refused(f"{form.field} is larger than {MOST_BYTES} bytes", form.field)


def depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    deepest, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        deepest += 1
        level = [below for each in level for below in (each.values() if isinstance(each, dict) else each)]
    return deepest


def one_line(text: str) -> str:
    words = " ".join(text.replace("<non-verbose/>", "").split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."
