"""The chat template cut open, so that a model can write both sides of a conversation, token by token.

A tokenizer without a chat template gives plain text mode: no questions, the whole text is one answer. Knows a tokenizer; knows nothing of
models or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from eyas.config import EyasError
from eyas.files.chat_data import Conversation
from eyas.files.chat_template import apply, check_read
from eyas.files.tokenizer import encoded

PROBE = "\ue001question\ue001"  # private-use characters: stand in for turns while the template shows where it puts them
SAID = "\ue002answer\ue002"
SPACES = ("\u0120", "\u2581")  # how tokenizers write the space before a word
LONG_WORD = 6  # letters
PLAIN_TEXT = "plain text, no chat template"


class Template:
    """Tokens before the first question (`before`), between question and answer (`after`), between answer and next question (`again`).

    `again` is empty where the template rewrites earlier turns: conversations then have one. `ends`: tokens that end a turn. A template
    that writes the date writes the same one on every day. Raises EyasError for a template that cannot be cut so, and for `variables` that
    it does not read.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.chat = tokenizer, bool(getattr(tokenizer, "chat_template", None))
        self.variables = dict(variables or {})
        self.after: list[int] = []
        self.again: list[int] = []
        if not self.chat:
            if variables:
                raise EyasError("chat-template-kwargs are for a chat template, and this target has none; leave them out")
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            if first is None and not end_ids:
                raise EyasError("the tokenizer has neither a chat template nor a token that text begins with; train with --data")
            self.text, self.ends = PLAIN_TEXT, set(end_ids)
            self.before: list[int] = [end_ids[0] if first is None else first]
            return
        if variables:
            check_read(tokenizer, self.conversation([]), variables)
        self.text = self.rendered(PROBE)
        if self.text.count(PROBE) != 1:
            raise EyasError("the chat template does not show a user turn as it is written; train from conversations with --data")
        before, after = self.text.split(PROBE)
        self.before, self.after, self.again = self.tokens(before), self.tokens(after), self.tokens(self.between_turns())
        self.text = before + "{question}" + after
        self.ends = {*end_ids, self.after[0]}

    def tokens(self, text: str) -> list[int]:
        return encoded(self.tokenizer, text, add_special_tokens=False)["input_ids"]

    def text_of(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def words(self) -> list[int]:
        """The tokens that are a whole long word, or a name, behind a space; none for a tokenizer that does not mark spaces."""
        found = []
        for piece, number in sorted(self.tokenizer.get_vocab().items(), key=lambda each: each[1]):
            word = piece[1:]
            if piece[:1] in SPACES and word.isascii() and word.isalpha() and len(word) >= (LONG_WORD if word.islower() else LONG_WORD - 2):
                found.append(number)
        return found

    def rendered(self, question: str, system: str | None = None) -> str:
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": question})
        return apply(self.tokenizer, self.conversation(turns), prompt=True)

    def conversation(self, turns: list[dict[str, Any]]) -> Conversation:
        found = Conversation(turns)
        found.variables, found.kept = self.variables, True
        return found

    def before_with(self, system: str) -> list[int]:
        """`before` under another system message."""
        text = self.rendered(PROBE, system)
        return self.tokens(text[: text.index(PROBE)])

    def between_turns(self) -> str:
        """The text between an answer and the next question, from the end-of-turn token on; "" where the template rewrites earlier turns."""
        turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": SAID}, {"role": "user", "content": PROBE}]
        try:
            whole = apply(self.tokenizer, self.conversation(turns), prompt=True)
        except TemplateError:
            return ""
        if not whole.startswith(self.text + SAID) or whole.count(PROBE) != 2:
            return ""
        return whole[len(self.text + SAID) : whole.rindex(PROBE)]
