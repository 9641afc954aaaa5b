"""Who is lost is named as one reads it; a stopped clock accuses nobody; a slow process is found by who waits for it; Ctrl-C loses none."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from eyas import cli, launched
from eyas.parallel import peers, presence
from eyas.parallel.presence import Presence, Silence, named
from eyas.parallel.target import slow_process
from tests.parallel import processes


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


def test_of_the_processes_of_one_machine_the_first_to_end_says_why_and_torchrun_can_quote_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    lines = ["eyas: process 3 of 3 is gone"] * 2 + ["eyas: processes 1 and 2 of 3 are gone"]
    for rank, line in enumerate(lines):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        launched.say(line)
        assert line in (tmp_path / str(rank) / "error.json").read_text()
    assert capsys.readouterr().err == lines[0] + "\n"


# ---- Ctrl-C ----

TIMEOUT = 2.0  # seconds; a process that missed another would say so then
KILLED = 30.0  # seconds after which torchrun kills a process that it asked to end


def interrupted(count: int, place, tmp_path, capfd, signals: list[signal.Signals] | None = None) -> tuple[list[int], list[str]]:
    """Statuses and lines of processes that were interrupted once each was at its place: `place(rank, here)` is what each does, and calls
    `here()` when it is there. `signals`: what each gets, where that is not Ctrl-C."""

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # which outlives them, as torchrun's does

    def work(rank: int) -> None:
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def run(options) -> int:
            place(rank, (tmp_path / str(rank)).touch)
            return 0

        cli.importlib.import_module = lambda name: type("Command", (), {"run": staticmethod(run)})
        status = cli.main(["generate", "hawks", "--context-parallel"])
        presence.atexit._run_exitfuncs()
        os._exit(status)

    ids, _ = processes.start(count, work)
    while not all((tmp_path / str(rank)).exists() for rank in range(count)):
        time.sleep(0.01)
    time.sleep(0.2)  # from there into the call that waits
    for process, sent in zip(ids, signals or [signal.SIGINT] * count, strict=True):
        os.kill(process, sent)
    killer = threading.Timer(KILLED, lambda: [os.kill(process, signal.SIGKILL) for process in ids])  # they are waited for below
    killer.start()
    for process in ids:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    killer.cancel()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ids]
    return statuses, [line for line in capfd.readouterr().err.splitlines() if line.startswith("eyas: ")]


def importing(rank, here):
    try:
        here()
        time.sleep(60)
    except BaseException:  # as around some imports
        time.sleep(60)


def awaiting_the_last(rank, here):
    if rank == 2:
        here()
        time.sleep(60)
    there = Presence(rank, 3, TIMEOUT)
    here()
    there.meet("came")


def in_a_call_that_python_cannot_break_off(rank, here):
    there = Presence(rank, 3, TIMEOUT)
    there.meet("came")
    there.store.set_timeout(timedelta(seconds=200))
    here()
    there.store.get("what nobody says")


@pytest.mark.parametrize("place", [importing, awaiting_the_last, in_a_call_that_python_cannot_break_off])
def test_ctrl_c_before_processes_have_met_ends_each_and_none_is_missed(place, tmp_path, capfd):
    assert interrupted(3, place, tmp_path, capfd) == ([130] * 3, ["eyas: interrupted"])


def met(rank, here, first=True):
    there = Presence(rank, 3, TIMEOUT)
    there.meet("came")
    launched.met = rank > 0 or first
    here()
    there.meet("pass" if rank else "other")


@pytest.mark.parametrize("place", [met, partial(met, first=False)], ids=["all", "but the first"])
def test_who_has_met_the_others_ends_with_the_first(place, tmp_path, capfd):
    assert interrupted(3, place, tmp_path, capfd) == ([130, 0, 0], ["eyas: interrupted"])


def test_who_was_interrupted_calls_nobody_lost(tmp_path, capfd):
    sent = [signal.SIGINT, signal.SIGKILL, signal.SIGINT]
    assert interrupted(3, met, tmp_path, capfd, sent) == ([130, -signal.SIGKILL, 0], ["eyas: interrupted"])
    for rank in range(3):
        (tmp_path / str(rank)).unlink()
    sent = [signal.SIGKILL, signal.SIGINT, signal.SIGINT]
    assert interrupted(3, met, tmp_path, capfd, sent) == ([-signal.SIGKILL, 130, 130], [])


def test_processes_that_meet_in_another_way_keep_their_own_ctrl_c(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        launched.end_at_once()
        launched.check("generate", context_parallel=True)
        assert signal.getsignal(signal.SIGINT) is launched.interrupted
        launched.check("train", context_parallel=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "training saves what there is"
    finally:
        signal.signal(signal.SIGINT, before)
