"""`eyas doctor`: names the cause when a draft accepts little, or says that it is healthy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eyas.commands.common import evidence_of
from eyas.config import EyasError
from eyas.engine import BUNDLED
from eyas.formats.portable import TargetFiles
from eyas.view.doctor import Diagnosis, diagnose


def run(options: argparse.Namespace) -> int:
    if options.tokens < 8:
        raise EyasError(f"tokens must be at least 8, not {options.tokens}")
    path = BUNDLED if options.draft == "bundled" else Path(options.draft).expanduser()
    if not path.exists():
        raise EyasError(f"{path} does not exist")
    target = TargetFiles.of(options.target)
    evidence, embedding = evidence_of(target, options.tokens)
    found = diagnose(path, target, evidence, embedding)
    served = None
    if options.engine_url:
        from eyas.view.served import compare

        served = compare(options.engine_url, path, target)
    if options.json:
        print(json.dumps(facts(found) | ({"served": served} if served else {})))
    else:
        tell(Console(highlight=False, soft_wrap=True), found, evidence.answer_tokens)
        for line in served["lines"] if served else ():
            print(line)
    return 0 if found.healthy and not (served and served["differs"]) else 1


def facts(found: Diagnosis) -> dict[str, object]:
    as_is = found.as_is
    return {
        "healthy": found.healthy,
        "findings": [finding._asdict() for finding in found.findings],
        "tau": as_is and round(as_is.tau, 4),
        "acceptance": as_is and [round(value, 4) for value in as_is.acceptance],
        "readings": [{"cause": cause, "tau": round(tau, 4), "better_by": round(z, 1)} for cause, tau, z in found.measured],
    }


def tell(console: Console, found: Diagnosis, tokens: int) -> None:
    if found.as_is:
        steps = ", ".join(f"{value:.2f}" for value in found.as_is.acceptance)
        console.print(f"as it is: tau {found.as_is.tau:.2f} for a chain of {len(found.as_is.acceptance)}, acceptance by step {steps}")
        console.print(f"(on {tokens} tokens that the target wrote, every slot counted, fed with the text)")
        table = Table("read otherwise", "tau", "better by, standard errors")
        for cause, tau, better in found.measured:
            table.add_row(cause, f"{tau:.2f}", f"{better:.1f}")
        console.print(table)
    for finding in found.findings:
        console.print(f"{finding.cause}: {finding.says}; {finding.do}", markup=False)
    if found.healthy:
        console.print("healthy: its files agree with each other and with the target, and no other reading is better")
