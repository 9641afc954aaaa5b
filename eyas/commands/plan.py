"""`eyas plan`: what a pass costs here, which trees pay for how many sequences at once, and how well a draft's scores are calibrated."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from eyas.bench.prompts import PRACTICE
from eyas.commands.common import engine_from
from eyas.commands.output import picture_file, progress, terminal
from eyas.config import EyasError, Sampling
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.shapes import Shapes
from eyas.decode.sequence import RoundRecord
from eyas.engine import Engine
from eyas.methods import COPY, METHODS, copies, parted
from eyas.view.plan import reliability, save_picture, typical_rounds

BATCHES = (1, 2, 4, 8, 16)
PRACTICE_TOKENS = 100


def run(options: argparse.Namespace) -> int:
    planned = [name for name, method in METHODS.items() if name != "plain" and not method.static]

    def checked(written: str) -> tuple[str, bool]:
        """The method's name, and whether copying joins it."""
        method = parted(written)[0]
        if method not in planned:
            raise EyasError(f"method {method!r} has no trees to plan; choose {', '.join(planned)}")
        return method, copies(written, options.copy)

    checked(options.method or planned[0])
    picture = picture_file("--picture", options.picture)
    sampling = Sampling(options.temperature)
    engine = engine_from(options)
    written = options.method or engine.default_method
    if written == "plain":
        engine.drafter("eagle3")  # says that there is no draft
    method, copy = checked(written)
    practise(engine, method, copy, sampling, options.chat_template_kwargs)
    planner = engine.planner("auto", method, sampling, copy)
    assert planner is not None  # `checked` has let through no method without one
    rounds = typical_rounds(planner, BATCHES)
    console = terminal()
    prices = Table("rows of a pass", "milliseconds", title="What a pass costs here")
    for rows, seconds in planner.passes.table().items():
        prices.add_row(str(rows), f"{1e3 * seconds:.1f}")
    console.print(prices)
    console.print(f"a step of the draft: {1e3 * planner.steps.of(1):.2f} ms for one row, {1e3 * planner.steps.of(8):.2f} for eight\n")
    title = f"Typical rounds, {method}{COPY * copy}"
    plans = Table("sequences", "levels", "nodes each", "tokens a round each", "round, ms", "times plain", title=title)
    for each in rounds:
        shape = (str(each.levels), str(each.nodes)) if each.levels else ("-", "no tree")
        plans.add_row(str(each.batch), *shape, f"{each.tokens:.2f}", f"{1e3 * each.seconds:.1f}", f"{each.gain:.2f}")
    console.print(plans)
    if planner.shapes.table():
        console.print(whole_rounds_table(planner.shapes))
    console.print(reliability_table(planner.calibration))
    if picture:
        save_picture(planner, rounds, picture)
    return 0


def practise(engine: Engine, method: str, copy: bool, sampling: Sampling, variables: Mapping[str, Any] | None) -> None:
    """Answer some prompts, so that prices and chances are of rounds that were served here. `variables`: of the chat template."""
    settings: Any = {"method": method, "sampling": sampling, "seed": 0, "max_new_tokens": PRACTICE_TOKENS, "generation_config": "none"}
    settings |= {"chat_template_kwargs": variables, "copy": copy}
    settings["raw"] = not getattr(engine.tokenizer, "chat_template", None)
    with progress() as bar:
        task, written = bar.add_task("practice", total=len(PRACTICE) * PRACTICE_TOKENS, unit="tokens at most"), 0

        def watch(record: RoundRecord) -> None:
            nonlocal written
            written += len(record.committed)
            bar.update(task, completed=written)

        for prompt in PRACTICE:
            engine.generate(prompt, watch=watch, **settings)


def whole_rounds_table(shapes: Shapes) -> Table:
    """What rounds that run as one graph cost and brought each sequence, where there are any."""
    table = Table("sequences", "nodes", "milliseconds", "tokens", title="Rounds that are one graph")
    for each in (shapes, *(shapes.others[size] for size in sorted(shapes.others))):
        for nodes, (seconds, tokens) in sorted(each.rows().items()):
            table.add_row(f"{each.sequences}", f"{nodes}", f"{1e3 * seconds:.1f}", f"{tokens:.2f}")
    return table


def reliability_table(calibration: Calibration) -> Table:
    """A table of what the draft said against what came true, all depths together."""
    table = Table("guessed", "came true", "guesses", title="How often guesses come true")
    for each in reliability(calibration):
        shares = (f"{each.guessed:.2f}", f"{each.right:.2f}") if each.tried else (f"from {each.least:.2f}", "-")
        table.add_row(*shares, str(each.tried))
    return table
