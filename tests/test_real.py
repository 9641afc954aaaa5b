"""The real thing: the embedded target and the bundled draft. Fetched on first use; skipped with a reason where that fails."""

from __future__ import annotations

import math

import pytest
import torch

import eyas
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.generate import Decoder
from eyas.decode.sampling import derived_seed
from eyas.decode.tree import Tree
from eyas.engine import Engine
from eyas.files.target import load_target
from eyas.kernels import native
from eyas.model.rows import chain_rows

pytestmark = pytest.mark.real
EXACT = native.kernel() is not None  # a row's result does not depend on its pass
needs_kernel = pytest.mark.skipif(not EXACT, reason="without the native kernel a pass of another shape rounds differently")
SUBJECTS = ("hawks", "rivers", "bread", "clocks", "the moon", "chess", "glass", "bees", "maps", "violins")
FRAMES = (
    "Tell me three facts about {}.",
    "Write a short poem about {}.",
    "What would a child of six ask about {}, and what is the answer?",
    "Write a Python function whose name has to do with {} and explain it.",
    "Compare {} with something very different, step by step: 1, 2, 3.",
)
PROMPTS = [frame.format(subject) for subject in SUBJECTS for frame in FRAMES]
SOME = PROMPTS[::2][:14]  # benchmarks/sameness.py reads hundreds
FEW = PROMPTS[::3][:15]
TREE = TreeShape(8, 3, 3)


@pytest.fixture(scope="module")
def fp32(embedded) -> Engine:
    return eyas.load(precision="fp32")


@pytest.fixture(scope="module")
def bf16(embedded) -> Engine:
    return eyas.load(precision="bf16")


def texts(engine: Engine, drafter, shape: TreeShape, sampling: Sampling, prompts, tokens: int) -> list[list[int]]:
    """All prompts, 25 a batch."""
    found: list[list[int]] = []
    for first in range(0, len(prompts), 25):
        encoded = [engine.encode(prompt) for prompt in prompts[first : first + 25]]
        seeds = [derived_seed(11, first + i) for i in range(len(encoded))]
        *_, everyone = Decoder(engine.target, drafter).run(encoded, shape, sampling, seeds, tokens)
        found += [text.tokens[text.prompt_length :] for text in everyone]
    return found


