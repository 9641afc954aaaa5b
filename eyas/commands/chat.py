"""`eyas chat`: a conversation in the terminal; after each answer its acceptance length."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

from eyas import launched
from eyas.commands.common import conversation_from, engine_from, settings_from, settled, without_a_draft
from eyas.commands.generate import tell
from eyas.config import EyasError
from eyas.decode.kept import Kept
from eyas.decode.sequence import Result
from eyas.files.chat_data import Conversation


def run(options: argparse.Namespace) -> int:
    settings_from(options)
    messages = begun(options)
    engine = engine_from(options)
    request = settled(engine, options)
    print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
    turn, kept = 0, Kept()
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        seeded = request if request.seed is None else replace(request, seed=request.seed + turn)
        said: list[str] = []
        try:
            tell(noted(engine.stream(messages, seeded, kept=kept), said), None if turn else without_a_draft(engine, options))
        except EyasError as error:  # say, the context is full: the conversation before this turn is still there
            messages.pop()
            print(f"eyas: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if launched.count() > 1:  # torchrun ends all processes
                raise
            print("\n[stopped]", file=sys.stderr)
        messages.append({"role": "assistant", "content": "".join(said)})
        turn += 1


def begun(options: argparse.Namespace) -> Conversation:
    """The conversation to go on with; its own tools and variables stay with it."""
    if options.messages:
        return conversation_from(options)
    return Conversation([{"role": "system", "content": options.system}] if options.system else [])


def noted(pieces: Iterable[str | Result], said: list[str]) -> Iterator[str | Result]:
    """The same pieces; the text among them is put into `said` as it comes, so that it is there after Ctrl-C too."""
    for piece in pieces:
        if isinstance(piece, str):
            said.append(piece)
        yield piece
