"""A prompt as token ids: plain text, a conversation rendered through the target's chat template, or ids as they are.

Knows a tokenizer and its template; knows nothing of models or of how a sequence goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard, cast

from eyas.config import EyasError, Message, check_variables, short
from eyas.files.chat_data import MESSAGE_KEYS, ROLES, Conversation, encodable, message, tools_of
from eyas.files.chat_template import check_read, written
from eyas.files.tokenizer import encoded

Messages = Sequence[Message] | Sequence[dict[str, Any]]  # one conversation
TokenIds = Sequence[int]
WrittenPrompt = str | Messages
Prompt = WrittenPrompt | TokenIds
Prompts = list[str] | list[list[Message]] | list[list[dict[str, Any]]] | list[list[int]] | list[Prompt]
ANSWER, TURN, MESSAGE = "answer", "turn", "message"  # where a conversation ends: where an answer begins, behind its last turn, in it
GOES_ON = "<goes-on-here>"  # stands behind the text that is to be gone on with while the template is asked
FORMS = "text, a list of messages, or a list of token ids"


class TooLong(EyasError):
    """A prompt of more tokens than the model reads."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens, the model reads at most {context}; shorten it")
        self.tokens, self.context = tokens, context


def is_many(prompt: Prompt | Prompts) -> bool:
    """Whether this is a list of prompts rather than one string, one conversation or the token ids of one prompt. Raises `EyasError` for
    what is neither."""
    if hasattr(prompt, "tolist"):
        raise EyasError("a prompt of token ids is a list of whole numbers; give ids.tolist()")
    check_form(prompt)
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], Mapping | Real)


def check_form(prompt: Any) -> None:
    several = cast("Sequence[Any]", prompt) if isinstance(prompt, list | tuple) else ()
    if isinstance(prompt, bytes | bytearray) or any(
        isinstance(each, bytes | bytearray) for each in several
    ):  # which would pass as lists of numbers
        raise EyasError(f"a prompt is {FORMS}, not bytes; decode them first: data.decode()")
    if not isinstance(prompt, Sequence):
        raise EyasError(f"a prompt is {FORMS}, not {short(prompt)}")


def is_token_ids(prompt: Prompt) -> TypeGuard[TokenIds]:
    check_form(prompt)
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Real)


def checked_ids(ids: Sequence[Any], vocab_size: int, what: str) -> list[int]:
    """Token ids that the target has. Raises `EyasError` for any other."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < vocab_size:
            raise EyasError(f"{what} must be token ids from 0 to {vocab_size - 1}, not {short(token)}")
    return [int(token) for token in ids]


def render(
    tokenizer: Any,
    prompt: WrittenPrompt,
    raw: bool,
    directory: Path,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    ends: str = ANSWER,
) -> list[int]:
    """Token ids of a prompt: a string is one user turn (or plain text under `raw`), messages go through the chat template, with the tools
    on offer and with variables of its own, up to where it `ends`.

    `tokenizer`: transformers' of the target in `directory`. Raises EyasError for what the template or the tokenizer cannot say.
    """
    check_form(prompt)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise EyasError("the prompt is empty; give some text")
        if raw:
            return encoded(tokenizer, encodable(prompt, "the prompt"))["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if raw:
        raise EyasError("raw mode continues plain text; give a string, not messages")
    if not prompt:
        raise EyasError("the prompt is empty; give at least one message")
    if not getattr(tokenizer, "chat_template", None):
        raise EyasError(f"{directory} has no chat template; use --raw to continue plain text")
    text = encodable(ended(tokenizer, conversation_of(tokenizer, prompt, tools, variables), ends), "the prompt")
    return encoded(tokenizer, text, add_special_tokens=False)["input_ids"]  # the template wrote them


def ended(tokenizer: Any, conversation: Conversation, ends: str) -> str:
    """The template's text of a conversation up to where it `ends`. Raises `EyasError` where the last message cannot be gone on with."""
    if ends != MESSAGE:
        return written(tokenizer, conversation, prompt=ends == ANSWER).text
    last = conversation[-1]
    content = last.get("content")
    if not isinstance(content, str):
        raise EyasError("the last message has no text to go on with")
    text = written(tokenizer, conversation.with_messages([*conversation[:-1], {**last, "content": content + GOES_ON}])).text
    if GOES_ON not in text:
        raise EyasError("the chat template does not show the last message's end; it cannot be gone on with")
    return text[: text.rindex(GOES_ON)]


def conversation_of(
    tokenizer: Any, prompt: Messages, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any] | None
) -> Conversation:
    """Messages as chat APIs take them in one form, with the tools and variables of the call. What a `Conversation` brings of its own
    stays."""
    if isinstance(prompt, Conversation):
        found = prompt.with_messages(prompt)
    else:
        found = Conversation(prompt_message(turn, number) for number, turn in enumerate(prompt, start=1))
    if tools and found.tools is None:
        try:
            found.tools = tools_of(list(tools))
        except (TypeError, ValueError, RecursionError) as error:
            raise EyasError(f"the tools are not what JSON can hold ({error})") from None
    if variables:
        check_variables(variables)
        found.variables = {**variables, **found.variables}
        check_read(tokenizer, found, variables)
    return found


def prompt_message(turn: Any, number: int) -> dict[str, Any]:
    """A message of a prompt. Roles and fields that nobody else knows are handed to the template: it may know them."""
    if not isinstance(turn, Mapping):
        return message(turn, number)  # says what is wrong
    fields = {**cast("Mapping[str, Any]", turn)}
    role = fields.get("role")
    if isinstance(role, str) and role.lower() not in ROLES:
        found = {**message({**fields, "role": "user"}, number), "role": role}
    else:
        found = message(fields, number)
    return {**{key: value for key, value in fields.items() if key not in MESSAGE_KEYS}, **found}
