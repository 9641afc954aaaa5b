"""What `torchrun` tells the processes that it starts, and what they tell it; and what Ctrl-C does until they have met. Knows variables of
the environment, signals and one folder."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from eyas.checks import EyasError

SHARED = ("generate", "chat", "bench", "trace", "serve")  # commands that share keys out under --context-parallel
ended_by_torchrun = False  # whether it asked this process to end, because of another or of a signal of its own
follows = False  # whether this process ends with the first one, and not before it has met it
met = False  # whether this process has met the others
patience = 0.0  # seconds that the first process takes to end once torchrun asks it to: so long the others stay
INTERRUPTED = 130  # the status of a process that Ctrl-C ended


def count() -> int:
    """How many processes were started together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def end_at_once() -> None:
    """Until they have met, Ctrl-C ends each of several processes where it stands, and none misses another: nothing is written by then. The
    first thing that a process does. An exception could be swallowed where modules are imported, or wait for a call that waits itself."""
    in_main = threading.current_thread() is threading.main_thread()
    if count() > 1 and in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def interrupted(number: int, frame: object) -> None:
    if met:
        raise KeyboardInterrupt
    os._exit(say_interrupted())


def say_interrupted() -> int:
    """The status of a process that was interrupted. The first one says so; the others end with it."""
    if rank() == 0:
        say("\neyas: ended by torchrun, whose report says why" if ended_by_torchrun else "\neyas: interrupted")
    return INTERRUPTED


def check(command: str, context_parallel: bool) -> None:
    """Raise `EyasError` for a command that makes nothing of several processes."""
    global follows
    follows = context_parallel and rank() > 0
    if not context_parallel and signal.getsignal(signal.SIGINT) is interrupted:  # they meet in another way, as `train` does, or not at all
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if count() == 1 or context_parallel or command == "train" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if command in SHARED:
        raise EyasError(f"torchrun started {count()} processes of `eyas {command}`, which would all do the same; add --context-parallel")
    why = ": what it writes and reads is short, so there are few keys to share out" if command == "new-draft" else ""
    raise EyasError(f"`eyas {command}` is one process{why}; start it without torchrun (train and {', '.join(SHARED)} can be several)")


def end_unasked() -> None:
    """This process of several ends now, whatever `torchrun` asks. It asks each as soon as one has ended, and would break in on what this
    one says."""
    if count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def agent_keeps_store() -> bool:
    """Whether the store at which processes meet is `torchrun`'s; else the first of them keeps it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def say(line: str) -> None:
    """Print on stderr why this process ends. Of several processes of one machine the first to end says why: the others end because of it.
    `torchrun`'s own report of what failed quotes each."""
    noted = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if count() > 1 and noted:
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(noted).write_text(json.dumps({"message": told}))
        try:
            (Path(noted).parent.parent / "eyas-said-why").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # no such folder: said once too often is better than not at all
            pass
    print(line, file=sys.stderr, flush=True)
