"""The claim that texts are equal names its conditions, and one function says whether they hold."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from eyas.commands.demo import explain_parting
from eyas.decode.sequence import Result
from eyas.engine import Engine
from eyas.files.adapted import load_adapted
from eyas.files.target import load_target
from eyas.files.tokenizer import load_tokenizer
from eyas.kernels import native
from eyas.model.exactness import CONDITIONS, why_texts_may_part
from tests.tiny import randomize, save_tiny_target, tiny_target

ROOT = Path(__file__).parents[2]


def test_the_readme_says_the_conditions():
    assert CONDITIONS in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_our_own_blocks_are_exact_where_the_kernel_runs_all_of_them():
    exact = why_texts_may_part(tiny_target(dtype=torch.bfloat16)) is None
    assert exact == (native.kernel() is not None)
    assert why_texts_may_part(tiny_target(dtype=torch.float64)) == "not all of it runs in the native kernel here"


def test_a_target_of_transformers_is_not(tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = hf.AutoModelForCausalLM.from_config(hf.GPTNeoXConfig(**shape))
    randomize(network)
    network.save_pretrained(tmp_path)
    assert why_texts_may_part(load_adapted(tmp_path, torch.bfloat16).prepare()) == "this target runs through transformers"


def test_the_demo_gives_that_reason_where_texts_part(tmp_path):
    target = save_tiny_target(tmp_path)
    engine = Engine(load_target(target, "fp32"), load_tokenizer(target), target, None, "fp32")
    one, other = (Result.__new__(Result) for _ in range(2))
    for result, tokens in ((one, [1, 2]), (other, [1, 3])):
        object.__setattr__(result, "tokens", tokens)
    reason = why_texts_may_part(engine.target)
    said = explain_parting(engine, engine.encode("hi"), one, other, "fp32")
    assert "They part at token 2" in said and (f"rounds differently ({reason})" in said if reason else "Please report it" in said)
