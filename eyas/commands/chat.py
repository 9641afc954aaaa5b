"""`eyas chat`: a conversation in the terminal; after each answer its acceptance length."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from eyas.commands.common import engine_from, request_from
from eyas.commands.generate import summary
from eyas.config import EyasError


def run(options: argparse.Namespace) -> int:
    request = request_from(options)
    engine = engine_from(options)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    print("Type a message; an empty line or Ctrl-D ends.", file=sys.stderr)
    turn = 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages.append({"role": "user", "content": text})
        seeded = request if request.seed is None else replace(request, seed=request.seed + turn)
        answer = ""
        try:
            for piece in engine.stream(messages, seeded):
                if isinstance(piece, str):
                    answer += piece
                    print(piece, end="", flush=True)
                else:
                    print(f"\n[{summary(piece)}]", file=sys.stderr)
        except EyasError as error:  # say, the context is full: the conversation before this turn is still there
            messages.pop()
            print(f"eyas: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n[stopped]", file=sys.stderr)
        messages.append({"role": "assistant", "content": answer})
        turn += 1
