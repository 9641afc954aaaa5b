"""A prompt as token ids: plain text, a conversation rendered through the target's chat template, or ids as they are.

Knows a tokenizer and its template; knows nothing of models or of how a sequence goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from eyas.config import EyasError, Message, short
from eyas.files.chat_data import encodable
from eyas.files.chat_template import written

Messages = Sequence[Message] | Sequence[dict[str, str]]  # one conversation
TokenIds = Sequence[int]
WrittenPrompt = str | Messages
Prompt = WrittenPrompt | TokenIds
Prompts = list[str] | list[list[Message]] | list[list[dict[str, str]]] | list[list[int]] | list[Prompt]


def is_many(prompt: Prompt | Prompts) -> bool:
    """Whether this is a list of prompts rather than one string, one conversation or the token ids of one prompt. Raises `EyasError` for a
    tensor or an array."""
    if hasattr(prompt, "tolist"):
        raise EyasError("a prompt of token ids is a list of whole numbers; give ids.tolist()")
    return not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], dict | int)


def is_token_ids(prompt: Prompt) -> TypeGuard[TokenIds]:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], int)


def checked_ids(ids: Sequence[Any], vocab_size: int, what: str) -> list[int]:
    """Token ids that the target has. Raises `EyasError` for any other."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise EyasError(f"{what} must be token ids from 0 to {vocab_size - 1}, not {short(token)}")
    return list(ids)


def render(tokenizer: Any, prompt: WrittenPrompt, raw: bool, directory: Path) -> list[int]:
    """Token ids of a prompt: a string is one user turn (or plain text under `raw`), messages go through the chat template.

    `tokenizer`: transformers' of the target in `directory`. Raises EyasError for what the template or the tokenizer cannot say.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise EyasError("the prompt is empty; give some text")
        if raw:
            return tokenizer(encodable(prompt, "the prompt"), verbose=False)["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if raw:
        raise EyasError("raw mode continues plain text; give a string, not messages")
    if not prompt:
        raise EyasError("the prompt is empty; give at least one message")
    if not getattr(tokenizer, "chat_template", None):
        raise EyasError(f"{directory} has no chat template; use --raw to continue plain text")
    text = encodable(written(tokenizer, prompt, prompt=True).text, "the prompt")
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template wrote them; too long is the caller's to say
