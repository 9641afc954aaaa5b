"""`--writer`: an engine that runs already writes what `train` and `new-draft` train on, and the target reads it here.

Knows options and what is said meanwhile; train/remote.py asks the engine, train/remote_writer.py keeps what it writes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from eyas.checks import check_number
from eyas.commands.data import OwnWords, from_text, place_of, saying
from eyas.commands.next_steps import again
from eyas.commands.output import progress
from eyas.config import EyasError, TrainSettings, cache_dir
from eyas.files.target import target_config
from eyas.http_json import Api, checked_url
from eyas.model.protocols import TargetModel
from eyas.train.device_writer import DevicePlay, write_here
from eyas.train.features import Example, StateSource
from eyas.train.remote import KEY, Server
from eyas.train.remote_check import check_server, own_share
from eyas.train.remote_writer import RemotePlay, write_remotely
from eyas.train.texts import read_facts
from eyas.train.writers import Limit

MOST_REQUESTS = 4096
PATIENCE = 900.0  # seconds for an answer, which comes in one piece


def check_writer(options: argparse.Namespace) -> None:
    """Raise `EyasError` for options about a writer that say nothing usable."""
    if options.writer is None:
        if options.writer_model is not None or options.writer_requests is not None:
            raise EyasError("--writer-model and --writer-requests are about an engine that writes; name it with --writer URL")
        return
    checked_url("--writer", options.writer)
    if options.writer_requests is not None:
        check_number("--writer-requests", options.writer_requests, 1, MOST_REQUESTS, whole=True)


def from_writer(
    options: argparse.Namespace, words: OwnWords, settings: TrainSettings, wanted: int, before: dict[str, Any] | None, console: Console
) -> tuple[list[Example], dict[str, Any]]:
    """Let an engine write `wanted` answer tokens (all that a file asks for under --regenerate); the examples, and what they are."""
    if before is not None:
        return written_text(options, words, settings, before, earlier_text(before))
    endless = words.play.regenerate and options.self_play is None
    with progress() as bar:
        task = bar.add_task("the engine writes", total=None if endless else wanted, unit="answer tokens")
        limit = Limit(tokens=math.inf if endless else wanted)
        try:
            path = let_write(options, words, limit, lambda count: bar.update(task, completed=count), console)
        except KeyboardInterrupt:
            print(f"\nstopped; what the engine wrote is kept. Go on with: {again(options)}", file=sys.stderr)
            raise
    return written_text(options, words, settings, before, path)


def from_device(
    options: argparse.Namespace,
    words: OwnWords,
    settings: TrainSettings,
    wanted: int,
    before: dict[str, Any] | None,
    load: Callable[[], TargetModel],
) -> tuple[list[Example], dict[str, Any]]:
    """Let the target write `wanted` answer tokens on its device (all that a file asks for under --regenerate); the examples, and what they
    are. `load` makes the target, prepared."""
    if before is not None:
        return written_text(options, words, settings, before, earlier_text(before))
    endless = words.play.regenerate and options.self_play is None
    target = load()
    with progress() as bar:
        task = bar.add_task("the target writes", total=None if endless else wanted, unit="answer tokens")
        limit = Limit(tokens=math.inf if endless else wanted)
        play = DevicePlay.of(words.play, target.device)
        path = write_here(target, words.template, play, words.questions, limit, lambda count: bar.update(task, completed=count))
    return written_text(options, words, settings, before, path)


def written_text(
    options: argparse.Namespace, words: OwnWords, settings: TrainSettings, before: dict[str, Any] | None, path: Path
) -> tuple[list[Example], dict[str, Any]]:
    return from_text([path], words, settings, before, options.apart, place_of)


def earlier_text(before: dict[str, Any]) -> Path:
    """The text that a run to resume began with; nobody is asked again."""
    texts = before["facts"]["data"].get("texts") or [{"file": ""}]
    path = cache_dir() / "selfplay" / texts[0]["file"]
    if not path.is_file():
        raise EyasError("the text that was written for the run to resume is not there; train anew into another --out")
    return path


def let_write(options: argparse.Namespace, words: OwnWords, limit: Limit, report: Callable[[int], None], console: Console) -> Path:
    """Let the engine write, and say what came of it; the file of its text."""
    say, counts = saying(console), list[int]()
    api = Api(checked_url("--writer", options.writer), os.environ.get(KEY, ""), PATIENCE)
    server = Server(api, words.template, options.writer_model)
    check_server(server)
    play = RemotePlay.of(words.play, server)
    if not server.tells_ids:
        say(f"{server.api.url} tells no token ids: its text is tokenized here, and may fall into other tokens than it wrote")

    def note(count: int) -> None:
        counts[1:] = [count]  # the first and the last
        report(count)

    begun, longest = time.monotonic(), target_config(words.directory).max_position_embeddings
    path = write_remotely(server, play, words.questions, longest, limit, options.writer_requests or server.at_once(), note)
    seconds, told = time.monotonic() - begun, read_facts(path).counts
    say(
        f"{server.model} at {server.api.url} has written {told.answer_tokens} answer tokens ({(counts[-1] - counts[0]) / seconds:.0f} a "
        f"second just now) into {path}; {told.looped} answers were cut where they looped, {told.dropped} conversations were dropped"
    )
    return path


def say_own_share(source: StateSource, examples: list[Example], facts: dict[str, Any], console: Console) -> None:
    """Say how much of the engine's text is the target's own, and note it. Raises `EyasError` where that is not so."""
    share = own_share(source, examples)
    if share is None:
        return
    facts["data"]["own_share"] = round(share, 4)
    saying(console)(f"of what the engine wrote at temperature 0, the target finds {share:.1%} likeliest itself")
