"""vLLM's answer tokens a second on a CPU: a child of generation_speed.py, run by the interpreter of vLLM's own environment.

    VENV/bin/python generation_vllm.py JOB.json RESULT.json

JOB.json holds `model`, `prompts` (token ids), `longest` and `dtype`. Sampling as in generation_speed.py. A short batch goes before, so
that nothing is built in the time that counts. What it prints is vLLM's own log; the figures go into RESULT.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(
        model=job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=len(job["prompts"]),
        max_model_len=1024,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    model.generate(prompts[:4], SamplingParams(max_tokens=4), use_tqdm=False)
    started = time.monotonic()
    sampling = SamplingParams(temperature=1.0, top_k=64, top_p=0.98, max_tokens=job["longest"])
    written = sum(len(answer.outputs[0].token_ids) for answer in model.generate(prompts, sampling, use_tqdm=False))
    told = {"tokens_per_second": written / (time.monotonic() - started), "tokens": written}
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
