"""A target whose rows see a window says of every row what a text of its own would, however rows are grouped into passes."""

from __future__ import annotations

import pytest
import torch

from eyas.config import Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.model.cache import KVCache
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.window import WindowedCache
from tests.model.test_target import PARENTS, alone, assert_same, branch, prefilled, rows_of, text
from tests.tiny import tiny_draft, tiny_target

WINDOW = 6


def windowed(**changes):
    return tiny_target(sliding_window=WINDOW, **changes)


def test_a_row_forgets_what_lies_before_its_window():
    """Five layers of windows of six reach 26 positions back; the first token of a longer text changes nothing, the last but 25 does."""
    target, tokens = windowed(), text(40)
    assert torch.equal(alone(target, [1, *tokens[1:]]).logits[-1], alone(target, [2, *tokens[1:]]).logits[-1])
    changed = [*tokens[:14], (tokens[14] + 1) % 53, *tokens[15:]]
    assert not torch.equal(alone(target, changed).logits[-1], alone(target, tokens).logits[-1])
    assert not torch.allclose(alone(target, tokens).logits[-1], alone(tiny_target(), tokens).logits[-1])


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [11, 1], [1, 3, 8]])
def test_chunked_prefill_is_one_pass(chunks):
    target, tokens = windowed(), text(12)
    whole, cache, start = alone(target, tokens), target.new_cache(1, 12), 0
    for count in chunks:
        rows = slice(start, start + count)
        assert_same(target(chain_rows(0, tokens[rows], start), cache, (1, 2, 4)), slice(None), whole, rows)
        cache.keep(0, range(count))
        start += count


@pytest.mark.parametrize("age", [0, 4, 15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_a_tree_says_what_its_branch_alone_says(age, dtype):
    """Beside it single rows of four other sequences, which PyTorch would read as one product."""
    target, prompt, guesses = windowed(dtype=dtype), text(age, seed=1), text(len(PARENTS), seed=2)
    cache = prefilled(target, [prompt, *(text(9, seed=9 + slot) for slot in range(4))])
    output = target(rows_of(cache, (0, guesses, PARENTS), *((1 + slot, [slot]) for slot in range(4))), cache, (1, 2, 4))
    close = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-4}
    for row in range(len(PARENTS)):
        assert_same(output, row, alone(target, [*prompt, *(guesses[r] for r in branch(PARENTS, row))]), -1, **close)
    for slot in range(4):
        assert_same(output, len(PARENTS) + slot, alone(target, [*text(9, seed=9 + slot), slot]), -1, **close)


@pytest.mark.parametrize("path", [[0, 1, 3, 6], [0, 2, 5, 8], []])
def test_after_keep_the_next_pass_is_that_of_the_kept_text(path):
    target, prompt, guesses = windowed(), text(9, seed=1), text(len(PARENTS), seed=2)
    cache = prefilled(target, [text(3, seed=9), prompt])
    target(rows_of(cache, (1, guesses, PARENTS)), cache)
    cache.keep(1, path)
    kept = [*prompt, *(guesses[row] for row in path)]
    output = target(rows_of(cache, (1, text(4, seed=3), [-1, 0, 0, 2])), cache, (1, 2, 4))
    for row, tail in enumerate([[0], [0, 1], [0, 2], [0, 2, 3]]):
        assert_same(output, row, alone(target, kept + [text(4, seed=3)[r] for r in tail]), -1)


def test_a_tree_read_level_by_level_is_the_tree():
    """Earlier levels are committed, so rows of one position lie at several places."""
    target, prompt, guesses, parents = windowed(), text(9, seed=1), text(8, seed=2), [-1, 0, 0, 1, 1, 2, 3, 5]
    cache, start = prefilled(target, [prompt]), 0
    mask = torch.zeros(8, 8, dtype=torch.bool)
    for row in range(8):
        mask[row, branch(parents, row)] = True
    for depth, end in enumerate([1, 3, 6, 8]):
        positions = torch.full((end - start,), len(prompt) + depth)
        rows = Rows(torch.tensor(guesses[start:end]), positions, [Segment(0, end - start, mask[start:end, :end])])
        output = target(rows, cache, (1, 2, 4))
        for row in range(start, end):
            assert_same(output, row - start, alone(target, [*prompt, *(guesses[r] for r in branch(parents, row))]), -1)
        cache.keep(0, range(end - start))
        start = end


def test_a_prefix_may_come_from_a_cache_too_small_to_need_positions():
    target, tokens = windowed(), text(12)
    small = prefilled(target, [tokens[:5]], capacity=WINDOW)
    assert isinstance(small, KVCache) and not isinstance(small, WindowedCache)
    cache = target.new_cache(2, 12)
    assert isinstance(cache, WindowedCache)
    cache.copy_prefix(small, 0, 1, 5)
    target(chain_rows(1, tokens[5:9], 5), cache)
    cache.keep(1, range(4))
    cache.copy_prefix(cache, 1, 0, 7)
    for slot, start in ((1, 9), (0, 7)):
        output = target(chain_rows(slot, tokens[start:], start), cache, (1, 2, 4))
        assert_same(output, slice(None), alone(target, tokens), slice(start, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_leaves_the_text_as_it_is(dtype, temperature):
    """Beginning inside the window and ending far outside it. In bfloat16 it holds to the last bit, where the native kernel runs."""
    target = windowed(dtype=dtype)
    if dtype == torch.bfloat16 and target.native is None:
        pytest.skip("no native kernel here")
    network, vocab = tiny_draft(tiny_target(prepare=False))
    drafters = {
        "trees": lambda: Eagle3Drafter(network.to(dtype).eval(), vocab),
        "levels": lambda: ModelDrafter(target.shallow(2), target.config.vocab_size),
        "itself": lambda: ModelDrafter(target, target.config.vocab_size),
    }
    written = {}
    for name, drafter in {"plain": lambda: None, **drafters}.items():
        shape = TreeShape.parse("12x3x4" if drafter else "chain:1")
        *_, texts = Decoder(target, drafter()).run([text(4), text(9, seed=1)], shape, Sampling(temperature), [4, 5], 40)
        written[name] = [each.tokens for each in texts]
    assert all(found == written["plain"] for found in written.values()) and len(written["plain"][0]) == 44
