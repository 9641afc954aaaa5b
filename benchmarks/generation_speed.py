"""Self-written data: answer tokens a second of our writers against transformers' batched `generate`, the same weights and sampling.

    python benchmarks/generation_speed.py [--seconds 60] [--batch 64] [--repeats 2] [--vllm VENV/bin/python [--vllm-dtype float32]]

Both answer the same questions (the target's own), at temperature 1 within top-p 0.98 of the best 64 tokens, up to 200 tokens; the two take
turns. Ours: one single-thread process a core, 64 conversations each, features handed over. Theirs: one process with all threads, left
padded, until the longest answer ends; tokens behind an end of turn do not count. vLLM's CPU build, where `--vllm` names the interpreter of
an environment that has it, answers the same questions as one continuous batch (generation_vllm.py), also in turn. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eyas.config import default_taps
from eyas.files.target import load_target, target_config, target_directory
from eyas.files.tokenizer import load_tokenizer
from eyas.train.selfplay import SLOTS, Asked, SelfPlay, Writer
from eyas.train.template import Template
from eyas.train.writers import writing_precision

LONGEST = 200  # tokens of an answer: transformers needs some minutes for a batch of them


def settings_for(directory: Path, template: Template) -> SelfPlay:
    taps = default_taps(target_config(directory).num_hidden_layers)
    return SelfPlay("speed", template.text, taps, answer_temperatures=(1.0,), turns=(1,), longest_answer=LONGEST, longest_question=96)


@torch.inference_mode()
def own_writer(directory: Path, slots: int, questions: list[Asked], seconds: float, first: int, found: Any) -> None:
    """One worker: the first half of the time fills the slots and is not counted."""
    torch.set_num_threads(1)
    target = load_target(directory, writing_precision()).prepare()
    template = Template(load_tokenizer(directory), target.config.eos_token_ids)
    play = settings_for(directory, template)
    writer = Writer(target, template, SelfPlay(**vars(play) | {"seed_prompts": "questions", "seeded_share": 1.0}), questions, slots)
    rows = {slot: writer.begin(slot, first + slot) for slot in range(slots)}
    following, answers, started = first + slots, 0, time.monotonic()
    counting = started + seconds / 2
    while (now := time.monotonic()) < started + seconds:
        answers += sum(not row.asking for row in rows.values()) if now >= counting else 0
        for slot, _ in list(writer.step(rows)):
            rows[slot], following = writer.begin(slot, following), following + 1
    found.put(answers / (time.monotonic() - counting))


@torch.inference_mode()
def theirs(model: Any, tokenizer: Any, prompts: list[str], longest: int = LONGEST) -> float:
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    fed = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    started = time.monotonic()
    out = model.generate(**fed, max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=64, top_p=0.98)
    passed = time.monotonic() - started
    written = out[:, fed["input_ids"].shape[1] :]
    end = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
    ended = torch.isin(written, end).cumsum(1)
    return int((ended - torch.isin(written, end).long() == 0).sum()) / passed


def vllm(python: str, directory: Path, prompts: list[list[int]], dtype: str) -> float:
    """vLLM in a process of its own; its start does not count."""
    job = {"model": str(directory), "prompts": prompts, "longest": LONGEST, "dtype": dtype}
    with tempfile.TemporaryDirectory() as work:
        asked, told = Path(work) / "job.json", Path(work) / "result.json"
        asked.write_text(json.dumps(job))
        command = [python, str(Path(__file__).with_name("generation_vllm.py")), str(asked), str(told)]
        subprocess.run(command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}, stdout=sys.stderr, check=True)
        return json.loads(told.read_text())["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vllm", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-dtype", default="float32")
    options = parser.parse_args()
    directory, workers = target_directory(None), os.cpu_count() or 1
    tokenizer = load_tokenizer(directory)
    template = Template(tokenizer, target_config(directory).eos_token_ids)
    questions = own_questions(directory, template, options.batch)
    model = {name: AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, name)).eval() for name in ("float32", "bfloat16")}
    faster = max(model, key=lambda name: theirs(model[name], tokenizer, [template.rendered(questions[0].turns[0])] * 16, 6))
    prompts = [template.rendered(question.turns[0]) for question in questions]
    ours, others, engine = [], [], []
    context = multiprocessing.get_context("spawn")
    for repeat in range(options.repeats):
        others.append(theirs(model[faster], tokenizer, prompts))
        if options.vllm:
            ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
            engine.append(vllm(options.vllm, directory, ids, options.vllm_dtype))
        told = context.Queue()
        begun = [1000 * repeat + 100_000 * number for number in range(workers)]
        processes = [
            context.Process(target=own_writer, args=(directory, SLOTS, questions, options.seconds, first, told)) for first in begun
        ]
        for process in processes:
            process.start()
        ours.append(sum(told.get() for _ in processes))
        for process in processes:
            process.join()
    rates = {"ours": ours, "transformers": others, "vllm": engine}
    rounded = {name: [round(rate, 1) for rate in found] for name, found in rates.items()}
    ratio = [one / other for one, other in zip(ours, others)]
    print(json.dumps({**rounded, "transformers_dtype": faster, "batch": options.batch, "workers": workers, "ratio": ratio}))


@torch.inference_mode()
def own_questions(directory: Path, template: Template, count: int) -> list[Asked]:
    """What the target asks when it is free to."""
    target = load_target(directory, writing_precision()).prepare()
    writer = Writer(target, template, settings_for(directory, template), [], 32)
    found = []
    for _, finished in writer.write(iter(range(4 * count))):
        if finished is not None:
            tokens = finished.row.tokens[len(template.before) : finished.row.answers[0].start - len(template.after)]
            found.append(Asked((template.tokenizer.decode(tokens),)))
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    main()
