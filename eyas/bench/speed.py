"""Run methods against each other on the same prompts: interleaved, with the same seeds, in one process.

Knows an engine, a clock and how a method is written; what the runs amount to is figures.py's.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from eyas.bench.figures import Generation, Round, Row, figures_of
from eyas.bench.prompts import PromptItem
from eyas.bench.report import conditions_of, tree_name
from eyas.config import PLAIN, VERIFIERS, EyasError, Request, TreeShape
from eyas.decode.prompt import Prompt
from eyas.decode.sampling import derived_seed, new_seed
from eyas.decode.sequence import RoundRecord
from eyas.engine import Engine
from eyas.methods import METHODS, copies, parted

WARM_UP_TOKENS = 8
ABOVE = 1.1  # a speed-up this many times tau, at the lower end of its interval, is no speed-up

Report = Callable[[int, int, str], None]  # generations done, of how many, the method that comes next


class Method(NamedTuple):
    """A method as a user writes it, `METHOD[+copy][@TREE][+VERIFIER]`; parts that are left out come from the request. Copying is off where
    nothing asks for it: a table's `eagle3` is the draft alone."""

    text: str
    name: str
    tree: str | None
    verifier: str | None
    copy: bool

    @classmethod
    def parse(cls, text: str) -> Method:
        found = re.fullmatch(r"([^@+]+)(\+copy)?(?:@([^@+]+))?(\+copy)?(?:\+([^@+]+))?", text)
        if not found:
            raise EyasError(f"method {text!r} is not understood; write METHOD[+copy][@TREE][+VERIFIER], say eagle3@chain:3")
        written, before, tree, behind, verifier = found.groups()
        name, copy = parted(written + (before or behind or ""))
        if copy:
            copies(name, copy)  # an error where it cannot
        method = cls(text, name, tree, verifier, bool(copy))
        if method.tree and method.name == "plain":
            raise EyasError(f"method {text!r}: plain decoding has no tree")
        if method.tree not in (None, "auto"):
            TreeShape.parse(method.tree)
        if method.verifier and method.verifier not in VERIFIERS:
            raise EyasError(f"verifier {method.verifier!r} is unknown; choose {', '.join(VERIFIERS)}")
        return method

    def request(self, base: Request) -> Request:
        """The base request by this method."""
        tree = PLAIN if self.name == "plain" else self.tree or base.tree
        copy = METHODS[self.name].copy and (self.copy or bool(base.copy))
        return replace(base, method=self.name, copy=copy, tree=tree, verifier=self.verifier or base.verifier)


def parse_methods(text: str) -> list[Method]:
    methods = [Method.parse(part.strip()) for part in text.split(",") if part.strip()]
    if not methods:
        raise EyasError("no method was given; try --methods plain,lookup")
    for method, times in Counter(methods).items():
        if times > 1:
            raise EyasError(f"method {method.text!r} is given {times} times; once is enough")
    return methods


# ---- the run ----


def run_bench(
    engine: Engine,
    prompts: Sequence[PromptItem],
    methods: Sequence[Method],
    request: Request,
    report: Report = lambda *_: None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """{"conditions": .., "methods": {as written: figures}}; an interrupt ends it early with "complete": False.

    `deadline`, in seconds of time.monotonic(): a prompt that would not be done by then, but for the first, is not begun, and "left_out"
    says how many were not.
    """
    request = replace(request, seed=new_seed() if request.seed is None else request.seed)
    plans = {method.text: method.request(request) for method in methods}
    for plan in plans.values():  # the first pass of a process is slow: no method shall pay for it
        engine.generate(prompts[0].prompt, replace(plan, max_new_tokens=min(WARM_UP_TOKENS, plan.max_new_tokens)))
    if engine.plans:
        engine.plans.frozen = True  # what was learned before counts, not what these prompts teach
    started = time.monotonic()
    rows, whole = timed_rows(engine, prompts, plans, report, deadline)
    figures, ended = all_figures(rows, plans), time.monotonic()
    in_time = ended + (ended - started) <= deadline
    if whole and in_time and any(map(impossible, figures.values())):  # another program got in the way: once more
        again, all_of_it = timed_rows(engine, prompts[: len(rows)], plans, report)
        if all_of_it:
            rows, figures = again, all_figures(again, plans)
    for each in figures.values():
        if impossible(each):
            each["disturbed"] = True
    result = {"conditions": conditions_of(engine, plans, request, len(rows)), "methods": figures}
    if not whole:
        return {**result, "complete": False}
    return {**result, "left_out": len(prompts) - len(rows)} if len(rows) < len(prompts) else result


def all_figures(rows: list[Row], plans: dict[str, Request]) -> dict[str, dict[str, Any]]:
    return {text: settings_of(plan) | figures_of(text, rows, same_draws(plan, plans.get("plain"))) for text, plan in plans.items()}


def impossible(figures: dict[str, Any]) -> bool:
    """Whether a speed-up is clearly above tau. A round costs at least a plain pass, so one of the two timings was disturbed."""
    tau, interval = figures["tau"], figures["speedup_interval"]
    return tau is not None and interval is not None and interval[0] > ABOVE * tau


def settings_of(plan: Request) -> dict[str, Any]:
    return {"tree": tree_name(plan.tree), "verifier": plan.verifier, "copy": bool(plan.copy)}


def same_draws(plan: Request, plain: Request | None) -> bool:
    """Whether this method must write plain decoding's text. EAGLE's rule draws other (as good) tokens unless greedy."""
    return plain is not None and (plan.sampling.greedy or plan.verifier == plain.verifier == "walk")


def timed_rows(
    engine: Engine, prompts: Sequence[PromptItem], plans: dict[str, Request], report: Report, deadline: float = math.inf
) -> tuple[list[Row], bool]:
    """Run every method on each prompt, in a rotating order, all with one seed; also whether no interrupt ended it, which keeps the prompts
    that all methods did. What would end after the deadline is not begun, the first prompt aside."""
    rows: list[Row] = []
    names, longest = list(plans), 0.0
    try:
        for index, item in enumerate(prompts):
            begun = time.monotonic()
            if rows and begun + longest > deadline:
                break
            row: Row = {}
            first = index % len(names)
            for text in names[first:] + names[:first]:
                report(index * len(names) + len(row), len(prompts) * len(names), text)
                plan = plans[text]
                assert plan.seed is not None  # `run_bench` drew one
                row[text] = measure(engine, item.prompt, replace(plan, seed=derived_seed(plan.seed, index)))
            rows.append(row)
            longest = max(longest, time.monotonic() - begun)
        report(len(prompts) * len(names), len(prompts) * len(names), "done")
    except KeyboardInterrupt:
        if not rows:
            raise
        return rows, False
    return rows, True


def round_of(record: RoundRecord) -> Round:
    committed, right = len(record.committed), len(record.accepted.path) - 1
    if committed <= right:  # the text ended inside the path: deeper guesses were never put to the test
        return Round(committed, committed, committed)
    return Round(committed, max(record.tree.depths), right)


def measure(engine: Engine, prompt: Prompt, request: Request) -> Generation:
    rounds: list[Round] = []
    started = time.perf_counter()
    result = engine.generate(prompt, request, watch=lambda record: rounds.append(round_of(record)))
    return Generation(result.tokens, time.perf_counter() - started, rounds)
