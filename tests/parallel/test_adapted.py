"""Targets that transformers runs, with their keys in shards: sinks join once, scores are capped one by one, windows go by position."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from eyas.model.rows import Rows, Segment, chain_rows
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget, follow
from tests.model.test_adapter import PARENTS, TOKENS, loaded, tree_rows
from tests.parallel import processes
from tests.parallel.test_processes import digest, followed

FAMILIES = ["gpt_oss", "gemma2", "gemma3", "deepseek_v3", "llama4", "gemma4"]  # sinks, caps, windows, narrow values, chunks, shared keys


def outputs(model) -> list[torch.Tensor]:
    """Logits and features of a text, of a tree beside another text's row, and of what follows a kept branch, in shards with little room."""
    cache, found = model.new_cache(2, 60), []
    found.append(model(chain_rows(0, TOKENS, 0), cache, (1, 2)))
    cache.keep(0, range(len(TOKENS)))
    found.append(model(chain_rows(1, TOKENS[3:12], 0), cache, (1, 2)))
    cache.keep(1, range(9))
    tree = tree_rows(0, len(TOKENS), TOKENS[: len(PARENTS)])
    both = Rows(
        torch.cat([tree.tokens, torch.tensor([5])]), torch.cat([tree.positions, torch.tensor([9])]), [*tree.segments, Segment(1, 1)]
    )
    found.append(model(both, cache, (1, 2)))
    cache.keep(0, [0, 2])
    cache.keep(1, [0])
    found.append(model(chain_rows(0, [3], len(TOKENS) + 2), cache, (1, 2)))
    return [part for out in found for part in out]


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_change_rounding_and_nothing_else(family):
    model = loaded(family)
    wanted = outputs(model)
    for layout in (Layout(8, 2), Layout(4, 4), Layout(1, 64)):
        for got, want in zip(outputs(ShardedTarget(model, layout, Peers())), wanted, strict=True):
            tolerance = 1e-5 if model.dtype == torch.float64 else 1e-3
            assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
@pytest.mark.parametrize("count", [2, 3])
def test_how_many_processes_there_are_changes_no_bit(family, count, threads):
    threads(1)  # the order in which PyTorch's products add up hangs on them; processes of several have one each
    layout = Layout(8, 2)
    model = loaded(family)  # before the others are forked

    def work() -> str:
        made = ShardedTarget(model, layout, Peers.join(timeout=30.0))
        if not made.peers.first:
            follow(made)
            raise SystemExit(0)
        found = digest(outputs(made))
        assert made.peers.calls["gather"] == 4 * 5, "one message a layer"
        made.stop()
        return found

    wanted = digest(outputs(ShardedTarget(model, layout, Peers())))
    assert processes.run(count, followed(work))[0] == wanted
