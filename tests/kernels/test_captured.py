"""Passes in fixed shapes give what passes of any shape give, and slabs go from call to call. What CUDA captures, a CPU runs as it is."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.plan import clock
from eyas.decode.plan.planner import FixedPlan
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.model.cache import KEPT, Pool, Slabs
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from tests.tiny import tiny_draft, tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2, 5, 3, 3, 0]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """So that a short text crosses several."""
    monkeypatch.setattr(captured, "WINDOW", 16)


def pooled_target():
    target = tiny_target()
    target.pool = Pool()
    return target


def pooled_draft(target):
    network, vocab = tiny_draft(target)
    network.prepare().pool = Pool()
    return Eagle3Drafter(network, vocab)


def tokens(target, drafter, shape, sampling, new=40, prompts=([1, 2, 3],)):
    *_, texts = Decoder(target, drafter).run(prompts, TreeShape.parse(shape) if drafter else PLAIN, sampling, [5] * len(prompts), new)
    return [text.tokens for text in texts]


@pytest.mark.parametrize("age", [1, 5, 14, 15, 16, 31])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_a_pass_in_fixed_shapes_is_the_pass(age, count):
    plain, fixed = tiny_target(), pooled_target()
    rows = Rows(torch.arange(count) + 7, torch.arange(count) + age, [Segment(0, count, ancestor_mask(PARENTS[:count]))])
    outputs = []
    for target in (plain, fixed):
        cache = target.new_cache(1, 60)
        target(chain_rows(0, list(range(3, 3 + age)), 0), cache)
        cache.keep(0, range(age))
        outputs.append(target(rows, cache, (1, 2, 4)))
    assert captured.fits(cache, rows.segments) and cache.slabs.graphs
    for one, other in zip(*outputs):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-9)


def test_a_mask_that_governs_rows_read_before_is_kept():
    seen, target = torch.tensor([[True, False, True, False], [False, True, False, True]]), pooled_target()
    cache = target.new_cache(1, 30)
    target(chain_rows(0, [4, 5, 6], 0), cache)
    cache.keep(0, range(3))
    rows = Rows(torch.tensor([7, 8]), torch.tensor([2, 2]), [Segment(0, 2, seen)])
    wanted = tiny_target()
    other = wanted.new_cache(1, 30)
    wanted(chain_rows(0, [4, 5, 6], 0), other)
    other.keep(0, range(3))
    assert torch.allclose(target(rows, cache).logits, wanted(rows, other).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)], ids=str)
@pytest.mark.parametrize("shape", ["chain:3", "8x2x3", "60x7x10"])
def test_texts_are_those_of_plain_decoding_call_after_call(shape, sampling):
    target = pooled_target()
    drafter = pooled_draft(target)
    wanted = tokens(tiny_target(), None, "", sampling)
    assert [tokens(target, drafter, shape, sampling) for _ in range(3)] == [wanted] * 3
    assert tokens(target, None, "", sampling) == wanted
    assert tokens(target, ModelDrafter(target.shallow(3), 53), "8x2x3", sampling) == wanted


def test_slabs_of_several_sequences_are_not_kept():
    target, prompts = pooled_target(), ([1, 2, 3], [4, 5])
    wanted = tokens(tiny_target(), None, "", Sampling(), prompts=prompts)
    assert tokens(target, pooled_draft(target), "8x2x3", Sampling(), prompts=prompts) == wanted
    assert not target.pool.idle


def test_slabs_and_what_was_captured_serve_the_next_call():
    target = pooled_target()
    drafter = pooled_draft(target)
    gc.disable()  # slabs go back when their call ends, not when somebody collects
    try:
        tokens(target, drafter, "8x2x3", Sampling())
        assert len(target.pool.idle) == 1
        slabs = target.pool.idle[0]
        before = dict(slabs.graphs)
        tokens(target, drafter, "8x2x3", Sampling())
        assert target.pool.idle == [slabs] and before and slabs.graphs == before
    finally:
        gc.enable()


def test_two_calls_at_once_have_slabs_of_their_own():
    pool = Pool()
    caches = [pool.cache(2, 1, 20, 1, 8, torch.float32, torch.device("cpu")) for _ in range(KEPT + 2)]
    assert len({id(cache.slabs) for cache in caches}) == KEPT + 2
    caches.clear()
    assert len(pool.idle) == KEPT


def test_a_call_takes_the_smallest_slabs_that_hold_its_text():
    pool = Pool()

    def slabs(capacity):
        return pool.cache(2, 1, capacity, 1, 8, torch.float32, torch.device("cpu")).slabs

    held = pool.cache(2, 1, 20, 1, 8, torch.float32, torch.device("cpu"))
    large, small = slabs(90), held.slabs
    del held
    assert [slabs(capacity) for capacity in (10, 31, 32, 95)] == [small, small, large, large]
    assert slabs(200) not in (small, large) and len(pool.idle) == 1  # the others were given up
    assert pool.cache(2, 3, 20, 1, 8, torch.float32, torch.device("cpu")).slabs.keys.shape == (2, 3, 1, 24, 8)
    assert len(pool.idle) == 1  # those of a batch are not kept


def test_slots_have_graphs_of_their_own_and_go_with_their_slabs():
    slabs = Slabs((2, 3, 1, 21, 8), torch.float32, torch.device("cpu"), pooled=True)
    first, second = slabs.of(0), slabs.of(1)
    second.keys[1, 0] = 7
    assert slabs.keys[1, 1].min() == 7 and not slabs.keys[:, [0, 2]].any() and slabs.of(1) is second
    assert first.graphs is not second.graphs and first.memory is second.memory is slabs.memory
    alone = Slabs((2, 1, 1, 21, 8), torch.float32, torch.device("cpu"), pooled=True)
    assert alone.of(0) is alone
    gone = weakref.ref(slabs)
    gc.disable()  # memory of a batch comes back when its call ends, not when somebody collects
    try:
        del slabs
        assert gone() is None
    finally:
        gc.enable()


def test_windows_double_and_end_where_the_slabs_do():
    assert [captured.window_of(keys, 80) for keys in (1, 16, 17, 33, 64, 65, 80)] == [16, 16, 32, 64, 64, 80, 80]


def test_a_round_that_makes_a_graph_is_not_taken_for_a_usual_one(monkeypatch):
    monkeypatch.setattr(clock, "cores_taken", lambda: 0)

    class Counting(FixedPlan):
        served_rounds = 0

        def record(self, *figures):
            self.served_rounds += 1

    target = pooled_target()
    decoder = Decoder(target, plan=Counting())
    *_, texts = decoder.run([[1, 2, 3]], PLAIN, Sampling(), [5], 40)
    assert 0 < texts[0].rounds - decoder.plan.served_rounds <= len(decoder.cache.slabs.graphs)


def test_slabs_made_in_inference_mode_may_be_written_to_outside_it():
    target = pooled_target()
    with torch.inference_mode():
        made = target.new_cache(1, 20).slabs
    cache, plain = target.new_cache(1, 20), tiny_target()
    with torch.no_grad():
        passes = [target(chain_rows(0, [1, 2, 3], 0), cache).logits for _ in range(2)]
        wanted = plain(chain_rows(0, [1, 2, 3], 0), plain.new_cache(1, 20)).logits
    assert cache.slabs is made
    assert all(torch.allclose(logits, wanted, rtol=0, atol=1e-9) for logits in passes)


def test_a_full_cache_is_noticed():
    target = pooled_target()
    cache = target.new_cache(1, 15)
    target(chain_rows(0, [1] * 15, 0), cache)
    cache.keep(0, range(15))
    with pytest.raises(AssertionError, match="holds 15 rows, 16 wanted"):
        target(chain_rows(0, [1], 15), cache)
