"""A draft in vLLM's CPU build (0.32.0), method eagle3: each round beside ours.

    python benchmarks/engines/run_vllm.py --prompts F.jsonl [--layout vllm|speculators] [--precision fp32|bf16]

`vllm` is the plain layout, where the draft is named in the speculative configuration. With `speculators` vllm_child.py also starts
`vllm serve DRAFT_DIR`, where the verifier and the number of drafted tokens come from the draft's own config.json. Chains only.

Knows vLLM's environment and options; runs nothing of it itself (vllm_child.py does). Named run_vllm.py, since a file vllm.py beside the
child would be what the child imports as vllm.
"""

from __future__ import annotations

from harness import HERE, compare, exported, make_job, options, report, run_child

from eyas.bench.environments import VLLM, environment, workplace

ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler, which holds the drafted tokens, in the child's own process
    "OMP_NUM_THREADS": "1",  # two threads wait for one another at every barrier as soon as anything else runs; speed is no question here
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layout", choices=("vllm", "speculators"), default="vllm", help="of the exported draft")
    chosen = parser.parse_args()
    name = f"vllm-{chosen.layout}"
    place = workplace(name)
    job = make_job(chosen, exported(chosen.draft, chosen.target, chosen.layout, place))
    if job.tree[2] != 1:
        parser.error(f"vLLM drafts chains only, not {chosen.tree}")
    result = run_child(environment("vllm", VLLM), HERE / "vllm_child.py", job, place, **ENVIRON)
    result["engine"] += f", {chosen.layout} layout"
    report(name, chosen, job, result, compare(job, result, chosen.draft))
    if "more" in result:
        print(f"vllm serve DRAFT_DIR, first prompt: {result['more']['serve']}")


if __name__ == "__main__":
    main()