def test_fp32_logits_are_transformers_logits(embedded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    target = load_target(embedded, "fp32").prepare()
    for prompt in PROMPTS[:5]:
        ids = tokenizer(prompt + " 1, 2 and 34; def f(x): return x\n")["input_ids"]
        with torch.inference_mode():
            ours = target(chain_rows(0, ids, 0), target.new_cache(1, len(ids))).logits
            wanted = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-3)
        assert torch.equal(ours.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fp32_text_of_eagle3_is_plain_text(fp32, temperature):
    sampling = Sampling(temperature)
    plain = texts(fp32, None, PLAIN, sampling, FEW, 32)
    assert texts(fp32, fp32.drafter("eagle3"), TREE, sampling, FEW, 32) == plain


def test_the_bundled_draft_accepts(fp32):
    results = fp32.generate(PROMPTS[:6], tree="60x7x10", max_new_tokens=48)
    assert sum(result.tau for result in results) / len(results) > 1.5


class Padding:
    """Plain decoding in passes of a tree's row count: the rows beyond the root are guesses that nobody wants."""

    wants: tuple[int, ...] = ()

    def reserve(self, sequences, capacity):
        pass

    def observe(self, sequence, tokens, features):
        pass

    def propose(self, requests: list[TreeRequest]) -> list[Tree]:
        rows = TREE.nodes - 1
        return [Tree([r.root, *range(rows)], [-1] + [0] * rows, [0] + [1] * rows, [0.0] + [-9.0] * rows) for r in requests]

    def forget(self, sequence):
        pass


def divergences(one: list[list[int]], other: list[list[int]]) -> list[tuple[int, int]]:
    """(prompt, place) of each first difference."""
    found = []
    for prompt, (a, b) in enumerate(zip(one, other)):
        place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if place is not None:
            found.append((prompt, place))
    return found


@needs_kernel
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bf16_text_of_eagle3_is_plain_text_under_the_native_kernel(bf16, temperature):
    """Every row of a pass is computed in an order of its own, so lower precision costs no sameness."""
    sampling = Sampling(temperature)
    plain = texts(bf16, None, PLAIN, sampling, SOME, 32)
    assert texts(bf16, bf16.drafter("eagle3"), TREE, sampling, SOME, 32) == plain
    assert texts(bf16, bf16.drafter("eagle3+copy"), TREE, sampling, SOME[:10], 32) == plain[:10]
    assert texts(bf16, bf16.drafter("lookup"), TreeShape.chain(5), sampling, SOME[:10], 32) == plain[:10]


@needs_kernel
@pytest.mark.parametrize("precision", ["int8", "q4"])
def test_text_at_few_bits_is_plain_text_of_the_same_bits(embedded, precision):
    engine = eyas.load(precision=precision)
    for sampling in (Sampling(), Sampling(1.0)):
        plain = texts(engine, None, PLAIN, sampling, PROMPTS[:8], 24)
        assert texts(engine, engine.drafter("eagle3"), TREE, sampling, PROMPTS[:8], 24) == plain


@pytest.mark.skipif(EXACT, reason="the native kernel gives equal texts: tested above")
def test_bf16_parts_from_plain_no_more_than_another_pass_shape_does(bf16):
    """The rule where a library's kernels sum in other orders for other shapes: speculation may cost no more than padding a pass does."""
    tokens, sampling = 40, Sampling()
    plain = texts(bf16, None, PLAIN, sampling, PROMPTS, tokens)
    padded = texts(bf16, Padding(), TREE, sampling, PROMPTS, tokens)
    fast = texts(bf16, bf16.drafter("eagle3"), TREE, sampling, PROMPTS, tokens)
    total = sum(map(len, plain))
    by_padding, by_trees = divergences(plain, padded), divergences(plain, fast)
    by_chance = 2 * math.sqrt(len(by_trees) + 1.5**2 * len(by_padding))  # both are small counts: two standard deviations of the difference
    print(f"first divergences per 1,000 tokens: padding {1000 * len(by_padding) / total:.2f}, trees {1000 * len(by_trees) / total:.2f}")
    assert len(by_trees) <= 1.5 * len(by_padding) + by_chance
    limit = logit_change(bf16, plain)
    for prompt, place in by_trees:
        ids = bf16.encode(PROMPTS[prompt]) + plain[prompt][:place]
        with torch.inference_mode():
            logits = bf16.target(chain_rows(0, ids, 0), bf16.target.new_cache(1, len(ids)), (), slice(-1, None)).logits[0]
        gap = abs(float(logits[plain[prompt][place]] - logits[fast[prompt][place]]))
        assert gap <= limit, f"{PROMPTS[prompt]!r} parts at {place} over a gap of {gap:.3f}, more than rounding explains ({limit:.3f})"


def logit_change(engine: Engine, plain: list[list[int]]) -> float:
    """99.9th percentile of how far a logit moves between passes of one row and of a tree's row count."""
    changes = []
    for prompt, text in list(zip(PROMPTS, plain))[:10]:
        ids = engine.encode(prompt) + text
        with torch.inference_mode():
            whole = engine.target(chain_rows(0, ids, 0), engine.target.new_cache(1, len(ids))).logits
            cache, parts = engine.target.new_cache(1, len(ids)), []
            for start in range(len(ids)):
                parts.append(engine.target(chain_rows(0, ids[start : start + 1], start), cache).logits)
                cache.keep(0, [0])
        likeliest = whole.topk(8, -1).indices  # the tokens that could win
        changes.append((whole.gather(1, likeliest) - torch.cat(parts).gather(1, likeliest)).abs().flatten())
    ordered = torch.cat(changes).sort().values
    return 2 * float(ordered[math.ceil(0.999 * (len(ordered) - 1))])  # a gap is between two logits, and both move
