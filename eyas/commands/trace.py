"""`eyas trace`: the rounds told step by step, in the order of the paper's inference figure; or as a page. Of two drafts side by side."""

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
from eyas.serve.recording import page_with, recording, turn
from eyas.view.rounds import Run, rounds_of
from eyas.view.side_by_side import tell_both
from eyas.view.trace import Story

SMALL = TreeShape(8, 3, 2)  # a tree that fits on a page
ROUNDS = 4  # that are told where nothing is said


def run(options: argparse.Namespace) -> int:
    drafts = options.draft or [None]
    if options.rounds is not None and options.rounds < 1:
        raise EyasError(f"rounds must be at least 1, not {options.rounds}")
    if len(drafts) > 2 or (len(drafts) == 2 and options.context_parallel):
        raise EyasError("two drafts are compared at a time, in one process; give --draft at most twice, and no --context-parallel")
    if len(set(drafts)) < len(drafts):
        raise EyasError(f"both drafts are {drafts[0]}; name two different ones")
    settings_from(options, "eagle3")
    if not options.prompt.strip():
        raise EyasError("the prompt is empty; give some text")
    page = checked("--html", options.html) if options.html is not None else None
    if len(drafts) == 1 and not page:
        engine, request = asked(options, drafts[0])
        Story(engine, terminal()).tell(options.prompt, request, options.rounds or ROUNDS)
        return 0
    runs, seed = list[Run](), None
    for draft in drafts:
        engine, request = asked(options, draft)
        runs.append(rounds_of(engine, options.prompt, replace(request, seed=seed) if seed is not None else request, most(options, page)))
        seed = runs[0].text.seed
    names = [run.draft for run in runs] if len({run.draft for run in runs}) == len(runs) else [str(draft) for draft in drafts]
    if page:
        write_page(page, engine, request, options.prompt, dict(zip(names, runs, strict=True)))
    else:
        tell_both(dict(zip(names, runs, strict=True)), engine.tokenizer, options.rounds or ROUNDS, terminal())
    return 0


def most(options: argparse.Namespace, page: Path | None) -> int | None:
    """How many rounds are run: of a text that is drawn as many as were asked for; of two that are compared all, for their tau."""
    return options.rounds if page else None


def asked(options: argparse.Namespace, draft: str | None) -> tuple[Engine, Request]:
    """An engine with this draft, and what it is asked for."""
    options = argparse.Namespace(**{**vars(options), "draft": draft})
    engine = engine_from(options)
    engine.drafter("eagle3")
    request = settled(engine, options, "eagle3")
    return engine, replace(request, copy=bool(request.copy), tree=SMALL if request.tree == "auto" else request.tree)


def write_page(page: Path, engine: Engine, request: Request, prompt: str, runs: dict[str, Run]) -> None:
    """Write the page with a recording of the runs inside, one for each draft."""
    method = engine.method_of(request) + COPY * engine.copies(request)
    about = {"model": engine.directory.name, "draft": " beside ".join(runs), "method": method, "precision": engine.precision}
    turns = [turn(prompt, run.answer, run.rounds, name if len(runs) > 1 else "") for name, run in runs.items()]
    try:
        replace_text(page, page_with(recording(about, *turns)))
    except OSError as error:
        raise EyasError(f"--html {page} could not be written ({error.strerror})") from None
    rounds = " and ".join(str(len(run.rounds)) for run in runs.values())
    seed = next(iter(runs.values())).text.seed
    print(f"{page}: {rounds} rounds, seed {seed}; open it in a browser", file=sys.stderr)
