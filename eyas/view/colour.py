"""An answer as it is written, drafted tokens in colour.

Knows which committed tokens were guessed and which the target drew itself; knows nothing of how.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text as Styled

from eyas.config import Request
from eyas.decode.prompt import Prompt
from eyas.decode.sequence import Result, RoundRecord, Sequence, result_of
from eyas.decode.text import TextStream
from eyas.engine import Engine

DRAFTED, DRAWN = "bold green", ""


class Colouring:
    """Prints committed tokens as they come: guesses that were right in green, the target's own draws plain."""

    def __init__(self, console: Console, tokenizer: Any) -> None:
        self.console, self.stream = console, TextStream(tokenizer)
        self.written = Styled()

    def token(self, token: int, drafted: bool) -> None:
        self.stream.push(token)
        self.show(drafted)

    def show(self, drafted: bool) -> None:
        """Print what is certain by now."""
        if piece := self.stream.certain():
            styled = Styled(piece, DRAFTED if drafted else DRAWN)
            self.console.print(styled, end="", soft_wrap=True)
            self.written.append_text(styled)

    def round(self, record: RoundRecord) -> None:
        guessed = len(record.accepted.path) - 1
        for place, token in enumerate(record.committed):
            self.token(token, place < guessed)


def write_coloured(engine: Engine, prompt: Prompt, request: Request, console: Console) -> tuple[Result, Styled, list[int]]:
    """Stream one answer to the console; returns it as a result and as it was shown, and how many nodes each round's tree had, roots
    included."""
    colouring, nodes = Colouring(console, engine.tokenizer), list[int]()
    sequence: Sequence | None = None

    def watch(record: RoundRecord) -> None:
        nodes.append(len(record.tree))
        colouring.round(record)

    for (sequence,) in engine.rounds(prompt, request, watch):
        if sequence.rounds == 0:
            colouring.token(sequence.tokens[-1], False)
    assert sequence is not None, "a prompt is one sequence"
    colouring.stream.finish()
    colouring.show(False)
    console.print()
    return result_of(sequence), colouring.written, nodes
