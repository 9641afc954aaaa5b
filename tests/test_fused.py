"""Claims about the kernels of a GPU's small passes: each computes what its plain twin does. Here Triton's interpreter runs them, where
Triton is there; tests/test_gpu.py runs them on a card."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from eyas.config import Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.philox import wrapped
from eyas.decode.sampling import uniforms
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import fused
from eyas.kernels.attention import grouped_attention
from eyas.model.cache import Pool
from eyas.model.transformer import rotate
from tests.tiny import tiny_draft, tiny_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # must be set before Triton is imported
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="neither a CUDA device nor TRITON_INTERPRET=1"),
]
NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
FORMATS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 576), (33, 4096)])
def test_a_sum_and_its_norm(rows, width, dtype):
    x, added, weight = drawn(rows, width, dtype=dtype), drawn(rows, width, dtype=dtype).flip(0), drawn(width, dtype=dtype)
    total, normed = fused.added_norm(x, added, weight, 1e-5)
    assert_close(total, x + added, rtol=0, atol=0)
    assert_close(normed, F.rms_norm(x + added, (width,), weight, 1e-5), **NEAR[dtype])


@pytest.mark.parametrize(("purpose", "stream"), [(0, 0), (3, 2**33)])
@pytest.mark.parametrize("count", [1, 3, 4, 13, 2050])
def test_random_numbers_to_the_last_bit(count, purpose, stream):
    seeds, positions = [0, 1, 2**53 - 1, 2**63, 2**64 - 1], [0, 5, 131071, 2**31, 2**40 + 3]
    keys = torch.tensor([wrapped(seed) for seed in seeds], device=DEVICE), torch.tensor(positions, device=DEVICE)
    for row, *key in zip(fused.uniforms(*keys, count, purpose, stream).cpu(), seeds, positions):
        assert (row.numpy() == uniforms(*key, count, purpose, stream)).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "inner"), [(1, 48), (7, 1536), (64, 3000)])
def test_a_gate(rows, inner, dtype):
    x = drawn(rows, 2 * inner, dtype=dtype)
    gate, up = x.chunk(2, -1)
    assert_close(fused.gated(x), F.silu(gate) * up, **NEAR[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("query_heads", "kv_heads", "width", "turned"), [(9, 3, 64, 64), (4, 2, 16, 8), (32, 8, 128, 128)])
@pytest.mark.parametrize("rows", [1, 6])
def test_heads_are_turned_and_kept_and_attend(query_heads, kv_heads, width, turned, rows, dtype):
    """Rotation, keys and values in their places, and attention over windows of one part and of many."""
    heads = drawn(rows, query_heads + 2 * kv_heads, width, dtype=dtype)
    cos, sin = drawn(rows, 1, turned, dtype=dtype), drawn(rows, 1, turned, dtype=dtype).flip(-1)
    keys, values = drawn(kv_heads, 1100, width, dtype=dtype), drawn(kv_heads, 1100, width, dtype=dtype).flip(1)
    wanted_keys, wanted_values = keys.clone(), values.clone()
    places = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:rows].to(DEVICE)
    q = fused.turned_and_kept(heads, (cos, sin), keys, values, places)
    turned_heads = rotate(heads[:, : query_heads + kv_heads], cos, sin)
    wanted_keys[:, places] = turned_heads[:, query_heads:].transpose(0, 1)
    wanted_values[:, places] = heads[:, query_heads + kv_heads :].transpose(0, 1)
    assert_close(keys, wanted_keys, **NEAR[dtype])
    assert_close(values, wanted_values, rtol=0, atol=0)
    assert_close(q.view(kv_heads, -1, rows, width).permute(2, 0, 1, 3).flatten(1, 2), turned_heads[:, :query_heads], **NEAR[dtype])
    for window in (64, 100, 1024):
        seen = torch.rand(rows, window, generator=torch.Generator().manual_seed(window)).to(DEVICE) < 0.3
        seen[:, window // 3] = True
        seen[:, window // 2 :] &= torch.arange(rows, device=DEVICE)[:, None] % 2 == 0  # whole parts that a row does not see
        bias = torch.zeros(seen.shape, dtype=dtype, device=DEVICE).masked_fill(~seen, float("-inf"))
        wanted = grouped_attention(
            turned_heads[:, :query_heads], keys[:, :window], values[:, :window], bias.repeat(query_heads // kv_heads, 1)
        )
        assert_close(fused.attention(q, keys, values, seen), wanted, **NEAR[dtype])


def test_a_rows_sums_do_not_hang_on_the_other_rows():
    keys, values = drawn(2, 900, 32, dtype=torch.float32), drawn(2, 900, 32, dtype=torch.float32).flip(1)
    q = drawn(2, 3 * 5, 32, dtype=torch.float32)
    seen = torch.rand(5, 900, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.5
    together = fused.attention(q, keys, values, seen)
    alone = fused.attention(q.view(2, 3, 5, 32)[:, :, 2].contiguous(), keys, values, seen[2:3].contiguous())
    assert_close(together[2:3], alone, rtol=1e-6, atol=1e-6)


def test_rounds_by_these_kernels_give_the_text_of_pytorchs_operations(monkeypatch):
    """Target and draft, in passes of fixed shapes; heads of 16, half of which are turned."""

    def tokens(by_kernels: bool) -> list[int]:
        monkeypatch.setattr(fused, "suits", lambda x: by_kernels and x.shape[0] <= fused.ROWS and not torch.is_grad_enabled())
        target = tiny_target(dtype=torch.float32, prepare=False, head_dim=16).to(DEVICE)
        network, vocab = tiny_draft(target)
        drafter = Eagle3Drafter(network.float().to(DEVICE).prepare(), vocab)
        target.prepare()
        target.pool, drafter.network.pool = Pool(), Pool()
        *_, texts = Decoder(target, drafter).run([[1, 2, 3]], TreeShape.parse("8x2x3"), Sampling(), [0], 8)
        return texts[0].tokens

    assert tokens(True) == tokens(False)


def test_without_a_card_nothing_is_fused():
    assert not fused.suits(torch.zeros(2, 8))
    assert fused.suits_heads(128, 128) and fused.suits_heads(64, 32) and not fused.suits_heads(80, 80)
