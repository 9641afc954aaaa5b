"""Self-written data: answer tokens a second of our writers against transformers' batched `generate`, the same weights and sampling.

    python benchmarks/generation_speed.py [--seconds 60] [--batch 64] [--repeats 2] [--out F.json]

Both answer the same questions (the target's own), at temperature 1 within top-p 0.98 of the best 64 tokens, up to 200 tokens; the two take
turns. Ours: one single-thread process a core, 64 conversations each, features handed over. Theirs: one process with all threads, left
padded, until the longest answer ends; tokens behind an end of turn do not count.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from common import options, parsed, target_for, tell
from transformers import AutoModelForCausalLM

from eyas.config import default_taps
from eyas.files.target import load_target, target_config
from eyas.files.tokenizer import load_tokenizer
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import SLOTS, Writer
from eyas.train.template import Template
from eyas.train.writers import writing_precision


def settings_for(directory: Path, template: Template, longest: int) -> SelfPlay:
    taps = default_taps(target_config(directory).num_hidden_layers)
    return SelfPlay("speed", template.text, taps, answer_temperatures=(1.0,), turns=(1,), longest_answer=longest, longest_question=96)


@torch.inference_mode()
def own_writer(
    directory: Path, apart: int, told: Any, slots: int, questions: list[Asked], seconds: float, first: int, longest: int
) -> None:
    """One worker: the first half of the time fills the slots and is not counted."""
    torch.set_num_threads(1)
    target = load_target(directory, writing_precision()).prepare()
    template = Template(load_tokenizer(directory), target.config.eos_token_ids)
    play, first = settings_for(directory, template, longest), first + apart
    writer = Writer(target, template, SelfPlay(**vars(play) | {"seed_prompts": "questions", "seeded_share": 1.0}), questions, slots)
    rows = {slot: writer.begin(slot, first + slot) for slot in range(slots)}
    following, answers, started = first + slots, 0, time.monotonic()
    counting = started + seconds / 2
    while (now := time.monotonic()) < started + seconds:
        answers += sum(not row.asking for row in rows.values()) if now >= counting else 0
        for slot, _ in list(writer.step(rows)):
            rows[slot], following = writer.begin(slot, following), following + 1
    told.put(answers / (time.monotonic() - counting))


@torch.inference_mode()
def theirs(model: Any, tokenizer: Any, prompts: list[str], longest: int) -> float:
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    fed = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    started = time.monotonic()
    out = model.generate(**fed, max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=64, top_p=0.98)
    passed = time.monotonic() - started
    written = out[:, fed["input_ids"].shape[1] :]
    end = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
    ended = torch.isin(written, end).cumsum(1)
    return int((ended - torch.isin(written, end).long() == 0).sum()) / passed


@torch.inference_mode()
def own_questions(directory: Path, play: SelfPlay, template: Template, count: int) -> list[Asked]:
    """What the target asks when it is free to."""
    target = load_target(directory, writing_precision()).prepare()
    writer = Writer(target, template, play, [], 32)
    found = []
    for _, finished in writer.write(itertools.count()):
        if finished is not None:
            tokens = finished.row.tokens[len(template.before) : finished.row.answers[0].start - len(template.after)]
            found.append(Asked((template.tokenizer.decode(tokens),)))
        if len(found) == count:
            break
    return found


def ours(directory: Path, workers: int, told: Any, *job: Any) -> float:
    """Answer tokens a second of all workers together, each in a process of its own; of one in this one."""
    if workers == 1:
        own_writer(directory, 0, told, *job)
        return told.get()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=own_writer, args=(directory, 100_000 * number, told, *job)) for number in range(workers)]
    for process in processes:
        process.start()
    rate = sum(told.get() for _ in processes)
    for process in processes:
        process.join()
    return rate


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--longest", type=int, default=200, help="tokens of an answer: transformers needs some minutes for a batch of them")
    parser.add_argument("--slots", type=int, default=SLOTS, help="conversations of a worker in flight")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parsed(parser, words, seconds=1, batch=1, repeats=1, longest=20, slots=4, workers=1)
    directory = target_for(given)
    tokenizer = load_tokenizer(directory)
    template = Template(tokenizer, target_config(directory).eos_token_ids)
    questions = own_questions(directory, settings_for(directory, template, given.longest), template, given.batch)
    model = {name: AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, name)).eval() for name in ("float32", "bfloat16")}
    faster = max(model, key=lambda name: theirs(model[name], tokenizer, [template.rendered(questions[0].turns[0])] * 16, 6))
    prompts = [template.rendered(question.turns[0]) for question in questions]
    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    for repeat in range(given.repeats):
        rates["transformers"].append(theirs(model[faster], tokenizer, prompts, given.longest))
        told = multiprocessing.get_context("spawn").Queue() if given.workers > 1 else SimpleQueue()
        job = (given.slots, questions, given.seconds, 1000 * repeat, given.longest)
        rates["ours"].append(ours(directory, given.workers, told, *job))
    found = {name: [round(rate, 1) for rate in each] for name, each in rates.items()}
    ratio = [one / other for one, other in zip(rates["ours"], rates["transformers"])]
    tell({**found, "transformers_dtype": faster, "batch": given.batch, "workers": given.workers, "ratio": ratio}, given.out)


if __name__ == "__main__":
    main()
