"""`eyas doctor`: names the cause when a draft accepts little, or says that it is healthy."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from eyas.commands.common import draft_path, evidence_of
from eyas.commands.output import progress, terminal
from eyas.config import EyasError
from eyas.diagnose.doctor import Diagnosis, diagnose
from eyas.diagnose.served import compare
from eyas.formats.portable import TargetFiles
from eyas.http_json import checked_url


def run(options: argparse.Namespace) -> int:
    if options.tokens < 8:
        raise EyasError(f"tokens must be at least 8, not {options.tokens}")
    if options.engine_url:
        checked_url("--engine-url", options.engine_url)
    path = draft_path(options.draft)
    target = TargetFiles.of(options.target)
    evidence, embedding = evidence_of(target, options.tokens, options.chat_template_kwargs)
    with progress() as bar:
        task = bar.add_task("the draft is measured", total=None, unit="readings")
        update = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        found = diagnose(path, target, evidence, embedding, options.chat_template_kwargs, update)
    if not options.json:
        tell(terminal(), found, evidence.answer_tokens)
    served = None
    if options.engine_url and found.draft:
        served = compare(options.engine_url, found.draft, target)
        for line in () if options.json else served["lines"]:
            print(line)
    if options.json:
        print(json.dumps(facts(found) | ({"served": served} if served else {})))
    return 0 if found.healthy and not (served and served["differs"]) else 1


def facts(found: Diagnosis) -> dict[str, object]:
    as_is = found.as_is
    return {
        "healthy": found.healthy,
        "findings": [finding._asdict() for finding in found.findings],
        "tau": as_is and round(as_is.tau, 4),
        "acceptance": as_is and [round(value, 4) for value in as_is.acceptance],
        "readings": [{"reading": says, "tau": round(tau, 4), "better_by": round(z, 1)} for says, tau, z in found.measured],
    }


def tell(console: Console, found: Diagnosis, tokens: int) -> None:
    if found.as_is:
        steps = ", ".join(f"{value:.2f}" for value in found.as_is.acceptance)
        console.print(f"as it is: tau {found.as_is.tau:.2f} for a chain of {len(found.as_is.acceptance)}, acceptance by step {steps}")
        console.print(f"(on {tokens} tokens that the target wrote, every anchor counted, fed with the text)")
        table = Table("if this were so", "tau", "better by, standard errors")
        for says, tau, better in found.measured:
            table.add_row(says, f"{tau:.2f}", f"{better:.1f}")
        console.print(table)
    for finding in found.findings:
        console.print(f"{finding.cause}: {finding.says}; {finding.do}", markup=False)
    if found.healthy:
        console.print("healthy: its files agree with each other and with the target, and no other reading is better")
