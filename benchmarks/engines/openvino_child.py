"""Plain and drafted text by OpenVINO GenAI on CPU, with what each of its rounds committed.

    VENV/bin/python openvino_child.py JOB.json RESULT.json

The target is converted once a precision, beside RESULT.json. With fp32 the engine is told to compute, to keep its cache and to multiply in
float32; with fp16 and int8, which say how the target's weights are stored, everything else is the engine's own choice. The engine does not
let one see what it drafted. Knows nothing of eyas, nor how the draft was converted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONVERTER = Path(__file__).parents[2] / "eyas" / "formats" / "openvino_target.py"
THREADS = 1  # two wait for each other as soon as anything else runs; speed is no question here
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
CACHE_BLOCKS = 512  # of 32 tokens


def converted(target: str, precision: str, place: Path) -> Path:
    """The target in OpenVINO's form; made where it is not yet there."""
    command = [sys.executable, "-I", str(CONVERTER), target, precision, str(place)]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def load(target: Path, draft: str | None, precision: str) -> Any:
    """A pipeline; without a draft on the same backend and scheduler as with it."""
    import openvino_genai

    how = {"INFERENCE_NUM_THREADS": THREADS, **(EXACT if precision == "fp32" else {})}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks, scheduler.enable_prefix_caching = CACHE_BLOCKS, False
    more = {"draft_model": openvino_genai.draft_model(draft, "CPU", **how)} if draft else {}
    return openvino_genai.LLMPipeline(str(target), "CPU", scheduler_config=scheduler, **more, **how)


def write(pipeline: Any, prompt: list[int], job: dict[str, Any], drafted: bool) -> Any:
    """The engine's own result for one prompt, greedily."""
    import numpy
    import openvino
    import openvino_genai

    asked = openvino_genai.GenerationConfig()
    asked.max_new_tokens, asked.do_sample, asked.apply_chat_template = job["max_tokens"], False, False
    asked.stop_token_ids = set(job["end_ids"])
    if drafted:
        nodes, depth, top_k = job["tree"]
        asked.num_assistant_tokens = nodes - 1
        if top_k > 1:
            asked.tree_depth, asked.branching_factor = depth + 1, top_k
    return pipeline.generate(openvino.Tensor(numpy.array([prompt], numpy.int64)), asked)


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    target = converted(job["target"], job["precision"], out.parent)
    import openvino_genai

    plain = load(target, None, job["precision"])
    texts = [list(write(plain, prompt, job, drafted=False).tokens[0]) for prompt in job["prompts"]]
    del plain
    drafted = load(target, job["draft"], job["precision"])
    tokens, steps = [], []
    for prompt in job["prompts"]:
        result = write(drafted, prompt, job, drafted=True)
        tokens.append(list(result.tokens[0]))
        first, *rest = result.extended_perf_metrics.main_model_metrics.raw_metrics.m_batch_sizes
        assert first == 1, "the prompt's pass commits one token"
        steps.append(rest)
    told = {
        "engine": f"OpenVINO GenAI {openvino_genai.__version__}",
        "notes": ["continuous batching, one request at a time, no prefix cache"],
        "plain": texts,
        "tokens": tokens,
        "steps": steps,
        "chains": None,
    }
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
