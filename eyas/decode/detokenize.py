"""Text out of tokens while they arrive: what is settled, since no later token changes it, and what would follow if the text ended here.

Settled text and the rest together are `tokenizer.decode(all tokens, skip_special_tokens=True)`. Decoding a few tokens at a time gives that
only where the decoder splits, so the places are taken from the tokenizer's own description of its decoder. Knows tokenizers; knows nothing
of stop strings or of rounds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
LONGEST = 8  # tokens of a window that ends within a character, and never with one: behind them it is cut to its last CHARACTER
CHARACTER = 4  # bytes of a character at most: where one begins among the last 3 bytes is seen in these alone
BYTE = re.compile(r"<0x(?:\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")  # a sentencepiece tokenizer's token for one byte
# What transformers takes out where a tokenizer has clean_up_tokenization_spaces, in its order.
CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}


def detokenizer(tokenizer: PreTrainedTokenizerBase) -> Windows | Whole:
    """A new detokenizer for one text."""
    kind = kind_of(tokenizer, len(tokenizer))
    return Windows(kind) if kind else Whole(tokenizer)


class Whole:
    """For decoders that nothing is known about: nothing is settled before the end, and everything is decoded together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return ""

    def rest(self) -> str:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        assert isinstance(text, str)  # of one list of tokens, not of several
        return text

    def ahead(self) -> str:
        return self.rest().rstrip(UNFINISHED)


class Windows:
    """Decodes each token with the few before it that it may depend on."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.window: list[int] = []  # the last tokens, whose text is not all settled or tells where a character begins
        self.shown = 0  # characters of the window's text that are settled
        self.under_way = ""  # the others, but for those of `run`
        self.begun = False  # whether the window has text before it
        self.run: Run | None = None  # the byte tokens that the window ends with
        self.removals = [Replacement(old, new) for old, new in CLEAN_UP.items()] if kind.clean_up else []

    def push(self, token: int) -> str:
        """Add a token, and return the text that is settled by it."""
        text = None if token in self.kind.special else self.kind.name(token)
        if text is None:  # decoders leave it out before they do anything else
            return ""
        settled = self.push_byte(token, text) if self.kind.joins_bytes and BYTE.fullmatch(text) else self.push_token(token)
        for removal in self.removals:
            settled = removal.feed(settled)
        return settled

    def rest(self) -> str:
        """What follows the settled text if no more tokens come."""
        return self.cleaned(self.text(self.window)[self.shown :] if self.run else self.under_way)

    def ahead(self) -> str:
        """`rest` without a character that is under way."""
        return self.cleaned(self.run.text if self.run else self.under_way.removesuffix(UNFINISHED))

    # ---- the window ----

    def push_token(self, token: int) -> str:
        self.run = None
        self.window.append(token)
        text = self.text(self.window)
        whole = text.removesuffix(UNFINISHED)  # bytes under way are one such sign, and may become a character
        settled, self.under_way = whole[self.shown :], text[max(self.shown, len(whole)) :]
        if whole == text and (text or self.begun):
            self.cut([])
        elif len(self.window) > LONGEST and whole:
            self.cut(self.window[-CHARACTER:])
        else:
            self.shown = max(self.shown, len(whole))
        return settled

    def push_byte(self, token: int, text: str) -> str:
        """Byte tokens in a row are characters if all of them together are: then what they say is settled when the row ends. If not, each
        is shown as one sign, and it is settled at once."""
        if self.run is None:
            self.run = Run()
        self.window.append(token)
        if self.run.broken:
            settled = self.text(self.window)[self.shown :]
            self.window.pop()  # what is left is broken by itself, and shows that the row is
            return settled
        finished = self.run.push(token, text)
        if self.run.broken:
            settled = self.text(self.window)[self.shown :]
            self.cut(self.run.character)
            return settled
        if finished:
            self.run.text += self.text(self.run.character, True) if self.run.text else self.text(self.window)[self.shown :]
            self.run.character = []
        return ""

    def cut(self, window: list[int]) -> None:
        """Go on with these tokens, whose text is settled up to a character under way."""
        self.window, self.begun = window, True
        self.shown = len(self.text(window).removesuffix(UNFINISHED)) if self.run is None else len(self.text(window))

    def text(self, tokens: list[int], begun: bool = False) -> str:
        """The text of these tokens: behind other text, where there is some, since a decoder may treat the first token as no other."""
        kind = self.kind
        if not (begun or self.begun):
            return decoded(kind.tokenizer, tokens)
        return decoded(kind.tokenizer, [kind.anchor, *tokens])[kind.anchor_length :]

    def cleaned(self, text: str) -> str:
        for removal in self.removals:
            text = (removal.held + text).replace(removal.old, removal.new)
        return text


class Run:
    """Byte tokens in a row, as far as they are characters."""

    def __init__(self) -> None:
        self.text = ""  # of its whole characters
        self.character: list[int] = []  # the tokens after them
        self.broken = False  # whether its bytes are no characters, whatever follows
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def push(self, token: int, text: str) -> bool:
        """Add a byte; True if it ends a character."""
        self.character.append(token)
        try:
            return self.decoder.decode(bytes([int(text[3:5], 16)])) != ""
        except UnicodeDecodeError:
            self.broken = True
            return False


class Replacement:
    """`str.replace` on text that comes in pieces."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self.held = ""  # the end of the text so far, which may be the beginning of `old`

    def feed(self, piece: str) -> str:
        *parts, last = (self.held + piece).split(self.old)
        held = next((n for n in range(len(self.old) - 1, 0, -1) if last.endswith(self.old[:n])), 0)
        self.held = last[len(last) - held :]
        return self.new.join([*parts, last[: len(last) - held]])


