"""Plain and drafted text by SGLang on the CPU, one request at a time, with the tree of each round.

    PYTHONPATH=sglang/standin:sglang VENV/bin/python sglang_child.py JOB.json RESULT.json

With EAGLE3_SERVE=1 its OpenAI server is asked one question too. With a draft SGLang loads sglang/recorder/eagle3.py, which leaves a
directory `record` beside the result. Knows nothing of eyas.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from local_server import ask, server

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
QUESTION = [{"role": "user", "content": "Name three rivers of Europe."}]
PATIENCE = 300  # seconds, for a server to start


def flags(job: dict[str, Any], drafted: bool) -> dict[str, Any]:
    """SGLang's options, the same for Engine(..) and the command line."""
    given = {
        "model_path": job["target"],
        "dtype": DTYPES[job["precision"]],
        "device": "cpu",
        "attention_backend": "torch_native",  # intel_amx here is changed to torch_native silently, which then refuses EAGLE3
        "prefill_attention_backend": "intel_amx",
        "decode_attention_backend": "intel_amx",
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,  # every prompt is read from its first token, by the draft too
        "skip_server_warmup": True,
        "decode_log_interval": 1,  # the counters behind avg_spec_accept_length take in what has been logged
        "max_running_requests": 1,
        "max_total_tokens": 4096,
        "context_length": 2048,
        "mem_fraction_static": 0.3,
    }
    nodes, depth, top_k = job["tree"]
    if drafted:
        given |= {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": job["draft"], "speculative_num_steps": depth + 1}
        given |= {"speculative_eagle_topk": top_k, "speculative_num_draft_tokens": nodes}
    return given


def sampling(job: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": job["max_tokens"], "stop_token_ids": job["end_ids"], "skip_special_tokens": False}


def answers(job: dict[str, Any], prompts: list[Any], drafted: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What an engine writes after each prompt (token ids), and what it says of itself at the end."""
    from sglang import Engine

    engine = Engine(**flags(job, drafted))
    try:
        told = [engine.generate(input_ids=prompt, sampling_params=sampling(job)) for prompt in prompts]
        return told, engine.get_server_info()
    finally:
        engine.shutdown()


def shared_out(rounds: list[dict[str, Any]], told: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rounds of each answer, by the number of verifications that SGLang counted for it."""
    counts = [one["meta_info"]["spec_verify_ct"] for one in told]
    assert sum(counts) == len(rounds), f"{len(rounds)} rounds recorded, SGLang counted {sum(counts)}"
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return [rounds[end - count : end] for end, count in zip(ends, counts)]


def steps_of(rounds: list[dict[str, Any]], tokens: list[int]) -> list[int]:
    """Tokens committed by each round; the end of the answer cuts the last."""
    steps = [one["accepted"] + 1 for one in rounds]
    over = 1 + sum(steps) - len(tokens)
    assert 0 <= over < steps[-1], f"rounds committed {sum(steps)} tokens, the answer has {len(tokens)}"
    return [*steps[:-1], steps[-1] - over]


def parents_of(one: dict[str, Any]) -> list[int]:
    parents = [-1] * len(one["tokens"])
    for row, child in enumerate(one["first_child"]):
        while child >= 0:
            parents[child], child = row, one["next_sibling"][child]
    return parents


# ---- the OpenAI server ----


def served(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """What `python -m sglang.launch_server` with the draft answers to QUESTION, beside the plain engine's answer."""
    from transformers import AutoTokenizer

    question = AutoTokenizer.from_pretrained(job["target"]).apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    (plain,), _ = answers(job, [question], False)

    def command(port: int) -> list[str]:
        given = flags(job, True) | {"host": "127.0.0.1", "port": port}
        options = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in given.items()]
        return [sys.executable, "-m", "sglang.launch_server", *options]

    with server(command, log, PATIENCE) as address:
        asked = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": job["max_tokens"]}
        said = ask(f"{address}/v1/chat/completions", asked)
        answer, state = said["choices"][0]["message"]["content"], ask(f"{address}/server_info")["internal_states"][0]
    return {
        "answer": answer,
        "equals_plain_engine": answer == plain["text"].removesuffix("<|im_end|>"),
        "usage": said["usage"],
        "avg_spec_accept_length": state["avg_spec_accept_length"],
    }


def main() -> None:
    import sgl_kernel
    import sglang

    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    record = out.with_name("record")
    record.mkdir(exist_ok=True)
    more = {"openai_server": served(job, out.with_name("server.txt"))} if os.environ.get("EAGLE3_SERVE") else {}
    plain, _ = answers(job, job["prompts"], False)
    os.environ |= {"SGLANG_EXTERNAL_MODEL_PACKAGE": "recorder", "EAGLE3_RECORD": str(record)}
    told, info = answers(job, job["prompts"], True)
    rounds = shared_out([json.loads(line) for line in (record / "rounds.jsonl").read_text().splitlines()], told)
    accepted = [one["accepted"] + 1 for each in rounds for one in each]
    result = {
        "engine": f"SGLang {sglang.__version__}, kernels {sgl_kernel.__version__}",
        "notes": [
            "SGLang's scheduler, model classes, draft worker and tree growth ran; its CPU (AMX) and CUDA kernels did not:",
            "attention over the cache, laying out the tree, greedy verification and cache indices are a stand-in in plain PyTorch",
            "one request at a time, no radix cache, no overlap schedule",
        ],
        "plain": [one["output_ids"] for one in plain],
        "tokens": [one["output_ids"] for one in told],
        "steps": [steps_of(each, one["output_ids"]) for each, one in zip(rounds, told)],
        "chains": [[one["tokens"][1:] for one in each] for each in rounds],
        "parents": [[parents_of(one) for one in each] for each in rounds],
        "more": more
        | {
            "avg_spec_accept_length_of_server_info": info["internal_states"][0]["avg_spec_accept_length"],
            "mean_of_recorded_rounds_uncut": sum(accepted) / len(accepted),
        },
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":  # SGLang's processes import this file again
    main()
