"""Turns tokens into text while they arrive, and finds stop strings.

Text is what decoding all tokens gives (detokenize.py), and stop strings are found in exactly that text. Knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eyas.decode.detokenize import detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Decodes tokens one by one. `text` has what no later token can change; it is cut where a stop string begins.

    A stop string that is a special token ends the text where that token comes: it has no text of its own. The first `unstopped` tokens
    and their text are not searched for stop strings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str] = (), unstopped: int = 0) -> None:
        self.stops = [stop for stop in stops if stop]
        self._unstopped = unstopped  # tokens to come that end nothing
        self._passed = 0  # characters of `text` that no stop string may reach back into
        self.text = ""
        self.stopped = False
        self._tokens = None if tokenizer is None else detokenizer(tokenizer)
        self._stop_ids = special_ids(tokenizer, self.stops) if tokenizer is not None and self.stops else frozenset[int]()
        self._given = 0  # characters that `certain` has returned
        self._ended = False

    def push(self, token: int) -> bool:
        """Add a token; True if it completes a stop string."""
        if self._tokens is None or self.stopped:
            return self.stopped
        start, self._unstopped = self._start(), self._unstopped - 1
        if self._unstopped >= 0:
            self.text += self._tokens.push(token)
            self._passed = len(self.text)
            return False
        if token in self._stop_ids:
            self._append(self._tokens.rest(), start)
            self.stopped = self._ended = True
            return True
        self.text += self._tokens.push(token)
        if self.stops:
            self._cut(self.text[start:] + self._tokens.ahead(), start)
        return self.stopped

    def finish(self) -> str:
        """End the stream and return all its text, an unfinished last character included."""
        if self._tokens is not None and not (self.stopped or self._ended):
            if self._unstopped < 0:
                self._append(self._tokens.rest(), self._start())
            else:
                self.text += self._tokens.rest()
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

    def _start(self) -> int:
        """Where in the text a stop string may begin that ends in what comes."""
        return max(self._passed, len(self.text) - max((len(stop) for stop in self.stops), default=1) + 1)

    def _append(self, piece: str, start: int) -> None:
        self.text += piece
        self._cut(self.text[start:], start)

    def _cut(self, end: str, start: int) -> None:
        """Cut the text where the first stop string begins in `end`, what the text would be from `start` on."""
        found = [place for stop in self.stops if (place := end.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[:start] + end[: min(found)], True


def special_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> frozenset[int]:
    """Ids of the special tokens that are stop strings."""
    special = {*tokenizer.all_special_ids, *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return frozenset(index for index in special if tokenizer.convert_ids_to_tokens(index) in stops)
