"""speculators' model class loads our export and gives our logits.

    python benchmarks/engines/run_speculators.py --prompts MT_BENCH.jsonl

It trains and does not serve; vLLM serves its layout (run_vllm.py --layout speculators). So what is compared is its own forward pass, one
step, in float32, on the features of our target along texts that the target wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from common import RESULTS, draft_on_texts, environment, exported, make_job, options, workplace
from safetensors.torch import load_file, save_file

PINS = [["install", "torch==2.13.0"], ["install", "speculators==0.9.0", "transformers==5.19.0", "torch==2.13.0"]]


def main() -> None:
    parser = options(__doc__, ("fp32",))
    parser.set_defaults(max_tokens=60)
    chosen = parser.parse_args()
    place = workplace("speculators")
    job = make_job(chosen, exported(chosen.draft, chosen.target, "speculators", place))
    cases, ours = draft_on_texts(job, chosen.draft, 0)
    save_file(cases, place / "cases.safetensors")
    told = {"draft": job.draft, "cases": str(place / "cases.safetensors"), "texts": len(job.prompts)}
    (place / "job.json").write_text(json.dumps(told))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("speculators_child.py")
    command = [str(environment("speculators", PINS)), str(script), str(place / "job.json"), str(place / "result.json")]
    subprocess.run(command, check=True, env=clean, timeout=3600)
    theirs = load_file(place / "result.json.safetensors")
    apart: dict[str, float] = {}
    for name, logits in theirs.items():
        attention, number = name.split(".")
        apart[attention] = max(apart.get(attention, 0.0), float((logits - ours["logits"][int(number)]).abs().max()))
    found = json.loads((place / "result.json").read_text()) | {
        "prompts": len(job.prompts),
        "rows": sum(len(one) for one in ours["logits"]),
        "largest_difference_of_logits": apart,
    }
    out = chosen.out or RESULTS / "speculators.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
