"""Text that is in the target's own form already: its answers, found by what the target's chat template writes around answers.

Knows a tokenizer with its template, or one without: then all of a text is learned. Knows nothing of files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eyas.config import EyasError
from eyas.files.chat_template import try_apply
from eyas.train.answers import Span, shared_start, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION, ANSWER = "\ue001question\ue001", "\ue002answer\ue002"  # private-use characters: stand in for turns


class Surroundings(NamedTuple):
    """What a template writes around an answer."""

    before: str  # the header that opens it
    after: str  # what ends it
    bos: str  # what the whole text begins with, where that is the beginning-of-text token; else ""


def preformatted(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[str, list[Span]]:
    """The text, with the beginning-of-text token that the template writes where it lacks it, and the spans of its answers.

    Raises EyasError where there is no answer in the target's own form.
    """
    if not getattr(tokenizer, "chat_template", None):
        bos = str(tokenizer.bos_token or "")
        text = text if text.startswith(bos) else bos + text
        return text, [(len(bos), len(text))]
    around = surroundings(tokenizer)
    if not text.startswith(around.bos):
        text = around.bos + text
    spans: list[Span] = []
    found = text.find(around.before)
    while found >= 0:
        begin = found + len(around.before)
        end = text.find(around.after, begin)
        spans.append((begin, end if end >= 0 else len(text)))
        found = text.find(around.before, spans[-1][1])
    if not spans:
        raise EyasError(f"its text is not in this target's own form: no {around.before!r} in it; give messages, which any template writes")
    return text, spans


def surroundings(tokenizer: PreTrainedTokenizerFast) -> Surroundings:
    """What this template writes around an answer, seen in a conversation of two questions."""
    asked = [{"role": "user", "content": QUESTION}]
    replied = [*asked, {"role": "assistant", "content": ANSWER}]
    whole = try_apply(tokenizer, [*replied, *asked])
    prompt, bare = try_apply(tokenizer, asked, prompt=True), try_apply(tokenizer, asked)
    if whole is None or prompt is None or bare is None or (whole.count(QUESTION), whole.count(ANSWER)) != (2, 1) or QUESTION not in prompt:
        raise EyasError("the chat template does not show where answers begin, so text in its form cannot be read; give messages")
    opening, answered = whole.split(QUESTION)[1].split(ANSWER)
    # A prompt may go on with what answers of the past lack (<think>); what both have is the header.
    both = shared_start(opening, prompt.split(QUESTION)[1]) if prompt != bare else opening
    closed = shared_start(both, bare.split(QUESTION)[1])  # the end of the question's own turn
    before = both[len(closed) :] if both[len(closed) :].strip() else both
    ends = [mark for mark in special_tokens(tokenizer).values() if answered.lstrip().startswith(mark)]
    bos = str(tokenizer.bos_token or "")
    return Surroundings(before.strip(" "), max(ends, key=len, default=answered.strip() or answered), bos if whole.startswith(bos) else "")
