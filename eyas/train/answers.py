"""Where the answers lie in a conversation that a chat template has written, by rendering it again with other words in their place.

Knows any template and any fast tokenizer; a header or an end-of-turn mark is never written here. Knows nothing of files or of training.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from eyas.config import EyasError
from eyas.files.chat_data import Conversation
from eyas.files.chat_template import THOUGHT_BEGINS, THOUGHT_ENDS, template_text, try_apply
from eyas.files.tokenizer import encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE = "\ue000eyas\ue000"  # private-use characters: stands in for an answer while the template shows where it puts answers

Span = tuple[int, int]  # characters [begin, end) of a text that hold an answer, without its end-of-turn token


class Tokens(NamedTuple):
    """A text, and where in it each of its T tokens lies (characters)."""

    text: str
    ids: list[int]  # [T]
    starts: list[int]  # [T] ascending
    ends: list[int]  # [T] ascending


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """The tokens of a text that brings its own special tokens. Raises EyasError for a tokenizer that does not say where they lie."""
    if not tokenizer.is_fast:
        raise EyasError(f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer (tokenizer.json)")
    found = encoded(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    starts: list[int] = []
    ends: list[int] = []
    for start, end in found["offset_mapping"]:
        # Byte-level tokenizers trim spaces off their offsets; a token of nothing but spaces is left empty, after them.
        starts.append(min(start, ends[-1] if ends else 0) if start == end else start)
        ends.append(end)
    return Tokens(text, list(found["input_ids"]), starts, ends)


def answer_numbers(tokens: Tokens, spans: Sequence[Span], specials: set[int]) -> list[int]:
    """For each token the number of the answer that it belongs to, its end-of-turn token included; -1 elsewhere. [T]

    A token that straddles an answer's start belongs to what came before.
    """
    answers = [-1] * len(tokens.ids)
    for number, (begin, end) in enumerate(spans):
        first, stop = bisect_left(tokens.starts, begin), end_of_turn(tokens, specials, end)
        answers[first:stop] = [number] * (stop - first)
    return answers


def end_of_turn(tokens: Tokens, specials: set[int], end: int) -> int:
    """Index after the end-of-turn token: the first special token past the content's last character, with only blanks between."""
    for index in range(bisect_right(tokens.ends, end), len(tokens.ids)):
        if tokens.ids[index] in specials:
            return index + 1
        if tokens.text[end : tokens.ends[index]].strip():
            break
    return bisect_left(tokens.starts, end)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """`all_special_ids` names only eos, bos and their like; Llama-3's <|eot_id|> is special only among the added tokens."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


# ---- spans ----


def answer_span(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int, text: str) -> Span | None:
    """Where `text`, the template's of these messages, holds all that the assistant said in message `turn`; None where it does not.

    It begins where a generation prompt ends. What the template puts between that and the content (a header, an empty reasoning block) is no
    answer; blanks there are, since there the model writes them (and may join them to the first word).
    """
    message = messages[turn]
    if message.get("tool_calls") or message.get("reasoning_content"):
        return _whole_turn(tokenizer, messages, turn, text)
    content = message["content"].strip()
    prompt = _prompt(tokenizer, messages, turn)
    prompt_end = len(prompt) if prompt is not None and text.startswith(prompt) else None
    span = _probed_span(tokenizer, messages, turn, text) or _literal_span(text, content, prompt_end)
    if span is None or text[slice(*span)].strip() != content:
        return None
    begin, end = span
    if prompt_end is not None and prompt_end <= end and not text[prompt_end:begin].strip():
        begin = prompt_end  # also where the prompt has the content's beginning, <think>
    return begin, end


def _prompt(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int) -> str | None:
    """What the target read before it wrote message `turn`."""
    return try_apply(tokenizer, messages.with_messages(messages[:turn]), prompt=True)


def _probed_span(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int, text: str) -> Span | None:
    """Where the content lies, found by rendering the same conversation with PROBE instead; None if the template treats the two
    differently."""
    probed = try_apply(tokenizer, messages.with_messages([*messages[:turn], {**messages[turn], "content": PROBE}, *messages[turn + 1 :]]))
    if probed is None or probed.count(PROBE) != 1:
        return None
    before, after = probed.split(PROBE)
    begin, end = len(before), len(text) - len(after)
    return (begin, end) if begin <= end and text.startswith(before) and text.endswith(after) else None


def _literal_span(text: str, content: str, prompt_end: int | None) -> Span | None:
    """Where the stripped content lies, if it follows the generation prompt with nothing but blanks between; else None."""
    if prompt_end is None:
        return None
    begin = len(text) - len(text[prompt_end:].lstrip())
    return (begin, begin + len(content)) if text.startswith(content, begin) else None


def _whole_turn(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int, text: str) -> Span | None:
    """The span of a turn of several parts (thoughts, content, calls): all that the template writes once it is there, up to its end."""
    until = try_apply(tokenizer, messages.with_messages(messages[: turn + 1]))
    prompt = _prompt(tokenizer, messages, turn)
    if until is None or prompt is None:
        return None
    # A prompt may open the thoughts where the turn, rendered, has none.
    prompt = next((start for start in (prompt, prompt.rstrip().removesuffix(THOUGHT_BEGINS)) if until.startswith(start)), None)
    if prompt is None:
        return None
    message = messages[turn]
    begin = len(prompt) + len(_header(tokenizer, messages, turn, prompt, until))
    end = _turn_end(tokenizer, messages, turn, prompt, until)
    parts = [message.get("reasoning_content"), message["content"], *(call["function"]["name"] for call in message.get("tool_calls", ()))]
    said = until[begin:end]
    return (begin, end) if text.startswith(until[:end]) and all(part.strip() in said for part in parts if part) else None


def _plain_answer(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int) -> tuple[str, str] | None:
    """What the template writes before and after the content where message `turn` is the last, and an answer of content alone."""
    plain = try_apply(tokenizer, messages.with_messages([*messages[:turn], {"role": "assistant", "content": PROBE}]))
    if plain is None or plain.count(PROBE) != 1:
        return None
    before, after = plain.split(PROBE)
    return before, after


def _header(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int, prompt: str, until: str) -> str:
    """What the template puts before any answer here (an empty reasoning block, say), where this one begins with it too; and, where there is
    no generation prompt, all that they begin with alike."""
    plain = _plain_answer(tokenizer, messages, turn)
    if plain is None or not plain[0].startswith(prompt):
        return ""
    header = plain[0][len(prompt) :]
    if prompt == try_apply(tokenizer, messages.with_messages(messages[:turn])):
        header = shared_start(header, until[len(prompt) :])
    elif not until.startswith(prompt + header):
        return ""
    return header if header.strip() else ""


def _turn_end(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int, prompt: str, until: str) -> int:
    """Where in `until` what the assistant said ends, before the end-of-turn token."""
    bare = try_apply(tokenizer, messages.with_messages(messages[:turn]))
    generation = prompt[len(bare) :] if bare is not None and prompt.startswith(bare) else ""
    until = until.removesuffix(generation)  # some templates ask for the next answer unasked
    marks = special_tokens(tokenizer).values()
    plain = _plain_answer(tokenizer, messages, turn)
    if plain is not None and plain[1].strip() and until.endswith(plain[1]) and not any(mark in plain[1] for mark in marks):
        return len(until) - len(plain[1])
    while True:  # a second mark behind blanks ends the conversation, as the template closes it; one that follows at once is the turn's too
        until = until.rstrip()
        mark = max((mark for mark in marks if until.endswith(mark)), key=len, default="")
        until = until.removesuffix(mark)
        if not mark or not until.endswith((" ", "\n")) or not until.rstrip().endswith(tuple(marks)):
            return len(until)


def shared_start(one: str, other: str) -> str:
    """The characters that both begin with."""
    different = (place for place, (here, there) in enumerate(zip(one, other, strict=False)) if here != there)
    return one[: next(different, min(len(one), len(other)))]


def unopened(text: str) -> str:
    """A prompt, or what stands before an answer, without the mark that opens thoughts and without blanks."""
    return text.rstrip().removesuffix(THOUGHT_BEGINS).rstrip()


def served(tokenizer: PreTrainedTokenizerFast, messages: Conversation, turn: int) -> tuple[str, Span] | None:
    """The prompt before message `turn` with the answer as the target wrote it, for a template that shows them together in no rendering; and
    the answer's span. None where the template does not say how thoughts are written, or how an answer begins and ends."""
    message = messages[turn]
    content, thought = message["content"] or "", message.get("reasoning_content")
    if message.get("tool_calls") or (thought and THOUGHT_ENDS not in template_text(tokenizer, messages)):
        return None
    if thought:
        content = f"{THOUGHT_BEGINS}\n{thought}\n{THOUGHT_ENDS}\n\n{content}"
    prompt, plain = _prompt(tokenizer, messages, turn), _plain_answer(tokenizer, messages, turn)
    if prompt is None or plain is None:
        return None
    before, after = plain
    asked = (messages[turn - 1]["content"] or "").strip() if turn else ""
    opening, header = prompt.rpartition(asked)[2] if asked else prompt, before.rpartition(asked)[2] if asked else before
    if unopened(opening) != unopened(header):
        return None  # a header that no generation prompt writes
    if opening.rstrip().endswith(THOUGHT_BEGINS):
        content = content.lstrip().removeprefix(THOUGHT_BEGINS).lstrip("\n")
    elif header.startswith(opening):
        content = header[len(opening) :] + content  # blanks that the model writes
    return prompt + content + after, (len(prompt), len(prompt) + len(content))
