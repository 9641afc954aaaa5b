"""A benchmark's result for people: a table, and under it the conditions without which its numbers mean nothing.

Knows the result's shape and what describes a run (models, machine, versions); measures nothing.
"""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import eyas
from eyas.config import PLAIN, Request, Sampling, TreeShape
from eyas.decode.sampling import NOISE_VERSION
from eyas.engine import Engine
from eyas.files.disk import directory_hash
from eyas.kernels.linear import capability

RARE = ("min_new_tokens", "stop_token_ids", "ignore_eos", "chat_template_kwargs", "defaulted")
RARE_SAMPLING = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
COLUMNS = ("method", "tree", "tau", "tau before loops", "tokens/s", "speedup", "same text")


def conditions_of(engine: Engine, plans: dict[str, Request], request: Request, prompts: int) -> dict[str, Any]:
    """What a reader needs to repeat the run; `plans` are the requests as each method carried them out."""
    return {
        "target": engine.directory.name,
        "draft": engine.draft.name if engine.draft else None,
        "draft_sha256": directory_hash(engine.draft)[:16] if engine.draft else None,
        "precision": engine.precision,
        "temperature": request.sampling.temperature,
        "top_k": request.sampling.top_k,
        "top_p": request.sampling.top_p,
        "min_p": request.sampling.min_p,
        **unusual(request),
        "trees": {text: tree_name(plan.tree) for text, plan in plans.items()},
        "verifier": request.verifier,
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop),
        "prompt_count": prompts,
        "seed": request.seed,
        **machine(engine),
    }


def unusual(request: Request) -> dict[str, Any]:
    """Settings that few runs change, where this one did."""
    usual, sampling = Request(), Sampling()
    found = {name: getattr(request, name) for name in RARE if getattr(request, name) != getattr(usual, name)}
    return found | {
        name: getattr(request.sampling, name) for name in RARE_SAMPLING if getattr(request.sampling, name) != getattr(sampling, name)
    }


def machine(engine: Engine) -> dict[str, Any]:
    return {
        "device": str(engine.target.device),
        "threads": torch.get_num_threads(),
        "cpu_capability": capability(),
        "torch": torch.__version__,
        "eyas": eyas.__version__,
        "noise_version": NOISE_VERSION,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> float | None:
    """The most memory this process has held at once, in units of 2**20 bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def tree_name(tree: str | TreeShape) -> str:
    return "none" if tree == PLAIN else str(tree)


def print_result(result: dict[str, Any], console: Console) -> None:
    table = Table(*COLUMNS)
    prompts = result["conditions"]["prompt_count"]
    for text, figures in result["methods"].items():
        table.add_row(*(Text(cell) for cell in cells(text, figures, prompts)))
    console.print(table)
    console.print(conditions_line(result), markup=False, soft_wrap=True)


def cells(text: str, figures: dict[str, Any], prompts: int) -> tuple[str, ...]:
    same = figures["same_text"]
    return (
        text,
        figures["tree"],
        with_interval(figures["tau"], figures["tau_interval"], prompts),
        number(figures["tau_before_loop"]),
        f"{figures['tokens_per_second']:.1f}",
        with_interval(figures["speedup"], figures["speedup_interval"], prompts) + " (disturbed)" * bool(figures.get("disturbed")),
        "-" if same is None else f"{same}/{prompts}",
    )


def with_interval(value: float | None, interval: list[float] | None, prompts: int) -> str:
    if interval is None or prompts < 2:  # one prompt says nothing of the spread
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def conditions_line(result: dict[str, Any]) -> str:
    given = result["conditions"]
    facts = (
        f"target {given['target']}",
        f"draft {given['draft']} {given['draft_sha256']}" if given["draft"] else "no draft",
        given["precision"],
        f"temperature {given['temperature']:g}",
        *(f"{name} {given[name]:g}" for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)) if given[name] != off),
        *(f"{name} {given[name]}" for name in (*RARE_SAMPLING, *RARE) if name in given),
        f"{given['prompt_count']} prompt{'s' * (given['prompt_count'] != 1)} of {given.get('prompt_file', 'the caller')}",
        f"up to {given['max_new_tokens']} tokens, seed {given['seed']}, verifier {given['verifier']}",
        f"{given['device']} {given['cpu_capability']}, {given['threads']} threads, torch {given['torch']}, eyas {given['eyas']}",
        f"{given['peak_memory_mb']} MB at most, {given['date']}",
    )
    return " · ".join(facts) + ("" if result.get("complete", True) else " · INTERRUPTED: only prompts that every method had done")
