"""`eyas bench`: methods against each other on the same prompts, as a table and, under --out, as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eyas.bench.prompts import PromptItem, fitting, read_prompts
from eyas.bench.report import print_result
from eyas.bench.speed import Method, parse_methods, run_bench
from eyas.commands.common import check_request, engine_from, request_from, settled, sharing
from eyas.commands.output import progress, result_file, terminal, write_result
from eyas.config import GREEDY, EyasError, Request
from eyas.engine import Engine
from eyas.view.pictures import can_draw

SHOWN = 5  # complaints about a file before only their number is told


def run(options: argparse.Namespace) -> int:
    methods, request = parse_methods(options.methods), request_from(options)
    if options.peers:
        if options.context_parallel:
            raise EyasError("--peers measures other engines too, which share no keys out; drop --peers or --context-parallel")
        return peers(options, request)
    for method in methods:
        check_request(method.request(request))
    out = result_file(options.out)
    items, complaints = read_prompts(options.prompts, options.limit)
    engine = engine_from(options)
    for method in methods:
        engine.drafter(method.name)  # a missing draft is said before anything is timed
    request = settled(engine, options)
    items, unfit = fitting(engine, items, request)
    complain(options.prompts, [*complaints, *unfit])
    result = with_progress(engine, items, methods, request)
    result["conditions"] |= facts_of_options(options, methods, len(complaints) + len(unfit)) | sharing(engine)
    print_result(result, terminal())
    if out:
        write_result(out, result)
    return 0 if result.get("complete", True) else 130


def peers(options: argparse.Namespace, request: Request) -> int:
    """Ours beside other engines, each in an environment of its own."""
    import torch

    from eyas.bench.peers import run_peers, save_picture, table_rows

    if request.sampling != GREEDY:
        raise EyasError("--peers compares greedy answers; leave --temperature and other options of sampling out")
    out = result_file(options.out)
    items, complaints = read_prompts(options.prompts, options.limit)
    complain(options.prompts, complaints)
    said = terminal(stderr=True)
    result = run_peers(
        options.target,
        options.draft,
        Path(options.prompts).name,
        items,
        request.max_new_tokens,
        torch.get_num_threads(),
        said.print,
        request.chat_template_kwargs,
    )
    table = Table("engine", "bits a weight", "tokens/s [quartiles]", "text as bf16's", "version")
    for cells in table_rows(result):
        table.add_row(*cells)
    console = terminal()
    console.print(table)
    for pair, (middle, low, high) in result["ratios"].items():
        console.print(f"{pair}: {middle:.2f}x [{low:.2f}, {high:.2f}]", markup=False)
    for name, why in result["left_out"].items():
        console.print(f"left out: {name}: {why}", markup=False)
    if out:
        write_result(out, result)
        if can_draw():
            save_picture(result, out.with_suffix(".png"))
    return 0


def complain(source: str, complaints: Sequence[str]) -> None:
    for complaint in complaints[:SHOWN]:
        print(f"eyas: {source}: {complaint}", file=sys.stderr)
    if complaints:
        print(f"eyas: {source}: {len(complaints)} line{'s' * (len(complaints) > 1)} skipped", file=sys.stderr)


def with_progress(engine: Engine, items: list[PromptItem], methods: list[Method], request: Request) -> dict[str, Any]:
    with progress() as bar:
        task = bar.add_task("warming up", total=len(items) * len(methods), unit="answers")
        return run_bench(engine, items, methods, request, lambda done, total, text: bar.update(task, completed=done, description=text))


def facts_of_options(options: argparse.Namespace, methods: Sequence[Method], skipped: int) -> dict[str, Any]:
    facts = {"prompt_file": Path(options.prompts).name, "skipped_lines": skipped}
    if any(method.name == "draft-model" for method in methods):
        facts["draft_model"] = options.draft_model or "the target's first third"
    return facts
