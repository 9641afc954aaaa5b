"""Turns conversations into documents of tokens, and marks which tokens are answers.

Knows any chat template: an answer is found by rendering, never by a header written here.
Knows nothing of models, tensors or batches, and reads no tool calls (a line with a tool's turn is reported and skipped).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from eyas.config import EyasError
from eyas.files.chat_data import CHAT_KEYS, Message, messages_of, read_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_ANSWER_TOKENS = 4  # an anchor's loss needs t_{j+1} and t_{j+2} in one answer; fewer tokens teach nothing
PROBE = "\ue000eyas\ue000"  # private-use characters: stands in for an answer while the template shows where it puts answers
# What chat templates begin a turn with: a turn's own text that does so is already rendered, by this model's template or another's.
MARKS = ("<|im_start|>", "<|start_header_id|>", "<|begin_of_text|>", "[INST]", "<s>", "<start_of_turn>", "<|assistant|>", "<|user|>")
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)  # what templates raise on input they do not expect


class Document(NamedTuple):
    """One conversation of T tokens."""

    tokens: list[int]  # [T]
    answers: list[int]  # [T] number of the answer (0, 1, ..) that the token belongs to, its end-of-turn token included; -1 elsewhere


class _Rendered(NamedTuple):
    """A conversation as the template writes it, and where in `text` each of its T tokens lies (characters)."""

    text: str
    tokens: list[int]  # [T]
    starts: list[int]  # [T] ascending
    ends: list[int]  # [T] ascending


# --- reading -------------------------------------------------------------------------------------------------------------------


def read_conversations(path: str | Path) -> tuple[list[tuple[int, list[Message]]], list[str]]:
    """(line number, conversation) of every valid line, and one complaint for each line that was skipped.

    Raises EyasError if the file cannot be read or has no valid line.
    """
    return read_lines(path, conversation_of, "conversation", '{"messages": [...]}')


def conversation_of(row: dict[str, Any]) -> list[Message]:
    messages = messages_of(row)
    if messages is None:
        raise EyasError(f"no conversation in it; expected {' or '.join(f'{key!r}' for key in CHAT_KEYS)}".replace("'", '"'))
    if not any(message["role"] == "assistant" for message in messages):
        raise EyasError("no assistant turn in it")
    return messages


# --- rendering -----------------------------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> Document:
    """The tokens a server would see for this conversation, and which of them are answers.

    The text is rendered once and tokenised once with add_special_tokens=False (the template writes its own BOS). An answer is the
    content as rendered plus the end-of-turn token; a token that straddles the answer's start belongs to what came before.
    Raises EyasError if the template refuses the conversation, rewrites an answer (some drop reasoning), or no token is an answer.
    """
    _check_marks(messages)
    rendered = _render(tokenizer, messages)
    specials = _special_ids(tokenizer)
    answers = [-1] * len(rendered.tokens)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for number, turn in enumerate(turns):
        begin, end = _answer_span(tokenizer, messages, turn, rendered.text)
        first, stop = bisect_left(rendered.starts, begin), _stop(rendered, specials, end)
        answers[first:stop] = [number] * (stop - first)
    if max(answers, default=-1) < 0:
        raise EyasError("no token of this conversation is an answer; it needs an assistant turn with text")
    return Document(rendered.tokens, answers)


def _check_marks(messages: Sequence[Message]) -> None:
    """Turns that were put through a template before, this model's or another's, would teach its marks as text."""
    for number, message in enumerate(messages, start=1):
        mark = next((mark for mark in MARKS if message["content"].lstrip().startswith(mark)), None)
        if mark is not None:
            raise EyasError(f"message {number} begins with {mark}, as if put through a chat template before; give the turn's plain text")


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> _Rendered:
    if not tokenizer.is_fast:
        raise EyasError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (tokenizer.json)")
    try:
        text = _apply(tokenizer, messages)
    except TEMPLATE_ERRORS as error:
        raise EyasError(f"the chat template cannot render this conversation ({_one_line(error)}); change it or leave it out") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts: list[int] = []
    ends: list[int] = []
    for start, end in encoded["offset_mapping"]:
        # Byte-level tokenizers trim spaces off their offsets; a token of nothing but spaces is left empty, after them.
        starts.append(min(start, ends[-1] if ends else 0) if start == end else start)
        ends.append(end)
    return _Rendered(text, list(encoded["input_ids"]), starts, ends)


def _apply(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)  # of one conversation, not tokenized
    return text


def _try_apply(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], prompt: bool = False) -> str | None:
    """Many templates refuse an empty conversation or an odd order; for a helper's rendering that is an answer, not an error."""
    try:
        return _apply(tokenizer, messages, prompt)
    except TEMPLATE_ERRORS:
        return None


