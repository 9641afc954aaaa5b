"""What every engine's script shares: prompts as token ids, an environment of its own, ours on the same text, the table.

An engine runs in a venv of its own as a child: it is handed a job (a JSON file) and writes a result (another). A job says `target`,
`draft` (directories), `prompts` (lists of token ids), `max_tokens`, `precision` (fp32 or bf16), `end_ids` (tokens that end an answer),
and `tree` (nodes, depth, top_k; a chain has top_k 1). A result says `engine` (name and version), `notes`, and for each prompt

    plain    token ids that the engine writes without a draft
    tokens   token ids that it writes with the draft; the first comes from the prompt's own pass
    steps    how many tokens each round committed, in order: sum(steps) == len(tokens) - 1; the last may be cut
    chains   the tokens drafted in each round, where the engine lets one see them; else null

Then our own draft walks the text that the engine wrote (eyas/measure/replay.py) and the two are compared round by round, since totals hide
layer that is one off. Knows no engine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eyas.model.draft import DraftNetwork
    from eyas.model.vocab import DraftVocab

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"  # a folder a day


@dataclass(frozen=True)
class Job:
    target: str
    draft: str
    prompts: list[list[int]]
    max_tokens: int
    precision: str
    end_ids: list[int]
    tree: list[int]  # nodes with the root, expansions after the first, children a node


def options(text: str, precisions: Sequence[str] = ("fp32", "bf16")) -> argparse.ArgumentParser:
    """The command line that every engine's script has."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--prompts", required=True, metavar="F.jsonl", help="MT-bench's questions, say")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--tree", default="chain:3")
    parser.add_argument("--target", help="default: the embedded target")
    parser.add_argument("--draft", help="default: the bundled one")
    parser.add_argument("--precision", choices=precisions, default=precisions[0])
    parser.add_argument("--out", type=Path, help="JSON of the result (default: benchmarks/results/TODAY-engines/)")
    return parser


def make_job(chosen: argparse.Namespace, draft: Path) -> Job:
    """`draft`: what `exported` wrote for the engine."""
    from eyas.bench.prompts import read_prompts
    from eyas.config import TreeShape
    from eyas.files.target import target_config, target_directory
    from eyas.files.tokenizer import load_tokenizer

    directory = target_directory(chosen.target)
    tokenizer = load_tokenizer(directory)
    items, _ = read_prompts(chosen.prompts, chosen.limit)
    prompts = []
    for item in items:
        messages = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    shape = TreeShape.parse(chosen.tree)
    ends = list(target_config(directory).eos_token_ids)
    return Job(str(directory), str(draft), prompts, chosen.max_tokens, chosen.precision, ends, [shape.nodes, shape.depth, shape.top_k])


def run_child(
    python: Path, script: Path, job: Job | Mapping[str, Any], place: Path, timeout: float = 3600, **environ: str
) -> dict[str, Any]:
    """Run a script in the engine's environment on a job; what it says goes to a log. Raises with the log's end where it fails."""
    work, result = place / "job.json", place / "result.json"
    work.write_text(json.dumps(asdict(job) if isinstance(job, Job) else job))
    result.unlink(missing_ok=True)
    log = place / "log.txt"
    with open(log, "w") as out:
        command = [str(python), str(script), str(work), str(result)]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=clean | environ, timeout=timeout).returncode
    if code or not result.exists():
        raise SystemExit(f"{script.name} failed ({code}); the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")
    return json.loads(result.read_text())


def exported(draft: str | None, target: str | None, layout: str, place: Path, *more: str) -> Path:
    """The draft in an engine's layout, by `eyas export`; `more` are options that this layout needs."""
    command = [sys.executable, "-m", "eyas", "export", draft or "bundled", str(place / "draft"), "--to", layout, "--force", *more]
    if target:
        command += ["--target", target]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return place / "draft"


def loaded(job: Job, draft: str | None, precision: str) -> tuple[Any, DraftNetwork, DraftVocab]:
    """Our target, prepared, with our draft as it was before any export."""
    from eyas.engine import draft_directory
    from eyas.files.eagle3_files import load_draft
    from eyas.files.target import DTYPES, load_target

    target = load_target(Path(job.target), precision)
    directory = draft_directory(draft or "bundled", Path(job.target))
    network, vocab = load_draft(directory, target.embedding.detach(), DTYPES[precision])
    return target.prepare(), network, vocab


def paths(tokens: Sequence[int], parents: Sequence[int]) -> set[tuple[int, ...]]:
    """Every node of a tree as the tokens that lead to it, the root as the empty path."""
    lines: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:]):
        lines.append((*lines[parent], token))
    return set(lines)


# ---- what engines that only load the draft are compared with ----


