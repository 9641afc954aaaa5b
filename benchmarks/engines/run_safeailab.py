"""SafeAILab's draft code on our export: its logits and its trees beside ours, on the same features.

    python benchmarks/engines/run_safeailab.py --prompts MT_BENCH.jsonl --checkout EAGLE [--tree 60x7x10] [--pickled]

CHECKOUT is a clone of github.com/SafeAILab/EAGLE. Its whole runtime asks for CUDA; its draft (eagle/model/cnets.py) does not, and is what
runs here: on the features of our target along texts that the target wrote, in float32. Compared are the logits of every row and, at some
places of each text, the whole tree it grows (60 nodes, depth 7, top 10) with ours, path by path.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, draft_on_texts, environment, exported, make_job, options, workplace
from safetensors.torch import load_file, save_file

PINS = [["install", "torch==2.13.0", "transformers==4.53.1", "safetensors==0.8.0"]]
ROOTS = 4  # places of each text where a tree is grown


def main() -> None:
    parser = options(__doc__, ("fp32",))
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--pickled", action="store_true", help="write pytorch_model.bin instead of safetensors")
    parser.set_defaults(tree="60x7x10", max_tokens=60)
    chosen = parser.parse_args()
    place = workplace("safeailab")
    draft = exported(chosen.draft, chosen.target, "safeailab-bin" if chosen.pickled else "safeailab", place)
    job = make_job(chosen, draft)
    cases, ours = draft_on_texts(job, chosen.draft, ROOTS)
    save_file(cases, place / "cases.safetensors")
    told = ask(environment("safeailab", PINS), place, job, chosen.checkout, ours["roots"])
    report(chosen, job, told, load_file(place / "result.json.safetensors"), ours)


def ask(python: Path, place: Path, job: Any, checkout: Path, roots: list[list[int]]) -> dict[str, Any]:
    """Run the child; it reads the embedding by the target's index, so the target is written in shards first."""
    from eyas.model.weights import INDEX, read_tensors, save_tensors

    sharded = place / "target"
    if not (sharded / INDEX).exists():
        sharded.mkdir(exist_ok=True)
        save_tensors(sharded, read_tensors(Path(job.target)), 100_000_000)
    told = {"checkout": str(checkout.resolve()), "draft": job.draft, "target": str(sharded), "cases": str(place / "cases.safetensors")}
    (place / "job.json").write_text(json.dumps(told | {"roots": roots, "tree": job.tree}))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    script = Path(__file__).with_name("safeailab_child.py")
    subprocess.run([str(python), str(script), str(place / "job.json"), str(place / "result.json")], check=True, env=clean, timeout=3600)
    return json.loads((place / "result.json").read_text())


def report(chosen: Any, job: Any, told: dict[str, Any], theirs: dict[str, torch.Tensor], ours: dict[str, Any]) -> None:
    differences = [float((theirs[f"logits.{number}"] - own).abs().max()) for number, own in enumerate(ours["logits"])]
    pairs = [(a, b) for one, own in zip(told["trees"], ours["trees"]) for a, b in zip(one, own)]
    found = {
        "engine": told["engine"],
        "prompts": len(job.prompts),
        "rows": sum(len(one) for one in ours["logits"]),
        "largest_difference_of_logits": max(differences),
        "spread_of_logits": round(float(torch.cat(ours["logits"]).std()), 3),
        "tree": chosen.tree,
        "trees": len(pairs),
        "trees_equal": sum(a == b for a, b in pairs),
        "nodes_that_differ": sum(len({*map(tuple, a)} ^ {*map(tuple, b)}) for a, b in pairs),
        "names_that_did_not_fit": told["odd"],
    }
    out = chosen.out or RESULTS / f"safeailab{'-bin' if chosen.pickled else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
