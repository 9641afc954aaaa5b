"""Whichever messages carry the states of shards, the same bits come out of them, and as few bytes as the schedule promises."""

from __future__ import annotations

import os

import pytest
import torch

from eyas.config import EyasError
from eyas.kernels import native
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.schedules import LARGE, Exchange, NativeJoin, joined
from eyas.parallel.states import join
from eyas.parallel.target import ShardedTarget, follow
from tests.parallel import processes
from tests.parallel.test_processes import LAYOUT, digest, followed
from tests.parallel.test_target import outputs, target


def shared(kind: tuple[torch.dtype, int], schedule: str, of_node: int) -> ShardedTarget:
    os.environ["LOCAL_WORLD_SIZE"] = str(of_node)
    made = ShardedTarget(target(*kind), LAYOUT, Peers.join(timeout=30.0), schedule)
    if made.peers.first:
        return made
    follow(made)
    raise SystemExit(0)


@pytest.mark.parametrize("kind", [(torch.float32, 16), (torch.bfloat16, 16), (torch.float64, 16)])
@pytest.mark.parametrize(
    ("count", "of_node", "schedules"),
    [(2, 2, ["scatter"]), (3, 3, ["scatter"]), (4, 4, ["scatter"]), (4, 2, ["nodes", "nodes-scatter"]), (6, 2, ["nodes", "nodes-scatter"])],
)
def test_every_schedule_has_the_bits_of_one_process(kind, count, of_node, schedules):
    wanted = digest(outputs(ShardedTarget(target(*kind), LAYOUT, Peers())))
    for schedule in schedules:

        def work(schedule: str = schedule) -> tuple[str, dict]:
            made = shared(kind, schedule, of_node)
            found = digest(outputs(made)), dict(made.peers.calls)
            made.stop()
            return found

        found, calls = processes.run(count, followed(work))[0]
        assert found == wanted
        names = {
            "scatter": ["gather scatter", "gather rows"],
            "nodes": ["node", "nodes"],
            "nodes-scatter": ["node scatter", "nodes", "node rows"],
        }[schedule]
        assert {name: number for name, number in calls.items() if name != "tell"} == dict.fromkeys(names, 5 * 5), "five layers, five passes"


def alone(count: int, rank: int = 0) -> Exchange:
    """What one of several processes would do, without the others."""
    return Exchange(Layout(), Peers(rank, count))


def test_rows_are_shared_out_where_that_saves_bytes_of_many_rows(monkeypatch):
    monkeypatch.setattr(Peers, "everyones", lambda peers, fact: [fact] * peers.count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    few, many = 2340, 256 * 2340  # bytes of a row's states, and of a part of a prompt
    assert not any(alone(count).schedule(few).shares for count in (2, 3, 4, 8))
    assert [alone(count).schedule(many).shares for count in (2, 3, 4, 8)] == [False, True, True, True], "two processes would send as much"
    for count in (3, 4, 5, 8):
        exchange, size = alone(count), LARGE
        assert exchange.received("scatter", size) <= exchange.received("gather", size) / 2


def test_a_schedule_that_cannot_be_is_refused(monkeypatch):
    with pytest.raises(EyasError, match=r"schedule \(EYAS_SCHEDULE\) must be one of auto, gather, .* not 'ring'"):
        Exchange(LAYOUT, Peers(), "ring")
    monkeypatch.setattr(Peers, "everyones", lambda peers, fact: [fact] * peers.count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(EyasError, match="several nodes"):
        Exchange(LAYOUT, Peers(1, 4), "nodes")


@pytest.mark.skipif(native.kernel() is None, reason="there is no kernel here")
def test_the_kernel_joins_subtrees_as_the_plain_form_does_and_as_it_joins_them_all_at_once():
    draw, shards = torch.Generator().manual_seed(4), 16
    states = torch.randn(shards, 5, 3, 9, generator=draw)
    states[2, :, 1], states[6:8, 3] = torch.tensor([0.0] * 8 + [float("-inf")]), torch.tensor([0.0] * 8 + [float("-inf")])
    every, parts = [(shard, 1) for shard in range(shards)], [(0, 4), (4, 2), (6, 1), (7, 1), (8, 8)]
    made = NativeJoin(shards)(states, every, parts)
    torch.testing.assert_close(made, joined(states, every, parts), rtol=1e-5, atol=1e-6)
    whole = NativeJoin(shards)(states, every, [(0, shards)])
    assert torch.equal(NativeJoin(shards)(made, parts, [(0, shards)]), whole)
    plain = join(dict(zip(every, states.unbind(0), strict=True)), 0, shards)
    torch.testing.assert_close(whole[0], plain, rtol=1e-5, atol=1e-6)
