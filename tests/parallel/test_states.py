"""States over parts of the keys meet as the state over all of them: softmax is not changed by being taken in parts."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

from eyas.kernels import native
from eyas.kernels.attention import attention_with_lse
from eyas.parallel.layout import Layout
from eyas.parallel.schedules import NativeJoin
from eyas.parallel.states import empty, join, meet

R, H, D, KEYS = 3, 4, 6, 29


def drawn(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((R, H, D), (2, KEYS, D), (2, KEYS, D)))
    return q * spread, k, v


def state(q, k, v, keys: list[int]) -> torch.Tensor:
    if not keys:
        return empty(R, H, D, q)
    out, lse = attention_with_lse(q, k[:, keys], v[:, keys])
    return torch.cat([out.view(R, H, D), lse[..., None]], -1)


def parts(shards: int, spread: float = 1.0) -> tuple[dict, torch.Tensor]:
    """States of keys dealt out at random, some shards without any; and softmax over all keys."""
    q, k, v = drawn(spread)
    dealt: list[list[int]] = [[] for _ in range(shards)]
    for key in range(KEYS):
        dealt[min(random.Random(key).choice([0, 1, 2, shards]), shards - 1)].append(key)
    whole, _ = attention_with_lse(q, k, v)
    return {(number, 1): state(q, k, v, keys) for number, keys in enumerate(dealt)}, whole.view(R, H, D)


def test_states_of_parts_meet_as_softmax_over_the_whole():
    for shards in (2, 8, 16):
        for spread in (1.0, 3000.0):  # scores of thousands neither overflow nor vanish
            known, whole = parts(shards, spread)
            found = join(known, 0, shards)
            assert found is not None
            assert_close(found[..., :D], whole, rtol=1e-11, atol=1e-12)


def test_shards_may_meet_in_any_order_up_to_rounding_and_in_one_order_to_the_last_bit():
    known, _ = parts(8)
    wanted = join(known, 0, 8)
    assert wanted is not None
    for seed in range(20):
        left = list(known.values())
        while len(left) > 1:
            one, other = (left.pop(random.Random(seed).randrange(len(left))) for _ in range(2))
            left.append(meet(one, other))
        assert_close(left[0], wanted, rtol=1e-10, atol=1e-12)
    subtrees = {(0, 2): join(known, 0, 2), (2, 1): known[2, 1], (3, 1): known[3, 1], (4, 4): join(known, 4, 4)}
    assert torch.equal(join({key: each for key, each in subtrees.items() if each is not None}, 0, 8), wanted)


def test_what_saw_no_key_changes_no_bit():
    known, _ = parts(8)
    nothing = empty(R, H, D, known[0, 1])
    assert torch.equal(meet(known[0, 1], nothing), known[0, 1]) and torch.equal(meet(nothing, known[0, 1]), known[0, 1])
    assert torch.equal(meet(nothing, nothing), nothing), "and no NaN comes of nothing"
    seen = {key: each for key, each in known.items() if not torch.isinf(each[..., -1]).all()}
    assert len(seen) < len(known) and torch.equal(join(seen, 0, 8), join(known, 0, 8))
    assert join({}, 0, 8) is None


@pytest.mark.skipif(native.kernel() is None, reason="there is no kernel here")
def test_the_kernels_states_may_meet_in_any_order_up_to_rounding_and_in_one_order_to_the_last_bit():
    for spread in (1.0, 3000.0):
        known, whole = parts(8, spread)
        states = torch.stack([*known.values()]).float()
        every = [(number, 1) for number in range(8)]
        (wanted,) = NativeJoin(8)(states, every, [(0, 8)])
        assert_close(wanted[..., :D].double(), whole, rtol=1e-4, atol=1e-5)
        orders = set()
        for seed in range(40):
            draw, left = random.Random(seed), [*states]
            while len(left) > 1:
                pair = [left.pop(draw.randrange(len(left))) for _ in range(2)]
                left += NativeJoin(2)(torch.stack(pair), [(0, 1), (1, 1)], [(0, 2)])
            assert_close(left[0], wanted, rtol=1e-4, atol=1e-5)
            orders.add(tuple(left[0].flatten().tolist()))
        assert len(orders) > 1 or spread > 1, "so the order is not indifferent where several keys count"
        for count in range(1, 9):  # whoever joins what, if it is along the tree
            own = [subtree for rank in range(count) for subtree in Layout(8).subtrees(*Layout(8).range_of(rank, count))]
            assert torch.equal(NativeJoin(8)(NativeJoin(8)(states, every, own), own, [(0, 8)])[0], wanted)