def _answer_span(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """Characters [begin, end) of `text` that hold the answer of message `turn`, without its end-of-turn token.

    begin is where a generation prompt ends. What the template puts between that and the content (a header, an empty
    reasoning block) is no answer; blanks there are, since there the model writes them (and may join them to the first word).
    """
    content = messages[turn]["content"].strip()
    prompt = _try_apply(tokenizer, messages[:turn], prompt=True)
    prompt_end = len(prompt) if prompt is not None and text.startswith(prompt) else None
    span = _probed_span(tokenizer, messages, turn, text) or _literal_span(text, content, prompt_end)
    if span is None or text[slice(*span)].strip() != content:
        raise EyasError(f"the chat template rewrites the answer in message {turn + 1} (it may drop reasoning); leave this conversation out")
    begin, end = span
    if prompt_end is not None and not text[prompt_end:begin].strip():
        begin = prompt_end
    return begin, end


def _probed_span(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int] | None:
    """Where the content lies, found by rendering the same conversation with PROBE instead; None if the template treats the two
    differently."""
    probed = _try_apply(tokenizer, [*messages[:turn], {**messages[turn], "content": PROBE}, *messages[turn + 1 :]])
    if probed is None or probed.count(PROBE) != 1:
        return None
    before, after = probed.split(PROBE)
    begin, end = len(before), len(text) - len(after)
    return (begin, end) if begin <= end and text.startswith(before) and text.endswith(after) else None


def _literal_span(text: str, content: str, prompt_end: int | None) -> tuple[int, int] | None:
    """Where the stripped content lies, if it follows the generation prompt with nothing but blanks between; else None."""
    if prompt_end is None:
        return None
    begin = len(text) - len(text[prompt_end:].lstrip())
    return (begin, begin + len(content)) if text.startswith(content, begin) else None


def _stop(rendered: _Rendered, specials: set[int], end: int) -> int:
    """Index after the end-of-turn token: the first special token past the content's last character, with only blanks between."""
    for index in range(bisect_right(rendered.ends, end), len(rendered.tokens)):
        if rendered.tokens[index] in specials:
            return index + 1
        if rendered.text[end : rendered.ends[index]].strip():
            break
    return bisect_left(rendered.starts, end)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """`all_special_ids` names only eos, bos and their like; Llama-3's <|eot_id|> is special only among the added tokens."""
    return {*tokenizer.all_special_ids, *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- documents -----------------------------------------------------------------------------------------------------------------


def truncate(document: Document, max_length: int) -> Document | None:
    """The first `max_length` tokens, or None if fewer than MIN_ANSWER_TOKENS of them are answers or no two of one answer."""
    cut = Document(document.tokens[:max_length], document.answers[:max_length])
    enough = sum(answer >= 0 for answer in cut.answers) >= MIN_ANSWER_TOKENS
    return cut if enough and any(one == other >= 0 for one, other in pairwise(cut.answers)) else None


def draft_vocabulary(documents: Iterable[Document], size: int, vocab_size: int, always: Iterable[int] = ()) -> list[int]:
    """The `size` target ids that a draft can say, ascending: `always`, then the most frequent in answers (ties: the lower id).

    Ids never seen count 0, so too few distinct tokens are padded with the lowest unused ids (SafeAILab's list came out short).
    `always` is for the end-of-turn ids: a draft without them misses the end of each turn.
    """
    forced = sorted(set(always))
    _check_vocabulary(size, vocab_size, forced)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in documents:
        said = np.array([token for token, answer in zip(document.tokens, document.answers, strict=True) if answer >= 0], dtype=np.int64)
        if said.size and said.max() >= vocab_size:
            raise EyasError(f"token {said.max()} lies outside the target's vocabulary of {vocab_size}; use the target's own tokenizer")
        np.add.at(counts, said, 1)
    counts[forced] = np.iinfo(np.int64).max
    return sorted(np.argsort(-counts, kind="stable")[:size].tolist())


def _check_vocabulary(size: int, vocab_size: int, forced: list[int]) -> None:
    if not 0 < size <= vocab_size:
        raise EyasError(f"draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}; choose 1 to {vocab_size}")
    if len(forced) > size:
        raise EyasError(f"draft vocabulary of {size} cannot hold the {len(forced)} ids that must be in it; choose a larger one")
    if forced and not 0 <= forced[0] <= forced[-1] < vocab_size:
        raise EyasError(f"ids {forced} must be in the draft vocabulary but the target has only 0 to {vocab_size - 1}; correct the ids")
