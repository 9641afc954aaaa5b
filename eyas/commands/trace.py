"""`eyas trace`: the rounds told step by step, in the order of the paper's inference figure; or as a page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from eyas.commands.common import engine_from, settings_from, settled
from eyas.commands.output import checked, terminal
from eyas.config import EyasError, Request, TreeShape
from eyas.engine import Engine
from eyas.files.disk import replace_text
from eyas.methods import COPY
from eyas.serve.recording import page_with, recording
from eyas.view.rounds import rounds_of
from eyas.view.trace import Story

SMALL = TreeShape(8, 3, 2)  # a tree that fits on a page
ROUNDS = 4  # that are told where nothing is said


def run(options: argparse.Namespace) -> int:
    if options.rounds is not None and options.rounds < 1:
        raise EyasError(f"rounds must be at least 1, not {options.rounds}")
    settings_from(options, "eagle3")
    if not options.prompt.strip():
        raise EyasError("the prompt is empty; give some text")
    page = checked("--html", options.html) if options.html is not None else None
    engine = engine_from(options)
    engine.drafter("eagle3")
    request = settled(engine, options, "eagle3")
    request = replace(request, copy=bool(request.copy), tree=SMALL if request.tree == "auto" else request.tree)
    if page:
        write_page(page, engine, options.prompt, request, options.rounds)
    else:
        Story(engine, terminal()).tell(options.prompt, request, options.rounds or ROUNDS)
    return 0


def write_page(page: Path, engine: Engine, prompt: str, request: Request, rounds: int | None) -> None:
    """Decode, and write the page with a recording of it inside. `rounds`: at most so many; None: all."""
    text, told = rounds_of(engine, prompt, request, rounds)
    method = engine.method_of(request) + COPY * engine.copies(request)
    drafted = engine.draft.name if engine.draft else None
    about = {"model": engine.directory.name, "draft": drafted, "method": method, "precision": engine.precision}
    answer = engine.tokenizer.decode(text.tokens[text.prompt_length :], skip_special_tokens=True)
    try:
        replace_text(page, page_with(recording(about, prompt, answer, told)))
    except OSError as error:
        raise EyasError(f"--html {page} could not be written ({error.strerror})") from None
    print(f"{page}: {len(told)} rounds, seed {text.seed}; open it in a browser", file=sys.stderr)
