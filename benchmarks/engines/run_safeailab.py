"""SafeAILab's draft code on our export: its logits and its trees beside ours, on the same features.

    python benchmarks/engines/run_safeailab.py --prompts MT_BENCH.jsonl --checkout EAGLE [--tree 60x7x10] [--pickled]

CHECKOUT is a clone of github.com/SafeAILab/EAGLE. Its whole runtime asks for CUDA; its draft (eagle/model/cnets.py) does not, and is what
runs here: on the features of our target along texts that the target wrote, in float32. Compared are the logits of every row and, at some
places of each text, the whole tree it grows (60 nodes, depth 7, top 10) with ours, path by path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from harness import HERE, Job, draft_on_texts, exported, make_job, options, run_child, save
from safetensors.torch import load_file, save_file

from eyas.bench.environments import environment, workplace

INSTALLS = (("install", "torch==2.13.0", "transformers==4.53.1", "safetensors==0.8.0"),)
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
    told = {"checkout": str(chosen.checkout.resolve()), "draft": job.draft, "target": str(in_shards(job, place))}
    told |= {"cases": str(place / "cases.safetensors"), "roots": ours["roots"], "tree": job.tree}
    told = run_child(environment("safeailab", INSTALLS), HERE / "safeailab_child.py", told, place)
    report(chosen, job, told, load_file(place / "result.json.safetensors"), ours)


def in_shards(job: Job, place: Path) -> Path:
    """The target, as a checkout reads its embedding: by the index of a sharded one."""
    from eyas.files.tensors import read_tensors, save_tensors

    sharded = place / "target"
    sharded.mkdir(exist_ok=True)
    save_tensors(sharded, read_tensors(Path(job.target)), 100_000_000)
    return sharded


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
    save(found, chosen, f"safeailab{'-bin' if chosen.pickled else ''}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