def draft_on_texts(job: Job, draft: str | None, places: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Texts that the target writes with their features (tensors, by name), and what our draft makes of them in float32: `logits` of every
    row of each text, `roots`, so many places of each, and the `trees` grown there, as sorted paths."""
    import torch

    from eyas.config import GREEDY, PLAIN, TreeShape
    from eyas.decode.drafter import TreeRequest
    from eyas.decode.generate import Decoder
    from eyas.drafters.eagle3 import Eagle3Drafter
    from eyas.measure.replay import features_of
    from eyas.model.rows import Segment

    target, network, vocab = loaded(job, draft, "fp32")
    drafter, shape = Eagle3Drafter(network, vocab), TreeShape(*job.tree)
    *_, texts = Decoder(target).run(job.prompts, PLAIN, GREEDY, [0] * len(job.prompts), job.max_tokens)
    cases: dict[str, Any] = {}
    logits, trees, all_roots = [], [], []
    for number, text in enumerate(texts):
        features = features_of(target, text.tokens, network.config.taps)
        cases |= {f"features.{number}": features, f"tokens.{number}": torch.tensor(text.tokens)}
        rows = len(text.tokens) - 1
        with torch.inference_mode():
            drafter.reserve(1, rows + 200)
            a = drafter.read(text.tokens[1:], network.fuse(features[:-1]), list(range(rows)), [Segment(0, rows)])
            logits.append(network.logits(a))
            roots = torch.linspace(text.prompt_length, rows, places).int().tolist()
            all_roots.append(roots)
            trees.append([])
            for root in roots:
                drafter.reserve(1, root + 200)
                drafter.observe(0, text.tokens[: root + 1], features[:root])
                tree = drafter.propose([TreeRequest(0, text.tokens[root], root, shape, GREEDY, None)])[0]
                trees[-1].append([list(path) for path in sorted(paths(tree.tokens, tree.parents) - {()})])
    return cases, {"logits": logits, "trees": trees, "roots": all_roots}


# ---- comparing ----


def compare(job: Job, result: dict[str, Any], draft: str | None) -> dict[str, Any]:
    """The engine beside ours on the engine's own text: texts, rounds one by one, acceptance by position, chains."""
    from eyas.config import TreeShape
    from eyas.drafters.eagle3 import Eagle3Drafter
    from eyas.measure.replay import features_of, replay

    target, network, vocab = loaded(job, draft, job.precision)
    drafter, shape = Eagle3Drafter(network.prepare(), vocab), TreeShape(*job.tree)
    ours = []
    for prompt, tokens, steps in zip(job.prompts, result["tokens"], result["steps"]):
        assert sum(steps) == len(tokens) - 1, f"{sum(steps)} tokens committed in rounds, {len(tokens)} written"
        text = prompt + tokens
        ours.append(replay(drafter, features_of(target, text, network.config.taps), text, len(prompt), shape))
    found = {
        "prompts": len(job.prompts),
        "texts_equal_plain": sum(a == b for a, b in zip(result["plain"], result["tokens"])),
        "prompts_with_equal_steps": sum(a == b.steps for a, b in zip(result["steps"], ours)),
        "theirs": counts(result["steps"], shape),
        "ours": counts([one.steps for one in ours], shape),
    }
    if result.get("chains"):
        deep = [[tree.tokens[1:] for tree in one.trees] for one in ours]
        pairs = [(a, b) for theirs, own in zip(result["chains"], deep) for a, b in zip(theirs, own)]
        found["rounds_with_equal_chains"] = f"{sum(a == b[: len(a)] for a, b in pairs)} of {len(pairs)}"
    return found


def counts(steps: Sequence[Sequence[int]], shape: Any) -> dict[str, Any]:
    """Rounds, tau, and how often the draft was accepted at least so deep."""
    flat = [step for one in steps for step in one]
    return {
        "rounds": len(flat),
        "tau": round(sum(flat) / max(len(flat), 1), 4),
        "accepted_by_position": [sum(step > depth for step in flat) for depth in range(1, shape.levels + 1)],
    }


def save(told: Mapping[str, Any], chosen: argparse.Namespace, name: str) -> None:
    out = chosen.out or RESULTS / f"{date.today()}-engines" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")


def report(name: str, chosen: argparse.Namespace, job: Job, result: dict[str, Any], compared: dict[str, Any]) -> None:
    """Write the JSON and print one row of the table."""
    conditions = {"max_tokens": job.max_tokens, "tree": chosen.tree, "precision": job.precision, "temperature": 0}
    conditions |= {"prompt_file": Path(chosen.prompts).name, "machine": platform.machine(), "cores": os.cpu_count()}
    told = {"engine": result["engine"], "notes": result.get("notes", []), **conditions, **compared}
    told["steps"] = [" ".join(map(str, one)) for one in result["steps"]]  # a line a prompt
    if "more" in result:
        told["more"] = result["more"]
    save(told, chosen, f"{name}-{job.precision}")
    print(row(told))


def row(told: dict[str, Any]) -> str:
    count = told["prompts"]
    cells = [told["engine"], told["precision"], told["tree"], f"{told['texts_equal_plain']} of {count}"]
    cells += [f"{side['tau']:.3f} {side['accepted_by_position']}" for side in (told["theirs"], told["ours"])]
    drafts = told.get("rounds_with_equal_chains", "-")
    if "trees" in told:  # the same nodes, in whatever order
        drafts = f"{told['trees']['equal_trees']} of {told['trees']['rounds_at_places_of_ours']}"
    cells += [f"{told['prompts_with_equal_steps']} of {count}", drafts]
    return f"| {' | '.join(cells)} |"
