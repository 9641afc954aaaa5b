"""The native attention is PyTorch's attention, and a row's result is its own: no other row of the pass changes a bit of it."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from eyas.kernels import native
from eyas.kernels.attention import NativeAttention
from eyas.model import attention
from eyas.model.attention import PlainAttention
from eyas.model.cache import KVCache
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Segment

needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="no C compiler: the plain attention is all there is")
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]  # a tree behind the committed rows
FORMATS = [torch.float32, torch.bfloat16]


def filled_cache(dtype: torch.dtype, lengths: list[int], heads: int = 2, d: int = 16, capacity: int = 320) -> KVCache:
    cache = KVCache(2, len(lengths), capacity, heads, d, dtype, torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    for slab in (cache.keys, cache.values):
        slab.copy_(torch.randn(slab.shape, generator=draw))
    cache.lengths = list(lengths)
    return cache


def rows(count: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, d: int = 16, seed: int = 2) -> tuple[torch.Tensor, ...]:
    """q, k, v as the model hands them over: views of wider rows."""
    draw = torch.Generator().manual_seed(seed)
    whole = (2 * torch.randn(count, heads + 2 * kv_heads, d, generator=draw)).to(dtype)
    return whole[:, :heads], whole[:, heads : heads + kv_heads], whole[:, heads + kv_heads :]


@needs_kernel
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("d", [8, 16, 64, 72, 128])
def test_native_is_pytorchs_attention(dtype, d):
    """Ragged lengths, one sequence's prefill, one's single row, one's tree of which an earlier level is in the cache already."""
    tree = ancestor_mask(PARENTS)
    segments = [Segment(0, 5), Segment(2, 1), Segment(1, 5, tree[3:]), Segment(3, 1, torch.tensor([[True, False, True]]))]
    plain_cache, native_cache = (filled_cache(dtype, [0, 140, 300, 17], d=d) for _ in range(2))
    for layer in range(2):
        q, k, v = rows(12, dtype, d=d, seed=layer)
        want = PlainAttention(plain_cache, segments, 3).layer(layer)(q, k, v)
        got = NativeAttention(native_cache, segments).layer(layer)(q, k, v)
        assert got.dtype == dtype and got.shape == (12, 6 * d)
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        assert_close(got, want, **tolerance)
    assert torch.equal(native_cache.keys, plain_cache.keys) and torch.equal(native_cache.values, plain_cache.values)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("path", [[0], [0, 1, 4], [0, 1, 3, 6, 7], [0, 2, 5]])
def test_a_trees_row_is_to_the_last_bit_the_row_of_the_plain_text(dtype, path, threads):
    """The path's rows read one by one behind the prompt, and as rows of a tree with its other branches and another sequence beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = rows(len(PARENTS) + 1, dtype)
        cache = filled_cache(dtype, [33, 250])
        beside = NativeAttention(cache, [Segment(0, 1), Segment(1, len(PARENTS), ancestor_mask(PARENTS))]).layer(0)(q, k, v)[1:]
        cache = filled_cache(dtype, [33, 250])
        for row in path:
            alone = slice(row + 1, row + 2)
            got = NativeAttention(cache, [Segment(1, 1)]).layer(0)(q[alone], k[alone], v[alone])
            cache.keep(1, [0])
            assert torch.equal(got[0], beside[row])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_scores_far_apart_are_no_trouble():
    cache = filled_cache(torch.float32, [9])
    q, k, v = rows(1, torch.float32)
    for factor in (0.0, 100.0, 3000.0):
        want = PlainAttention(cache, [Segment(0, 1)], 3).layer(0)(q * factor, k, v)
        assert_close(NativeAttention(cache, [Segment(0, 1)]).layer(0)(q * factor, k, v), want, rtol=1e-4, atol=1e-4)


@needs_kernel
def test_a_full_slot_says_so():
    cache = filled_cache(torch.float32, [319])
    with pytest.raises(AssertionError, match="slot 0 holds 320 rows, 321 wanted"):
        NativeAttention(cache, [Segment(0, 2)])


@pytest.mark.parametrize("cls", [PlainAttention, pytest.param(NativeAttention, marks=needs_kernel)])
def test_parts_of_the_keys_merge_by_their_log_sum_exp(cls):
    """Attention over keys held in two caches, merged by lse, is attention over all of them in one: what sharding over devices needs."""
    whole, q = filled_cache(torch.float32, [20], capacity=32), rows(1, torch.float32)[0]
    outs, lses = [], []
    for edges in itertools.pairwise([0, 8, 20]):
        part = KVCache(1, 1, 32, 2, 16, torch.float32, torch.device("cpu"))
        held = slice(*edges)
        part.keys[0, 0, :, : edges[1] - edges[0]] = whole.keys[0, 0, :, held]
        part.values[0, 0, :, : edges[1] - edges[0]] = whole.values[0, 0, :, held]
        part.lengths = [edges[1] - edges[0] - 1]
        last = slice(edges[1] - edges[0] - 1, edges[1] - edges[0])
        k, v = part.keys[0, 0, :, last].transpose(0, 1).clone(), part.values[0, 0, :, last].transpose(0, 1).clone()
        told: list[torch.Tensor] = []
        outs.append(make(cls, part, [Segment(0, 1)], told)(q, k, v))
        lses += told
    whole.lengths = [19]
    k, v = whole.keys[0, 0, :, 19:20].transpose(0, 1).clone(), whole.values[0, 0, :, 19:20].transpose(0, 1).clone()
    want = make(cls, whole, [Segment(0, 1)], [])(q, k, v)
    shares = torch.stack(lses).softmax(0).repeat_interleave(16, -1)
    assert_close((shares * torch.stack(outs)).sum(0), want, rtol=1e-5, atol=1e-5)


def make(cls, cache, segments, lses):
    attention = cls(cache, segments, lses) if cls is NativeAttention else cls(cache, segments, 3, lses)
    return attention.layer(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_prompts_padded_together_are_prompts_one_by_one(dtype, monkeypatch):
    """Beside a tree, a prompt's later part and a single row, which are computed as ever; the cache holds the same."""
    tree = ancestor_mask(PARENTS)
    segments = [Segment(3, 9), Segment(0, 8, tree), Segment(2, 12), Segment(1, 1), Segment(4, 5), Segment(5, 7)]
    results = []
    for counts in (False, True):
        monkeypatch.setattr(attention, "launches_count", lambda device, counts=counts: counts)
        cache = filled_cache(dtype, [20, 30, 0, 0, 11, 0])
        parts = PlainAttention(cache, segments, 3)
        assert [type(each) for each in parts.padded] == ([attention.Prompts] if counts else []) and len(parts.loose) == (3 if counts else 6)
        q, k, v = (each.to(dtype) for each in rows(42, torch.float32))
        results.append((parts.layer(1)(q, k, v), cache.keys.clone(), cache.values.clone()))
    (ours, *held), (theirs, *wanted) = results
    assert_close(ours, theirs, **({"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}))
    assert all(map(torch.equal, held, wanted)) and wanted[0][1, 2, :, :12].any()


@pytest.mark.parametrize(("counts", "padded"), [([9, 12, 7], True), ([9], False), ([2, 3, 90], False), ([40, 90], True), ([9, 1], False)])
def test_prompts_are_padded_where_there_are_several_of_about_one_length(counts, padded):
    cache = filled_cache(torch.float32, [0] * len(counts))
    assert attention.whole_prompts(cache, [Segment(slot, count) for slot, count in enumerate(counts)]) == list(range(len(counts))) * padded
