"""A process's keys taken together, as on CUDA: the text of plain decoding, in fixed shapes or any, alone and with other processes.

On a CPU the same code runs as on CUDA, but for the kernel of PyTorch's that computes attention with its log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.testing import assert_close

from eyas.config import EyasError, Sampling
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.kernels.attention import attention_with_lse, library_attention, parted_attention
from eyas.model.cache import Pool, Slabs
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.parallel import together
from eyas.parallel.layout import Layout, Together
from eyas.parallel.peers import Peers, place_of
from eyas.parallel.schedules import Exchange
from eyas.parallel.states import empty, join, merged
from eyas.parallel.target import ShardedTarget, follow
from tests.kernels.test_captured import tokens
from tests.parallel import processes
from tests.parallel.test_processes import followed
from tests.parallel.test_target import DEPTHS, PARENTS, outputs, prompt, target
from tests.tiny import tiny_draft, tiny_target

DEALT = Layout(8, 4)
CALLS = [("8x2x3", Sampling()), ("chain:3", Sampling(1.0)), ("60x7x10", Sampling(1.0))]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """So that a short text crosses several windows, and these fall into parts."""
    monkeypatch.setattr(captured, "WINDOW", 16)
    monkeypatch.setattr(together, "PART", 8)


def of_process(peers: Peers, dtype: torch.dtype = torch.float64, pooled: bool = False, schedule: str = "auto") -> ShardedTarget:
    model = target(dtype)
    model.pool = Pool() if pooled else None
    return ShardedTarget(model, DEALT, peers, schedule, together=True)


def idle_slabs(model: ShardedTarget) -> list[Slabs]:
    assert model.pool
    return model.pool.idle


def passes(model, lengths: Sequence[int] = (3, 29, 3)) -> list[torch.Tensor]:
    """Logits and features along a text, one sequence: a prompt, trees and walks over the edges of blocks and windows, call after call."""
    found = []
    for length in lengths:
        cache = model.new_cache(1, 90)
        model(chain_rows(0, prompt(length, length), 0), cache, (1, 2, 4), slice(-1, None))
        cache.keep(0, range(length))
        for walk in ([0, 2, 5], [0], [0, 1, 3, 6], [0, 2], [0, 1, 3, 6], [0, 1, 4]):
            start = cache.lengths[0]
            rows = Rows(
                torch.tensor(prompt(7, start)), torch.tensor([start + depth for depth in DEPTHS]), [Segment(0, 7, ancestor_mask(PARENTS))]
            )
            out = model(rows, cache, (1, 2, 4))
            found += [out.logits, out.tapped]
            cache.keep(0, walk)
            found.append(model(chain_rows(0, [9], cache.lengths[0]), cache).logits)
            cache.keep(0, [0])
        cache.release()
        del cache
    return found


def assert_near(found, wanted, tolerance: float) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- the kernel and its twin ----


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("parts", [1, 4])
def test_attention_by_parts_is_that_of_its_plain_twin(dtype, tolerance, parts):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in ((3, 6, 16), (2, 99, 16), (2, 99, 16)))
    k, v, hidden = k[:, :64], v[:, :64], torch.arange(64) % 16 >= 13  # of a longer slab; each part leaves some to see
    bias = torch.zeros(64, dtype=dtype).masked_fill(hidden, float("-inf"))
    for given_bias in (None, bias):
        out, lse = parted_attention(q, k, v, given_bias, parts)
        assert out.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for part in range(parts):
            keys = slice(part * 64 // parts, (part + 1) * 64 // parts)
            seen = None if given_bias is None else ~hidden[keys].expand(3, -1)
            wanted, logs = attention_with_lse(q.double(), k[:, keys].double(), v[:, keys].double(), seen)
            assert_close(out[part].double(), wanted.view(3, 6, 16), rtol=tolerance, atol=tolerance)
            assert_close(lse[part].double(), logs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "biased"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_kernels_of_a_card_take_these_arguments_and_give_these_shapes(dtype, biased, monkeypatch):
    monkeypatch.setattr("eyas.kernels.attention.flashes", lambda q: q.dtype == torch.bfloat16)
    made = {name: torch.empty(4, 2, size, 16, dtype=dtype, device="meta") for name, size in (("q", 6), ("k", 32), ("v", 32))}
    bias = torch.empty(4, 1, 1, 32, dtype=dtype, device="meta").expand(-1, 2, 6, -1) if biased else None
    out, lse = library_attention(**made, bias=bias)
    assert out.shape == (4, 2, 6, 16) and lse.shape == (4, 2, 6) and lse.dtype == torch.float32


def test_heads_that_no_kernel_takes_are_computed_plainly(monkeypatch):
    monkeypatch.setattr("eyas.kernels.attention.library_attention", lambda *tensors: pytest.fail("it was asked"))
    q, k = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 6, 12), (2, 32, 12)))
    out, lse = parted_attention(q, k, k, torch.empty(32, device="meta"), 4)
    assert out.shape == (4, 3, 6, 12) and lse.shape == (4, 3, 6) and out.dtype == torch.float32


def test_states_taken_at_once_are_the_states_that_meet_in_pairs():
    draw = torch.Generator().manual_seed(2)
    states = torch.randn(8, 5, 3, 9, generator=draw, dtype=torch.float64) * 50
    states[2] = states[5] = empty(5, 3, 8, states)
    states[:, 0] = empty(1, 3, 8, states)[0]
    wanted = join({(number, 1): state for number, state in enumerate(states)}, 0, 8)
    assert wanted is not None
    assert_close(merged(states), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(merged(states)[0], wanted[0]), "and a row that saw nothing stays one"


# ---- where keys lie ----


@given(some.sampled_from([1, 2, 8, 64]), some.sampled_from([1, 2, 8]), some.integers(0, 900), some.data())
def test_no_process_holds_more_than_the_most(shards, block, length, data):
    layout, count = Layout(shards, block), data.draw(some.integers(1, shards))
    dealt = [0] * count
    for position in range(length):
        shard = layout.shard_of(position)
        dealt[next(rank for rank in range(count) if shard < layout.range_of(rank, count)[1])] += 1
    assert together.most(layout, count, length) == max(dealt)


@given(some.integers(1, 3_000_000))
def test_slabs_fall_into_parts_and_waste_little(rows):
    spare = together.roomy(rows) + 1
    assert spare > rows and spare - 1 <= rows * 17 / 16 + captured.WINDOW
    if rows > 16 * max(together.PART, captured.WINDOW):
        assert together.parts_of(spare, 8) >= 16 and spare % together.parts_of(spare, 8) == 0


# ---- passes ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_one_process_computes_what_a_cache_without_shards_does(dtype, tolerance):
    assert_near(outputs(of_process(Peers(), dtype)), outputs(target(dtype)), tolerance)


@pytest.mark.parametrize("pooled", [False, True])
def test_fixed_shapes_are_the_pass(pooled):
    model = of_process(Peers(), pooled=pooled)
    assert_near(passes(model), passes(target(torch.float64)), 1e-12)
    if pooled:
        (slabs,) = idle_slabs(model)
        assert len({window for *_, window in slabs.graphs}) > 2, "windows grew with the text"


@pytest.mark.parametrize(
    ("count", "pooled", "schedule"), [(2, False, "scatter"), (2, True, "gather"), (3, True, "scatter"), (4, True, "nodes")]
)
def test_processes_compute_what_one_does_and_follow_its_shapes(count, pooled, schedule, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lengths = (29,) if count > 2 else (3, 29, 3)  # more processes than cores take long

    def work():
        peers = Peers.join(timeout=30.0)
        model = of_process(peers, pooled=pooled, schedule=schedule)
        if not peers.first:
            follow(model)
            raise SystemExit(0)
        found = passes(model, lengths), model.facts()
        model.stop()
        return found

    found, facts = processes.run(count, followed(work))[0]
    assert_near(found, passes(target(torch.float64), lengths), 1e-11)
    messages = 5 * (1 if schedule == "gather" else 2)
    if pooled:
        assert facts["collectives"] % messages == 0 and facts["collectives"] > messages * facts["passes"], "making a graph runs it too"
    else:
        assert facts["collectives"] == messages * facts["passes"]


def test_trees_give_plain_text_call_after_call():
    def work():
        peers = Peers.join(timeout=30.0)
        model = of_process(peers, pooled=True)
        if not peers.first:
            follow(model)
            raise SystemExit(0)
        network, vocab = tiny_draft(tiny_target())
        network.prepare()
        found = [tokens(model, Eagle3Drafter(network, vocab), shape, sampling) for shape, sampling in CALLS]
        idle = idle_slabs(model)
        model.stop()
        return found, len(idle), len(idle[0].graphs)

    (found, slabs, graphs), _ = processes.run(2, followed(work))
    assert found == [tokens(target(torch.float64), None, "", sampling) for _, sampling in CALLS]
    assert slabs == 1 and graphs > 2, "one set of slabs and graphs served all calls"


def test_caches_of_all_processes_grow_alike(monkeypatch):
    """Else one would make a graph where another replays one, and wait for it."""
    kind, caches = (torch.float64, torch.device("cpu")), []
    for rank in range(2):
        peers = Peers(rank, 2)
        monkeypatch.setattr(peers, "everyones", lambda fact: [fact] * 2)
        caches.append(together.TogetherCache((5, 2, 8), 1, 300, kind, DEALT, Exchange(Together(2), peers)))
    before, siblings = [cache.inner.capacity for cache in caches], Segment(0, 250, ancestor_mask([-1] + [0] * 249))
    for cache in caches:
        cache.view(siblings)
    after = [cache.inner.capacity for cache in caches]
    assert before[0] == before[1] < after[0] == after[1]


# ---- devices ----


@pytest.mark.parametrize(
    ("device", "environment", "wanted"),
    [
        ("cpu", {"WORLD_SIZE": "2", "RANK": "1"}, ("cpu", "gloo")),
        ("cuda", {}, ("cuda", "gloo")),
        ("cuda", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}, ("cuda:1", "nccl")),
        ("cuda:0", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}, ("cuda:0", "gloo")),
    ],
)
def test_each_process_has_its_card_or_all_share_one(device, environment, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_of(device) == wanted


def test_more_processes_than_cards_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EyasError, match="2 processes were started on this machine, which has 1 CUDA device; start one for each") as told:
        place_of("cuda")
    assert "\n" not in str(told.value) and "--device cuda:0" in str(told.value)


def test_messages_of_replayed_graphs_are_counted():
    peers = Peers(0, 3)
    for run in range(4):
        mark = peers.mark()
        if run == 0:  # the graph is made
            for _ in range(3 * 5):
                peers.seen("gather", 100, 0.0)
        peers.replayed(mark, 16, runs=3)
    assert peers.carried == ((3 + 3) * 5, (3 + 3) * 500)
