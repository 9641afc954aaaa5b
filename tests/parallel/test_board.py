"""Processes of one machine leave bytes for each other in shared memory: what the network would carry, in parts where it is much."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from eyas.kernels import native
from eyas.parallel import board
from eyas.parallel.peers import Peers
from tests.parallel import processes

MANY = 5  # turns, so that both areas are used again
pytestmark = pytest.mark.skipif(native.kernel() is None, reason="the counters are the kernel's")


def passed(monkeypatch, room: int, on: bool) -> tuple[list, dict]:
    """What three processes got of each other, and how many bytes."""
    monkeypatch.setattr(board, "ROOM", room)
    monkeypatch.setenv("EYAS_BOARD", str(int(on)))

    def work(rank: int):
        peers = Peers.join(timeout=30.0)
        assert (peers.board is not None) == on
        found = []
        for turn in range(MANY):
            draw = torch.Generator().manual_seed(10 * turn + rank)
            found.append(peers.gather(torch.randn(2, 7, generator=draw)).tolist())
            found.append(peers.tell({"turn": turn, "words": "hawk " * (turn * 40)} if rank == 0 else None))
            parts = torch.arange(15, dtype=torch.int32).view(3, 5) + turn
            own = peers.scatter(parts + 100 * rank)
            assert own.tolist() == [(parts[rank] + 100 * other).tolist() for other in range(3)], "each has its part of everybody's"
            everyones = peers.collect(parts + 100 * rank, "collect")
            assert (everyones is None) == (rank > 0)
            assert everyones is None or everyones.tolist() == [(parts + 100 * other).tolist() for other in range(3)]
        found.append(peers.gather(torch.full((3,), rank, dtype=torch.bfloat16)).tolist())
        peers.leave()
        return found, dict(peers.bytes)

    first, *others = processes.run(3, work)
    assert all(found == first[0] for found, _ in others)
    return first


def test_bytes_pass_by_memory_as_they_pass_by_network_in_parts_too(monkeypatch):
    found, size = passed(monkeypatch, board.ROOM, True)
    assert found == passed(monkeypatch, 24, True)[0] == passed(monkeypatch, board.ROOM, False)[0]
    assert size["gather"] == MANY * 2 * 14 * 4 + 2 * 3 * 2, "what the two others left"
    assert size["scatter"] == MANY * 2 * 5 * 4 and size["collect"] == MANY * 2 * 15 * 4


def test_no_file_can_stay_wherever_a_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "PLACE", tmp_path)
    seen: list[list[Path]] = []

    def everyones(fact):
        seen.append(list(tmp_path.iterdir()))
        return [fact]

    assert board.shared(0, 1, 5.0, everyones) is not None
    assert seen == [[], []]


def test_a_process_that_has_ended_is_known_before_anybody_waits_for_it():
    child = os.fork()
    if child == 0:
        os._exit(0)
    handle = os.pidfd_open(child)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays to be waited for
        assert board.ended(handle)
    finally:
        os.close(handle)
        os.waitpid(child, 0)
