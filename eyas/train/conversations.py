"""Turns conversations into documents of tokens, and marks which tokens are answers.

Knows any chat template: an answer is found by rendering, never by a header written here.
Knows nothing of models, tensors or batches.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eyas.config import EyasError
from eyas.files.chat_data import CHAT_KEYS, FORMS, TEXT_KEY, Conversation, Message, messages_of
from eyas.files.chat_template import THOUGHT_ENDS, NotShown, as_conversation, try_apply, written
from eyas.files.records import read_objects
from eyas.train.answers import Span, answer_numbers, answer_span, served, special_tokens, tokens_of
from eyas.train.preformatted import preformatted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_ANSWER_TOKENS = 4  # an anchor's loss needs t_{j+1} and t_{j+2} in one answer; fewer tokens teach nothing
# What chat templates begin a turn with: a turn's own text that does so is already rendered, by this model's template or another's.
MARKS = ("<|im_start|>", "<|start_header_id|>", "<|begin_of_text|>", "[INST]", "<s>", "<start_of_turn>", "<|assistant|>", "<|user|>")


class Document(NamedTuple):
    """One conversation of T tokens."""

    tokens: list[int]  # [T]
    answers: list[int]  # [T] number of the answer (0, 1, ..) that the token belongs to, its end-of-turn token included; -1 elsewhere


# --- reading -------------------------------------------------------------------------------------------------------------------


def warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def read_conversations(path: str | Path, say: Callable[[str], None] = warn) -> tuple[list[tuple[int, Conversation]], list[str]]:
    """(line or entry number, conversation) of all that are valid, and one complaint for each that was skipped.

    `say` gets one line about the fields that were not read. Raises EyasError if the file cannot be read or holds no valid conversation.
    """
    found, complaints = read_objects(path, conversation_of, "conversation", '{"messages": [...]}')
    conversations = [(place.number, conversation) for place, conversation in found]
    for place, conversation in found:
        conversation.place = place.name
    unread = Counter(name for _, conversation in conversations for name in conversation.unread)
    if unread:
        named = ", ".join(f"{name} ({count})" for name, count in unread.most_common())
        say(f"{path}: fields of conversations that are not read, and in how many they stand: {named}")
    return conversations, complaints


def conversation_of(row: dict[str, Any]) -> Conversation:
    conversation = messages_of(row)
    if conversation is None:
        forms = f"{', '.join(CHAT_KEYS)}, {', '.join(form.name for form in FORMS[1:])} or {TEXT_KEY}"
        raise EyasError(f"no conversation in it; expected {forms} (docs/data.md lists the forms)")
    answers = {index for index, message in enumerate(conversation) if message["role"] == "assistant"}
    if conversation.text is None and not answers:
        raise EyasError("no assistant turn in it")
    if answers and answers <= conversation.not_learned:
        raise EyasError("every answer in it is marked as not to be learned")
    return conversation


def causes(complaints: Iterable[str]) -> list[str]:
    """Complaints that say the same but for their numbers, counted: "6 conversations, the first on line 3: no assistant turn in it"."""
    groups: dict[str, list[str]] = {}
    for complaint in complaints:
        groups.setdefault(re.sub(r"\d+", "N", complaint), []).append(complaint)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [f"{len(group)} conversations, the first on {group[0]}" if len(group) > 1 else group[0] for group in ordered]


# --- rendering -----------------------------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> Document:
    """The one document of a conversation whose answers all stand in one rendering. Raises EyasError as `documents` does, and where it takes
    several."""
    found = documents(tokenizer, messages)
    if len(found) > 1:
        turn = next(index for index, message in enumerate(messages, start=1) if message["role"] == "assistant")
        raise EyasError(f"the chat template rewrites the answer in message {turn} once others follow; this takes {len(found)} documents")
    return found[0]


def documents(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[Document]:
    """The tokens a server would see for this conversation, and which of them are answers. Mostly one document; where the template drops an
    answer's thoughts once other turns follow, that answer has a document that ends with it, as it was served.

    The text is tokenised once with add_special_tokens=False (the template writes its own BOS). An answer is all that the assistant said, as
    rendered, plus the end-of-turn token. Turns that are marked as not to be learned are read and are no answers.
    Raises EyasError if the template refuses the conversation, does not show something in it or rewrites an answer, or if no token is an
    answer.
    """
    conversation = as_conversation(messages)
    if conversation.text is None:
        _check_marks(conversation)
        rows = _rows(tokenizer, conversation)
    else:
        rows = [preformatted(tokenizer, conversation.text)]
    specials = set(special_tokens(tokenizer))
    found = []
    for text, spans in rows:
        tokens = tokens_of(tokenizer, text)
        answers = answer_numbers(tokens, spans, specials)
        if max(answers, default=-1) >= 0:
            found.append(Document(tokens.ids, answers))
    if not found:
        raise EyasError("no token of this conversation is an answer; it needs an assistant turn with text")
    return found


def _rows(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[tuple[str, list[Span]]]:
    """Texts and the answers in them, so that each answer to be learned stands in one of them as it was served: the whole conversation, and,
    where a turn is not what it was any more, the conversation up to there."""
    turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant" and turn not in conversation.not_learned]
    try:
        messages, text = written(tokenizer, conversation)
    except NotShown as error:  # some templates show a system message or tools only while they ask for an answer
        return [_row_of_prompt(tokenizer, conversation, turn, error) for turn in turns]
    rows: list[tuple[str, list[Span]]] = [(text, [])]
    for turn in reversed(turns):
        span = answer_span(tokenizer, messages, turn, rows[-1][0])
        if span is None:
            text, span = _own_row(tokenizer, messages, turn)
            rows.append((text, []))
        rows[-1][1].insert(0, span)
    return [row for row in reversed(rows) if row[1]]


def _own_row(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int) -> tuple[str, Span]:
    """The conversation up to message `turn`, and where its answer stands."""
    until = messages.with_messages(messages[: turn + 1])
    text = try_apply(tokenizer, until)
    span = None if text is None else answer_span(tokenizer, until, turn, text)
    if text is not None and span is not None:
        return text, span
    thoughts = messages[turn].get("reasoning_content") or THOUGHT_ENDS in (messages[turn]["content"] or "")
    row = served(tokenizer, messages, turn) if thoughts else None
    if row is None:
        raise EyasError(f"the chat template rewrites the answer in message {turn + 1} (it may drop reasoning); leave this conversation out")
    return row


def _row_of_prompt(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, turn: int, why: NotShown) -> tuple[str, list[Span]]:
    """What the target reads before message `turn`, and the answer; raises `why`, of the whole conversation, where that does not do."""
    if turn == 0:
        raise why
    asked = written(tokenizer, conversation.with_messages(conversation[:turn]), prompt=True).conversation
    row = served(tokenizer, conversation.with_messages([*asked, conversation[turn]]), turn)
    if row is None or conversation[turn].get("name"):
        raise why
    return row[0], [row[1]]


def _check_marks(messages: Sequence[Message]) -> None:
    """Turns that were put through a template before, this model's or another's, would teach its marks as text."""
    for number, message in enumerate(messages, start=1):
        mark = next((mark for mark in MARKS if (message["content"] or "").lstrip().startswith(mark)), None)
        if mark is not None:
            raise EyasError(f"message {number} begins with {mark}, as if put through a chat template before; give the turn's plain text")


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
