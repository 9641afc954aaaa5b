"""One contestant of a race: a process that loads an engine once, then answers prompts, one on each line, and says how long each took.

    ENVIRONMENT/bin/python -I peer_worker.py '{"engine": "vllm", ..}'

Reads {"prompt": ids, "max_tokens": n} on standard input and writes {"tokens": ids, "seconds": s} on standard output, after one first line
{"version": ..}. What engines print goes to standard error. Greedy throughout; an answer ends with one of `end_ids`. Runs in each engine's
own environment, so it imports nothing but that engine (and the standard library), and knows nothing of the race.
"""

# What it imports is each engine's own environment's.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.request import Request, urlopen

Answer = Callable[[list[int], int], list[int]]  # prompt and most tokens -> tokens written


def eyas(job: dict[str, Any]) -> tuple[str, Answer]:
    import torch

    import eyas
    from eyas import plugins

    plugins.load_inherited()
    torch.set_num_threads(job["threads"])
    engine: Any = eyas.load(job["target"], job["draft"], precision=job["precision"])
    request = {"method": job["method"], "tree": job.get("tree", "auto")}

    def answer(prompt: list[int], most: int) -> list[int]:
        return engine.generate(prompt, max_new_tokens=most, generation_config="none", **request).tokens

    for question in job["practice"]:  # prices and calibration, as any use before would have left them
        answer(question, 100)
    if engine.plans:
        engine.plans.frozen = True
    return eyas.__version__, answer


def transformers(job: dict[str, Any]) -> tuple[str, Answer]:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["target"], dtype=getattr(torch, job["dtype"])).eval()
    more = {"eos_token_id": job["end_ids"], "pad_token_id": job["end_ids"][0], "do_sample": False} | job.get("more", {})

    @torch.inference_mode()
    def answer(prompt: list[int], most: int) -> list[int]:
        ids = torch.tensor([prompt])
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **more)[0, len(prompt) :].tolist()

    return transformers.__version__, answer


def vllm(job: dict[str, Any]) -> tuple[str, Answer]:
    import vllm

    model = vllm.LLM(
        model=job["target"],
        dtype=job["dtype"],
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_model_len=job["context"],
        speculative_config=job.get("speculative"),
        **job.get("more", {}),
    )

    def answer(prompt: list[int], most: int) -> list[int]:
        ends = {"stop_token_ids": job["end_ids"], "ignore_eos": True}
        sampling = vllm.SamplingParams(temperature=0, max_tokens=most, detokenize=False, **ends)
        return list(model.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0].token_ids)

    return vllm.__version__, answer


def openvino(job: dict[str, Any]) -> tuple[str, Answer]:
    import numpy
    import openvino
    import openvino_genai

    how: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
    if job.get("draft"):
        how["draft_model"] = openvino_genai.draft_model(job["draft"], "CPU", INFERENCE_NUM_THREADS=job["threads"])
    if job.get("lookup"):
        how["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(job["target"], "CPU", **how)

    def answer(prompt: list[int], most: int) -> list[int]:
        asked = openvino_genai.GenerationConfig()
        asked.max_new_tokens, asked.do_sample, asked.apply_chat_template = most, False, False
        asked.stop_token_ids = set(job["end_ids"])
        if job.get("draft") or job.get("lookup"):
            asked.num_assistant_tokens = job["drafted"]
        if job.get("lookup"):
            asked.max_ngram_size = 3
        return list(pipeline.generate(openvino.Tensor(numpy.array([prompt], numpy.int64)), asked).tokens[0])

    return openvino_genai.__version__, answer


def llama_cpp(job: dict[str, Any]) -> tuple[str, Answer]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "127.0.0.1", probe.getsockname()[1]
    command = [job["server"], "-m", job["target"], "--host", address[0], "--port", str(address[1]), "-np", "1", "-t", str(job["threads"])]
    command += ["-c", str(job["context"]), "--offline", "--cache-ram", "0", *job.get("more", [])]
    server = subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.STDOUT)

    def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"http://{address[0]}:{address[1]}/{path}", data, {"Content-Type": "application/json"}), timeout=300) as reply:
            return json.load(reply)

    for _ in range(600):
        try:
            ask("health")
            break
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {server.returncode}") from None
            time.sleep(0.2)

    def answer(prompt: list[int], most: int) -> list[int]:
        asked = {"prompt": prompt, "n_predict": most, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return ask("completion", asked)["tokens"]

    said = subprocess.run([job["server"], "--version"], capture_output=True, text=True)
    version = re.search(r"version: (.*)", said.stdout + said.stderr)
    assert version is not None, said
    return version[1], answer


ENGINES = {each.__name__: each for each in (eyas, transformers, vllm, openvino, llama_cpp)}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print on standard output what is not for us
    job = json.loads(sys.argv[1])
    version, answer = ENGINES[job["engine"]](job)
    print(json.dumps({"version": version}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = answer(asked["prompt"], asked["max_tokens"])
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - started}), file=out, flush=True)


if __name__ == "__main__":
    main()
