"""A layer as one native call is the plain layer, and a row of a pass is to the last bit the row it would be alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from eyas.kernels import native
from eyas.kernels.linear import Dense
from eyas.model.cache import KVCache
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.target import Target
from tests.tiny import tiny_draft, tiny_target

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler: the plain layers are all there is")
TAPS = (1, 2, 4)
PARENTS = [-1, 0, 0, 1, 1, 2, 3]
FORMATS = [torch.float32, torch.bfloat16]
SHAPES = [  # norms of queries and keys, as Qwen3 has; head widths and sizes that are no multiple of 8; seven query heads to a key head
    {"qk_norm": True},
    {"head_dim": 100},
    {"head_dim": 12, "hidden_size": 42, "intermediate_size": 54},
    {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 6},
]


def target(dtype: torch.dtype, plain: bool = False, bits: int = 16, **changes) -> Target:
    """A tiny target whose weights bfloat16 can hold, so that the kernel takes them at either precision."""
    sizes = {"head_dim": 8, "intermediate_size": 64 if bits < 16 else 48}
    made = tiny_target(prepare=False, dtype=torch.float32, **sizes | changes).to(torch.bfloat16).to(dtype).prepare(bits)
    if plain:
        made.native = None
    return made


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 53, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"attention_bias": True, "attention_out_bias": True}, {"tie_word_embeddings": True}, *SHAPES],
)
def test_native_layers_are_the_plain_layers(dtype, changes):
    fast, slow = target(dtype, **changes), target(dtype, plain=True, **changes)
    assert fast.native and not slow.native
    caches = [each.new_cache(2, 64) for each in (fast, slow)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    for rows in (chain_rows(0, prompt(20), 0), chain_rows(1, prompt(30, 1), 0)):
        outs = [each(rows, cache, TAPS) for each, cache in zip((fast, slow), caches)]
        for cache in caches:
            cache.keep(rows.segments[0].slot, range(rows.segments[0].count))
        for ours, theirs in zip(*outs):
            assert ours.dtype == theirs.dtype
            assert_close(ours, theirs, **tolerance)
    assert_close(caches[0].keys.float(), caches[1].keys.float(), **tolerance)


@pytest.mark.parametrize("bits", [8, 4])
def test_native_layers_of_few_bits_are_the_plain_layers_with_those_weights(bits):
    fast, slow = target(torch.float32, bits=bits), target(torch.float32, bits=bits, plain=True)
    assert fast.native and {dense.weight.bits for dense in products(fast)} == {bits} and fast.head.weight.bits == 8
    rows = chain_rows(0, prompt(20), 0)
    for ours, theirs in zip(*(each(rows, each.new_cache(1, 32), TAPS) for each in (fast, slow))):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def products(model: Target) -> list[Dense]:
    return [
        dense
        for block in model.blocks
        for part in (block.self_attn, block.mlp)
        for dense in vars(part).values()
        if isinstance(dense, Dense)
    ]


FEW_BITS = [(torch.bfloat16, 8, {}), (torch.bfloat16, 4, {})]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "bits", "changes"), [*((each, 16, shape) for each in FORMATS for shape in ({}, *SHAPES)), *FEW_BITS])
def test_a_tree_beside_another_text_gives_the_bits_of_plain_decoding(dtype, bits, changes, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, guesses = target(dtype, bits=bits, **changes), prompt(len(PARENTS), 5)

        def read() -> object:
            cache = model.new_cache(2, 64)
            for slot, length in ((0, 9), (1, 33)):
                model(chain_rows(slot, prompt(length, slot), 0), cache)
                cache.keep(slot, range(length))
            return cache

        depths = [0, 1, 1, 2, 2, 2, 3]
        positions = torch.tensor([9, *(33 + depth for depth in depths)])
        rows = Rows(torch.tensor([7, *guesses]), positions, [Segment(0, 1), Segment(1, len(PARENTS), ancestor_mask(PARENTS))])
        together = model(rows, read(), TAPS)
        cache = read()
        for place, row in enumerate((0, 1, 3, 6)):  # a path of the tree, one token a pass
            alone = model(chain_rows(1, [guesses[row]], 33 + place), cache, TAPS)
            cache.keep(1, [0])
            for ours, theirs in zip(alone, together):
                assert torch.equal(ours[0], theirs[row + 1])
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_cannot_run_is_left_to_the_plain_layers():
    assert not tiny_target(dtype=torch.float32).native  # weights that bfloat16 cannot hold


def test_other_default_formats_of_the_users_do_not_reach_the_kernel():
    model = target(torch.float32)
    want = model(chain_rows(0, prompt(9), 0), model.new_cache(1, 16)).logits
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(chain_rows(0, prompt(9), 0), model.new_cache(1, 16)).logits, want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_drafts_native_layers_are_its_plain_ones(dtype, layers):
    def network(plain: bool):
        loose = tiny_target(prepare=False, dtype=torch.float32, head_dim=8)
        made, _ = tiny_draft(loose, draft_layers=layers)
        made = made.to(torch.bfloat16).to(dtype).prepare()
        if plain:
            made.native = []
        return made

    fast, slow = network(False), network(True)
    assert fast.native and not slow.native
    config, draw = fast.config, torch.Generator().manual_seed(3)
    g = torch.randn(5, config.hidden_size, generator=draw).to(dtype)
    outs = []
    for each in (fast, slow):
        cache = KVCache(layers, 1, 16, config.num_key_value_heads, config.head_dim, dtype, torch.device("cpu"))
        attention = cache.attention([Segment(0, 5)], config.num_attention_heads // config.num_key_value_heads)
        outs.append(each.step(torch.tensor(prompt(5)), g, torch.arange(5), attention))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    assert_close(*(out.to(dtype) for out in outs), **tolerance)