# ---- tokenizers ----


@dataclass(frozen=True)
class Kind:
    """What is to be known of a tokenizer to decode a few tokens as all of them together would be."""

    tokenizer: Any
    name: Callable[[int], str | None]  # a token as the vocabulary spells it; None for an id that the tokenizer does not know
    special: frozenset[int]  # ids that are left out of the text
    anchor: int  # a token with text, which stands for the text before a window
    anchor_length: int
    joins_bytes: bool  # whether byte tokens in a row are decoded together
    clean_up: bool  # whether blanks before punctuation are taken out


@lru_cache(maxsize=8)
def kind_of(tokenizer: Any, size: int) -> Kind | None:
    """The kind of a tokenizer of `size` tokens (asked for again when tokens were added); None where its decoder may do anything."""
    stages = stages_of(tokenizer)
    if stages is None:
        return None
    special = frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    name = tokenizer.backend_tokenizer.id_to_token
    for anchor in range(size):
        text = "" if anchor in special or name(anchor) is None or BYTE.fullmatch(name(anchor)) else decoded(tokenizer, [anchor])
        if text and UNFINISHED not in text:
            return Kind(tokenizer, name, special, anchor, len(text), "ByteFallback" in stages, cleans_up(tokenizer))
    return None


def stages_of(tokenizer: Any) -> list[str] | None:
    """The names of a decoder's stages; None if what one of them does to a token may depend on more than its neighbours."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or own._decode is not PreTrainedTokenizerFast._decode:
        return None
    if own.clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization:
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    try:
        described = json.loads(decoder.__getstate__()) if decoder else {"decoders": []}
    except Exception:  # one that is written in Python describes nothing
        return None
    stages = described.get("decoders", [described])
    names = [stage["type"] for stage in stages]
    return names if all(splits(stage, names[:place]) for place, stage in enumerate(stages)) else None


def splits(stage: dict[str, Any], before: list[str]) -> bool:
    """Whether a stage, after the stages `before`, does to a token what it would do with other tokens far from it."""
    name = stage["type"]
    joined = bool({"ByteLevel", "ByteFallback", "Fuse"} & {*before})  # it gets tokens that are put together
    if name == "Replace":
        return not joined or len(stage["pattern"].get("String", "..")) == 1
    if name == "Strip":
        return not joined or (("ByteFallback" not in before or "Fuse" in before) and stage["stop"] == 0)
    return name == "Fuse" or (not joined and name in ("ByteLevel", "ByteFallback", "Metaspace", "WordPiece"))


def cleans_up(tokenizer: Any) -> bool:
    """Whether transformers takes blanks out of what this tokenizer decodes: it does not do so to BPE, where they belong to the text."""
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return tokenizer.clean_up_tokenization_spaces and (forced or type(tokenizer.backend_tokenizer.model).__name__ != "BPE")


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    """The text of these tokens, blanks before punctuation included."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # of one list of tokens, not of several
    return text
