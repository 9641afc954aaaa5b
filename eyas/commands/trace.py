"""`eyas trace`: the rounds told step by step, in the order of the paper's inference figure."""

from __future__ import annotations

import argparse
from dataclasses import replace

from eyas.commands.common import engine_from, settings_from, settled
from eyas.commands.output import terminal
from eyas.config import EyasError, TreeShape
from eyas.view.trace import Story

SMALL = TreeShape(8, 3, 2)  # a tree that fits on a page


def run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise EyasError(f"rounds must be at least 1, not {options.rounds}")
    settings_from(options, "eagle3")
    if not options.prompt.strip():
        raise EyasError("the prompt is empty; give some text")
    engine = engine_from(options)
    engine.drafter("eagle3")
    request = settled(engine, options, "eagle3")
    request = replace(request, copy=bool(request.copy), tree=SMALL if request.tree == "auto" else request.tree)
    Story(engine, terminal()).tell(options.prompt, request, options.rounds)
    return 0
