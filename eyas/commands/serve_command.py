"""`eyas serve-command`: the tested command line for an engine, with the number of draft tokens that pays by measured acceptance."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eyas.commands.common import draft_path, evidence_of
from eyas.commands.next_steps import shell
from eyas.commands.output import progress, terminal
from eyas.config import EyasError, TreeShape
from eyas.diagnose.doctor import variable_findings
from eyas.files.eagle3_files import check_fits
from eyas.formats.layouts import find, layout_of
from eyas.formats.portable import TargetFiles

LONGEST = 7
TOKENS = 64
USUAL_COST = 0.1  # a draft step beside a target pass, in an engine on a GPU: one layer and a small head of thirty and a large one


def run(options: argparse.Namespace) -> int:
    layout = layout_of(options.engine)
    if options.cost is not None and not 0 < options.cost < 10:
        raise EyasError(f"cost must be above 0 and below 10 (a draft step's time over a target pass's), not {options.cost}")
    path = draft_path(options.draft).resolve()
    target, found = TargetFiles.of(options.target), find(path)
    draft = found.resolved(target.config.num_hidden_layers)
    check_fits(draft.config, target.config)
    if why := layout.refusal(draft):
        raise EyasError(f"{layout.title} cannot run this draft: {why}")
    evidence, embedding = evidence_of(target, TOKENS, options.chat_template_kwargs)
    from eyas.measure.agreement import agreement

    with progress() as bar:
        task = bar.add_task("the draft is measured", total=LONGEST, unit="steps")
        report = lambda step: bar.update(task, completed=step)  # noqa: E731
        acceptance = agreement(draft.network(embedding), draft.vocab, evidence, steps=LONGEST, report=report).acceptance
    cost = USUAL_COST if options.cost is None else options.cost
    gains = [gain(acceptance[:length], cost) for length in range(1, LONGEST + 1)]
    best = 1 + max(range(LONGEST), key=gains.__getitem__)
    console = terminal()
    told = ", ".join(f"{length}: {value:.2f}" for length, value in enumerate(gains, 1))
    console.print(f"# {layout.title}; expected gain over plain by draft tokens, a draft step costing {cost:g} of a target pass: {told}")
    first = preparation(path, options.engine, found.layout, target.name)
    for finding in variable_findings(path, options.chat_template_kwargs):
        console.print(f"# {finding.says}; {finding.do}", markup=False)
    templated = ""
    if variables := options.chat_template_kwargs and json.dumps(options.chat_template_kwargs):
        if layout.variables:
            templated = f" {shell(layout.variables, variables)}"
        else:
            console.print(f"# this command sets no variables of the chat template: render each prompt with {variables}", markup=False)
    serve = layout.serve(Path("OUT") if first else path, target.name, TreeShape.chain(best)) + templated
    if max(gains) > 1:
        lines = [*([f"# first: {first}"] if first else []), serve]
    else:  # a line that is pasted shall not make it slower
        told = "# none pays at this cost: serve the target alone"
        alone = [f"{told}, as this does", layout.serve_alone(target.name) + templated] if layout.serve_alone else [told]
        lines = [*alone, f"# with the draft all the same: {f'{first} && ' if first else ''}{serve}"]
    console.print(*lines, sep="\n", markup=False)
    return 0


def gain(acceptance: list[float], cost: float) -> float:
    """Expected tokens of a round, by acceptance of each step given those before, over its time in target passes."""
    expected, alive = 1.0, 1.0
    for share in acceptance:
        alive *= share
        expected += alive
    return expected / (1 + cost * len(acceptance))


def preparation(path: Path, name: str, there: str, target: str) -> str | None:
    """What to do first, where the draft is not in a layout that the engine reads. SGLang and vLLM read eyas's own folder."""
    own, plain = there == "eyas", there.startswith("plain")
    fits = {"sglang": own, "vllm": own or plain, "safeailab": plain, "llama_cpp": there.startswith("llama.cpp")}
    if fits.get(name, there == name):
        return None
    export = shell("eyas", "export", path if own else "OWN", "OUT", "--to", name, "--target", target)
    return export if own else f"{shell('eyas', 'import', path, 'OWN', '--target', target)} && {export}"
