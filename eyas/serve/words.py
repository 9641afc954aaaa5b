"""What a token is as text and as bytes, for log probabilities. Half a character has bytes and no text of its own.

Knows a tokenizer; knows nothing of answers.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Words:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self.letters = {letter: byte for byte, letter in bytes_to_unicode().items()} if has_byte_level(tokenizer) else {}
        self.text_and_bytes = cache(self._text_and_bytes)

    def _text_and_bytes(self, token: int) -> tuple[str, list[int]]:
        """A token's text, with U+FFFD where it is no whole character, and its bytes in UTF-8."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return "", []
        if token in self.special:
            return piece, list(piece.encode())
        if self.letters and all(letter in self.letters for letter in piece):
            found = bytes(self.letters[letter] for letter in piece)
        elif told := BYTE.fullmatch(piece):
            found = bytes([int(told[1], 16)])
        else:
            found = (piece.replace("\u2581", " ") if not self.letters else self.tokenizer.decode([token])).encode()
        return found.decode(errors="replace"), list(found)


def has_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer writes bytes as letters."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core is not None and "ByteLevel" in f"{core.pre_tokenizer!r} {core.decoder!r}"
