"""Turns tokens into text while they arrive, without half characters, and finds stop strings.

Knows the tokenizer; knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a decoder shows for the beginning of a character


class TextStream:
    """Decodes tokens one by one. `text` has all whole characters so far; it is cut where a stop string begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text = ""
        self.stopped = False
        self._window: list[int] = []  # tokens decoded together: those of `_shown`, then new ones
        self._shown = ""  # text of the window that `text` already has
        self._given = 0  # characters that `certain` has returned
        self._ended = False

    def push(self, token: int) -> bool:
        """Add a token; True if it completes a stop string."""
        if self.tokenizer is None:
            return False
        self._window.append(token)
        decoded = self._decode(self._window)
        if not decoded.endswith(UNFINISHED):
            self._append(decoded[len(self._shown) :])
            self._window, self._shown = self._window[-1:], self._decode(self._window[-1:])
        return self.stopped

    def finish(self) -> str:
        """End the stream and return all its text, an unfinished last character included."""
        if self.tokenizer is not None and not self.stopped:
            self._append(self._decode(self._window)[len(self._shown) :])
            self._shown = self._decode(self._window)
        self._ended = True
        return self.text

    def certain(self) -> str:
        """The new text since the last call that no stop string can still cut off; once the stream is finished, all the rest."""
        held = 0
        if not (self.stopped or self._ended):
            held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        ready = self.text[self._given : len(self.text) - held]
        self._given += len(ready)
        return ready

    def _decode(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None  # without a tokenizer `push` keeps nothing
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)  # of one list of tokens, not of several
        return text

    def _append(self, piece: str) -> None:
        reach = max((len(stop) for stop in self.stops), default=1) - 1
        start = max(0, len(self.text) - reach)
        self.text += piece
        found = [place for stop in self.stops if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
