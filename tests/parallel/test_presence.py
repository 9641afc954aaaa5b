"""Who is lost is named as one reads it; a stopped clock accuses nobody; a slow process is found by who waits for it."""

from __future__ import annotations

import pytest

from eyas import launched
from eyas.parallel import peers, presence
from eyas.parallel.presence import Silence, named
from eyas.parallel.target import slow_process


@pytest.mark.parametrize(
    ("ranks", "what", "line"),
    [
        ([2], "gone", "process 3 of 4 is gone"),
        ([0, 3], "gone", "processes 1 and 4 of 4 are gone"),
        ([0, 1, 3], "did not answer within 5 s", "processes 1, 2 and 4 of 4 did not answer within 5 s"),
    ],
)
def test_lost_processes_are_named(ranks, what, line):
    assert named(ranks, 4, what) == line


def test_silence_is_counted_in_time_in_which_this_process_ran(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(presence.time, "monotonic", lambda: now[0])
    silence = Silence([1, 2])
    for tick in range(8):
        now[0] += presence.BEAT
        silence.look({1: str(tick).encode(), 2: b"7"})
    assert silence.beyond(3.0) == [2]
    now[0] += 1000.0  # this process itself was stopped, by Ctrl-Z say
    silence.look({1: b"7", 2: b"8"})
    assert silence.beyond(3.0) == [], "the other may have been stopped with it"


@pytest.mark.parametrize(
    ("worked", "slow"),
    [
        ([4.2, 0.5, 0.6], 1),
        ([0.5, 0.4, 0.9], 3),
        ([0.5, 0.4, 0.6], None),
        ([0.5, 0.9], 2),
        ([0.5, 0.6], None),
        ([2.0], None),
        ([0.0, 0.0], None),
    ],
)
def test_the_process_that_all_others_wait_for_is_slow(worked, slow):
    assert slow_process(worked) == slow


def test_what_the_first_process_does_between_passes_is_not_its_part_of_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    found = peers.Peers(0, 2)
    for _ in range(3):
        now[0] += 50.0  # it drafts
        found.seen("tell", 1, now[0])
        for _ in range(4):
            now[0] += 2.0
            began, now[0] = now[0], now[0] + 7.0  # the other lets it wait
            found.seen("gather", 1, began)
    found.seen("tell", 1, now[0])  # what is told may be no pass
    assert found.worked == 4 * 2.0 and found.waited == 3 * 4 * 7.0


def test_processes_of_one_machine_say_a_line_once_and_torchrun_can_quote_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        launched.say("eyas: process 3 of 3 is gone")
        assert "process 3 of 3 is gone" in (tmp_path / str(rank) / "error.json").read_text()
    assert capsys.readouterr().err == "eyas: process 3 of 3 is gone\n"
