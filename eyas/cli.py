"""The command line: `eyas <command>`. Reads options, imports that command's module, turns errors into one line.

Imports nothing heavy before it knows the command, so `eyas --help` is quick.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Sequence

from eyas import launched, plugins
from eyas.checks import within_memory
from eyas.commands.parser import parser
from eyas.config import EyasError

MODULES = {"import": "import_draft"}  # commands whose name no module may have
SMALLER = "free some, or ask for less: a smaller model or --precision, shorter texts, smaller trees, fewer answers at a time"
SMALLER_TRAINING = "free some, or ask for less: fewer --workers, or with `eyas train` a smaller --draft-vocab or --set tokens_per_batch=320"
TRAINING = ("train", "new-draft", "ablate", "compare", "lesson")  # commands that train


def terminated(number: int, frame: object) -> None:
    """A polite end from outside (`timeout`, a service manager) is Ctrl-C's: what there is is saved."""
    if launched.count() > 1:
        launched.ended_by_torchrun = True
        if launched.follows:  # the first one is to find missing what is lost, and no other
            return
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def command_first(arguments: list[str]) -> list[str]:
    """Arguments that were understood, with what stands before the command's name behind it: options of one value each."""
    place = 0
    while arguments[place].startswith("-"):
        place += 1 if "=" in arguments[place] else 2
    return [arguments[place], *arguments[:place], *arguments[place + 1 :]]


def main(arguments: Sequence[str] | None = None) -> int:
    launched.end_at_once()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)
    try:
        plugins.load_inherited()
        options = parser().parse_args(arguments)
        options.arguments = command_first(arguments)
        launched.check(options.command, getattr(options, "context_parallel", False))
        plugins.load([*options.first, *options.plugins])
        module = MODULES.get(options.command, options.command.replace("-", "_"))
        with within_memory(SMALLER_TRAINING if options.command in TRAINING else SMALLER):
            return importlib.import_module(f"eyas.commands.{module}").run(options) or 0
    except EyasError as error:
        launched.say(f"eyas: {error}")
        return 2
    except KeyboardInterrupt:
        return launched.say_interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # no space, no permission: where no better words were found closer to it
        launched.say(f"eyas: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
