"""One process whose keys lie in shards: the same text, a tree's rows the rows of plain decoding, and a cache like any other."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget
from tests.tiny import tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2, 3]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]
LAYOUTS = [Layout(8, 4), Layout(4, 2), Layout(64, 2), Layout(2, 16)]


def target(dtype: torch.dtype, bits: int = 16):
    sizes = {"intermediate_size": 64, "head_dim": 8}
    return tiny_target(prepare=False, dtype=torch.float32, **sizes).to(torch.bfloat16).to(dtype).prepare(bits)


def sharded(model, layout: Layout) -> ShardedTarget:
    return ShardedTarget(model, layout, Peers())


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 53, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def outputs(model) -> list[torch.Tensor]:
    """Logits of two prompts in two slots, of a tree beside a single row, and of what follows once a branch was kept."""
    cache, found = model.new_cache(2, 120), []
    for slot, length in ((0, 37), (1, 50)):
        found.append(model(chain_rows(slot, prompt(length, slot), 0), cache, (1, 2, 4)))
        cache.keep(slot, range(length))
    rows = Rows(
        torch.tensor([7, *prompt(7, 5)]),
        torch.tensor([37, *(50 + depth for depth in DEPTHS)]),
        [Segment(0, 1), Segment(1, 7, ancestor_mask(PARENTS))],
    )
    found.append(model(rows, cache, (1, 2, 4)))
    cache.keep(0, [0])
    cache.keep(1, [0, 2, 5])
    found.append(model(chain_rows(1, [3], 53), cache, (1, 2, 4)))
    cache.clear(1)
    found.append(model(chain_rows(1, prompt(9, 8), 0), cache, (1, 2, 4)))
    return [part for out in found for part in out]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 8), (torch.bfloat16, 4)])
def test_one_shard_is_no_shard_to_the_last_bit(dtype, bits):
    model = target(dtype, bits)
    for got, want in zip(outputs(sharded(model, Layout(1, 64))), outputs(model)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_change_rounding_and_nothing_else(layout, dtype):
    model = target(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for got, want in zip(outputs(sharded(model, layout)), outputs(model)):
        assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_trees_rows_across_a_blocks_edge_are_plain_decodings_rows(layout, dtype):
    if dtype != torch.float64 and target(dtype).native is None:
        pytest.skip("without the kernel a row's sums depend on the pass's other rows")
    model, tokens = sharded(target(dtype), layout), prompt(7, 5)
    for length in range(44, 52):  # every place in a block
        cache = model.new_cache(1, 80)
        model(chain_rows(0, prompt(length, 1), 0), cache)
        cache.keep(0, range(length))
        mask = ancestor_mask(PARENTS)
        tree = Rows(torch.tensor(tokens), torch.tensor([length + depth for depth in DEPTHS]), [Segment(0, 7, mask)])
        together = model(tree, cache).logits
        for place, row in enumerate((0, 1, 3, 6)):  # a path of the tree, one token a pass
            alone = model(chain_rows(0, [tokens[row]], length + place), cache).logits
            cache.keep(0, [0])
            if dtype == torch.float64:
                assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(alone[0], together[row])


def test_more_rows_at_one_position_than_there_was_room_for():
    model, count = target(torch.float32), 150
    parents = [-1] + [0] * (count - 1)  # 149 siblings, all in one shard
    outs = []
    for each in (model, sharded(model, Layout(4, 4))):
        cache = each.new_cache(1, 200)
        each(chain_rows(0, prompt(10, 1), 0), cache)
        cache.keep(0, range(10))
        positions = torch.tensor([10] + [11] * (count - 1))
        outs.append(each(Rows(torch.tensor(prompt(count, 2)), positions, [Segment(0, count, ancestor_mask(parents))]), cache).logits)
        cache.keep(0, [0, 149])
        outs.append(each(chain_rows(0, [5], 12), cache).logits)
    for got, want in zip(outs[2:], outs[:2]):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_prefix_is_copied_and_a_text_is_cut():
    model = sharded(target(torch.float32), Layout(4, 2))
    one, other = model.new_cache(2, 60), model.new_cache(2, 60)
    model(chain_rows(0, prompt(30, 1), 0), one)
    one.keep(0, range(30))
    other.copy_prefix(one, 0, 1, 25)
    one.cut(0, 25)
    assert other.lengths == [0, 25] and one.lengths == [25, 0]
    logits = [model(chain_rows(slot, [7], 25), cache).logits for cache, slot in ((one, 0), (other, 1))]
    fresh = model.new_cache(1, 60)
    model(chain_rows(0, prompt(30, 1)[:25], 0), fresh)
    fresh.keep(0, range(25))
    for each in logits:
        assert torch.equal(each, model(chain_rows(0, [7], 25), fresh).logits)


def test_what_was_done_to_a_cache_is_not_kept_for_others_once_a_pass_was_run():
    model = sharded(target(torch.float32), Layout(4, 2))
    cache = model.new_cache(1, 60)
    for position in range(20):
        model(chain_rows(0, [7], position), cache)
        cache.keep(0, [0])
        assert len(cache.told) == 1
