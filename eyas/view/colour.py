"""An answer as it is written, drafted tokens in colour.

Knows which committed tokens were guessed and which the target drew itself; knows nothing of how.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text as Styled

from eyas.decode.generate import RoundRecord
from eyas.decode.text import TextStream
from eyas.load import Engine, Prompt, Request

DRAFTED, DRAWN = "bold green", ""


class Colouring:
    """Prints committed tokens as they come: guesses that were right in green, the target's own draws plain."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.console, self.stream = console, TextStream(tokenizer)

    def token(self, token: int, drafted: bool) -> None:
        self.stream.push(token)
        if piece := self.stream.certain():
            self.console.print(Styled(piece, DRAFTED if drafted else DRAWN), end="", soft_wrap=True)

    def round(self, record: RoundRecord) -> None:
        guessed = len(record.accepted.path) - 1
        for place, token in enumerate(record.committed):
            self.token(token, place < guessed)


def write_coloured(engine: Engine, prompt: Prompt, request: Request, console: Console) -> Iterator[Any]:
    """Stream one answer to the console; yields the `Result` at its end."""
    colouring = Colouring(console, engine.tokenizer)
    engine.watch = colouring.round
    try:
        first = True
        for texts in engine.rounds([prompt], request):
            if first:
                colouring.token(texts[0].tokens[-1], False)
            first = False
        yield texts[0]
    finally:
        engine.watch = None
    console.print()
