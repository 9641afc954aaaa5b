"""What a token is as text and as bytes, for log probabilities. Half a character has bytes and no text of its own.

Knows a tokenizer; knows nothing of answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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

    def name(self, token: int) -> str:
        """A token's text, or where it is no whole character its bytes, as OpenAI's completions write them."""
        word, found = self.text_and_bytes(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found) if "\ufffd" in word else word

    def piece(self, token: int) -> str | list[int]:
        """A token's text, or its bytes where it is no whole character."""
        word, found = self.text_and_bytes(token)
        return found if "\ufffd" in word else word

    def places(self, tokens: Sequence[int], text: str) -> list[int]:
        """Where each token of a text begins in it, in characters. One that does not stand there, as a token that begins every prompt,
        takes no room."""
        whole, found, at = text.encode(), list[int](), 0
        for token in tokens:
            found.append(len(whole[:at].decode(errors="ignore")))
            written = bytes(self.text_and_bytes(token)[1])
            for each in (written, written.removeprefix(b" ")):  # some tokenizers write a blank before a text's first word
                if whole.startswith(each, at):
                    at += len(each)
                    break
        return found


def has_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer writes bytes as letters."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core is not None and "ByteLevel" in f"{core.pre_tokenizer!r} {core.decoder!r}"
