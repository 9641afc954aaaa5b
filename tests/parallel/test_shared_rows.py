"""Rows of a prompt that each process computes a share of are to the last bit those of one process, features and hidden states too."""

from __future__ import annotations

import pytest
import torch

from eyas.config import LAST_HIDDEN
from eyas.kernels import native
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget, follow
from tests.parallel import processes
from tests.parallel.test_processes import LAYOUT, digest, followed
from tests.parallel.test_target import outputs, prompt, target

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="without the kernel a row's sums depend on the rows beside it")


def everything(model) -> list[torch.Tensor]:
    """What several passes give, with features, without, and with the last hidden states in their place."""
    cache, found = model.new_cache(1, 120), outputs(model)
    for taps, logits_of in (((), None), (LAST_HIDDEN, slice(-1, None))):
        out = model(chain_rows(0, prompt(31, 4), cache.lengths[0]), cache, taps, logits_of)
        found += [part for part in out if part is not None]
        cache.keep(0, range(31))
    return found


def shared(kind: tuple[torch.dtype, int]) -> ShardedTarget:
    made = ShardedTarget(target(*kind), LAYOUT, Peers.join(timeout=30.0), spared=4)
    if made.peers.first:
        return made
    follow(made)
    raise SystemExit(0)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kind", [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 4)])
def test_shared_rows_are_those_of_one_process(kind, count):
    def work() -> tuple[str, dict, dict]:
        made = shared(kind)
        found = digest(everything(made)), dict(made.peers.calls), dict(made.peers.bytes)
        made.stop()
        return found

    wanted = digest(everything(ShardedTarget(target(*kind), LAYOUT, Peers())))
    found, calls, size = processes.run(count, followed(work))[0]
    assert found == wanted
    chains = [37, 50, 31, 31] + [9] * (count < 4)  # of nine rows a fourth process would have none
    assert calls["queries"] == calls["states"] == 5 * len(chains) and calls["features"] == len(chains), "five layers"
    assert calls["gather"] == 5 * (7 - len(chains)), "a tree beside a row, and a row"
    shares = sum(-(-rows // count) for rows in chains)
    row = 4 * 8 * 4 + 2 * 2 * 8 * torch.tensor([], dtype=kind[0]).element_size()
    assert size["queries"] == 5 * shares * row * (count - 1), "queries in float32, keys and values as the cache holds them"


def test_only_a_part_of_one_prompt_is_shared_out():
    model = ShardedTarget(target(torch.float32), LAYOUT, Peers())
    model.peers.count = 4  # the rule alone: nothing runs
    chain = chain_rows(0, prompt(90, 1), 0)
    assert model.shares_out(chain), "each process is spared 67 rows of 90"
    assert not model.shares_out(chain_rows(0, prompt(85, 1), 0)), "and 63 of 85"
    assert not model.shares_out(Rows(chain.tokens, chain.positions, [Segment(0, 60), Segment(1, 30)]))
    assert not model.shares_out(chain._replace(segments=[Segment(0, 90, torch.ones(90, 90, dtype=torch.bool).tril())]))
    model.peers.count = 11
    assert not model.shares_out(chain), "with ten rows each the eleventh would have none"
    model.peers.count = 1
    assert not model.shares_out(chain)
