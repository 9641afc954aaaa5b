"""What the tests of self-written data share: a template of bytes, two questions, settings under which a tiny target says
enough, and writing without other processes."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch

from eyas.files.target import load_target
from eyas.files.tokenizer import load_tokenizer
from eyas.train import writers
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Writer
from eyas.train.shards import write_shards
from eyas.train.template import Template
from tests.tiny import byte_tokenizer

TAPS = (1, 2, 4)
END = 257  # <|im_end|> of the byte tokenizer
ASKED_PLAINLY: dict[str, Any] = {"task_share": 0.0, "system_share": 0.0, "topic_share": 0.0, "loop_share": 0.0}
SETTINGS = SelfPlay("tiny", "chat", TAPS, longest_question=16, longest_answer=36, turns=(1,), **ASKED_PLAINLY)
QUESTIONS = [Asked(("How can a hawk see?",)), Asked(("Why do owls fly at night and not by day?",))]


@cache
def template() -> Template:
    return Template(byte_tokenizer(), (END,))


def write_here(directory, shards, settings, questions, workers, limit, done, report) -> None:
    """What one writing process does, in this one, shard by shard; the processes themselves are tests/train/test_shards.py's."""
    with torch.inference_mode():
        target = load_target(directory, writers.writing_precision()).prepare()
        template = Template(load_tokenizer(directory), target.config.eos_token_ids, settings.chat_template_kwargs)
        there = frozenset(shards.counts)
        missing = (number for number in itertools.count() if number not in there)
        for _ in write_shards(Writer(target, template, settings, list(questions), writers.slots_for(limit)), shards, missing):
            report(int(min(shards.look().total().answer_tokens, limit.tokens)))
            if done():
                break
    shards.look()
