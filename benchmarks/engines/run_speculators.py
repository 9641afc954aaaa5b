"""speculators' model class loads our export and gives our logits.

    python benchmarks/engines/run_speculators.py --prompts MT_BENCH.jsonl

It trains and does not serve; vLLM serves its layout (run_vllm.py --layout speculators). So what is compared is its own forward pass, one
step, in float32, on the features of our target along texts that the target wrote.
"""

from __future__ import annotations

import json

from harness import HERE, draft_on_texts, exported, make_job, options, run_child, save
from safetensors.torch import load_file, save_file

from eyas.bench.environments import environment, workplace

INSTALLS = (
    ("install", "torch==2.13.0", "speculators==0.9.0", "transformers==5.19.0"),
    ("uninstall", "-y", "torchvision", "torchaudio"),  # builds that may not fit this torch break the import; text needs none
)


def main() -> None:
    parser = options(__doc__, ("fp32",))
    parser.set_defaults(max_tokens=60)
    chosen = parser.parse_args()
    place = workplace("speculators")
    job = make_job(chosen, exported(chosen.draft, chosen.target, "speculators", place))
    cases, ours = draft_on_texts(job, chosen.draft, 0)
    save_file(cases, place / "cases.safetensors")
    told = {"draft": job.draft, "cases": str(place / "cases.safetensors"), "texts": len(job.prompts)}
    found = run_child(environment("speculators", INSTALLS), HERE / "speculators_child.py", told, place, HF_HUB_OFFLINE="1")
    theirs = load_file(place / "result.json.safetensors")
    apart: dict[str, float] = {}
    for name, logits in theirs.items():
        attention, number = name.split(".")
        apart[attention] = max(apart.get(attention, 0.0), float((logits - ours["logits"][int(number)]).abs().max()))
    found |= {
        "prompts": len(job.prompts),
        "rows": sum(len(one) for one in ours["logits"]),
        "largest_difference_of_logits": apart,
    }
    save(found, chosen, "speculators")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
