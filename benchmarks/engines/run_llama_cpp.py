"""A draft in llama.cpp's llama-server (spec type draft-eagle3): each round beside ours.

    python benchmarks/engines/run_llama_cpp.py --prompts F.jsonl [--precision fp32|bf16|q4_1]

Builds llama-server once from the sources that llama-cpp-python carries (wants a C++ compiler; cmake and ninja come from pip). The target
becomes a GGUF by llama.cpp's own converter, which runs in eyas's Python with one package more. `q4_1` is the embedded target as it was
published, before eyas made bfloat16 of it: llama.cpp then multiplies 8-bit activations, which ours does not. Chains only.

Knows sources, build and files; what the server is asked, and how its log is read, is llama_cpp_child.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from harness import HERE, compare, exported, make_job, options, report, run_child

from eyas.bench.environments import llama_cpp, llama_cpp_target, published_target, workplace

WEIGHTS = {"fp32": "fp32", "bf16": "bf16", "q4_1": "bf16"}  # of the draft; products with a bfloat16 matrix take bfloat16 activations
OUTTYPES = {"fp32": "f32", "bf16": "bf16"}  # of the converted target


def main() -> None:
    parser = options(__doc__, tuple(WEIGHTS))
    chosen = parser.parse_args()
    if chosen.precision == "q4_1" and chosen.target:
        parser.error("q4_1 is the embedded target's published file; leave --target out")
    place = workplace("llama_cpp")
    sources = llama_cpp()
    job = make_job(chosen, exported(chosen.draft, chosen.target, "llama_cpp", place, "--weights", WEIGHTS[chosen.precision]))
    if job.tree[2] != 1:
        parser.error(f"llama.cpp drafts chains only, not {chosen.tree}")
    target = published_target() if chosen.precision == "q4_1" else llama_cpp_target(job.target, OUTTYPES[job.precision])
    files = {"LLAMA_SERVER": str(sources / "build/bin/llama-server"), "TARGET_GGUF": str(target)}
    result = run_child(Path(sys.executable), HERE / "llama_cpp_child.py", job, place, **files)
    ours = job
    if chosen.precision == "q4_1":
        ours = replace(job, precision="fp32")
        result["notes"].append("ours: fp32, with a bfloat16 copy of the 4-bit weights; not the same target, so not a fair equality")
    report("llama_cpp", chosen, job, result, compare(ours, result, chosen.draft))


if __name__ == "__main__":
    main()
