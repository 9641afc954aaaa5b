"""What `torchrun` tells the processes that it starts, and what they tell it. Knows variables of the environment and one folder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from eyas.checks import EyasError

SHARED = ("generate", "chat", "bench", "trace")  # commands that share keys out under --context-parallel
ended_by_torchrun = False  # whether it asked this process to end, because of another or of a signal of its own
follows = False  # whether this process ends with the first one, and not before it has met it


def count() -> int:
    """How many processes were started together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def check(command: str, context_parallel: bool) -> None:
    """Raise `EyasError` for a command that makes nothing of several processes."""
    global follows
    follows = context_parallel and rank() > 0
    if count() == 1 or context_parallel or command == "train" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if command in SHARED:
        raise EyasError(f"torchrun started {count()} processes of `eyas {command}`, which would all do the same; add --context-parallel")
    why = ": what it writes and reads is short, so there are few keys to share out" if command == "new-draft" else ""
    raise EyasError(f"`eyas {command}` is one process{why}; start it without torchrun (train and {', '.join(SHARED)} can be several)")


def agent_keeps_store() -> bool:
    """Whether the store at which processes meet is `torchrun`'s; else the first of them keeps it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def say(line: str) -> None:
    """Print a line on stderr. Of several processes of one machine that have the same to say one says it, and `torchrun`'s own report of
    what failed quotes it."""
    noted = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if count() > 1 and noted:
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(noted).write_text(json.dumps({"message": told}))
        try:
            (Path(noted).parent.parent / hashlib.sha256(line.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # no such folder: said once too often is better than not at all
            pass
    print(line, file=sys.stderr, flush=True)
