"""Kill, stop and interrupt the processes of `torchrun -m eyas generate --context-parallel` at random moments, and count what users see.

    python scripts/lost_processes.py [--trials 20] [--what kill,stop,ctrl-c] [--when early,late] [--processes 3] [--timeout 8] [--jobs 2]
        [--real]

Each trial is a run of torchrun's on a tiny target. SIGKILL and SIGSTOP go to one process, each rank so many times; Ctrl-C goes to
torchrun's process group, as from a terminal. Half of the moments lie before the first text (meeting, loading, reading the prompt), half
behind it, up to the end. A trial is right if one line of ours names the process (or the text is complete, where the moment came too late);
nothing hangs; the status is not 0 where the text was cut; no process is left over; no traceback is ours; and what was written is how the
whole text begins.

Without --real, torchrun and what it starts are forked from a process that has imported everything: imports take most of a real run. With
--real they are not; a moment at which that process or the first still imports its libraries is then for torchrun alone to report, and
counted apart.
torchrun waits 30 seconds for a stopped process before it kills it; here it is killed once the others have ended.
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "ctrl-c": signal.SIGINT}
MARK = "EYAS_TRIAL"  # a variable by which a trial's processes are found
TOKENS = 160
SLACK = 20.0  # seconds beyond the timeout on a machine that has other work too


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="moments for each rank and kind")
    parser.add_argument("--what", default=",".join(SIGNALS))
    parser.add_argument("--when", default="early,late", help="before the first text, behind it")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=8.0, help="--peer-timeout of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="start every process anew")
    parser.add_argument("--out", type=Path, help="JSON of all trials")
    options = parser.parse_args()
    draw, moments = random.Random(options.seed), options.when.split(",")
    with tempfile.TemporaryDirectory(prefix="eyas-lost-") as name:
        world = World(Path(name), options.processes, options.timeout, options.real)
        trials = [
            (what, rank, moments[number % len(moments)] == "late", draw.random())
            for number in range(options.trials)
            for what in options.what.split(",")
            for rank in ([0] if what == "ctrl-c" else range(options.processes))
        ]
        queue = multiprocessing.get_context("fork").SimpleQueue()
        workers = [Forked(lambda job=job: queue_of(world, trials[job :: options.jobs], queue)) for job in range(options.jobs)]
        found = []
        for _ in trials:
            found.append(one := queue.get())
            print(json.dumps({key: value for key, value in one.items() if key != "said" or one["wrong"]}), flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
        for worker in workers:
            worker.wait()
    for row in table(found):
        print(row)
    return 1 if any(one["wrong"] for one in found) else 0


def queue_of(world: World, trials: list[tuple[str, int, bool, float]], queue: Any) -> None:
    for words in trials:
        queue.put(world.trial(*words))


class Forked:
    """A copy of this process that runs a function and ends; as `subprocess.Popen` otherwise."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            atexit._clear()  # the folder is its maker's to delete
            status = 1
            try:
                found = work()
                status = found if isinstance(found, int) else 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                traceback.print_exc()
            finally:
                atexit._run_exitfuncs()
                for stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        stream.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.02)
        return status


def in_environment(environment: dict[str, str], out: int | None, err: int | None, work: Callable[[], object]) -> object:
    """Run as a process would that was started anew: a session, an environment and files of its own."""
    os.setsid()
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    for stream, number in ((out, 1), (err, 2)):
        if stream is not None:
            os.dup2(stream, number)
    return work()


def torchrun(words: list[str]) -> object:
    """torchrun's own program, but for how it starts processes."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    from eyas import cli

    def started(self: object, args: tuple[str, ...], env: dict[str, str]) -> Forked:
        words = list(args[args.index("eyas") + 1 :])
        process = Forked(lambda: in_environment(env, None, None, lambda: cli.main(words)))
        Path(f"{env[MARK]}.{env['RANK']}.pid").write_text(str(process.pid))  # a signal while it forks would be lost in Python's hooks
        return process

    SubprocessHandler._popen = started  # pyright: ignore[reportAttributeAccessIssue]
    return run.main(words)


class Run(NamedTuple):
    """A run of torchrun, under way."""

    process: subprocess.Popen[bytes] | Forked
    mark: str
    out: Path
    err: Path

    def alive(self) -> dict[int, int]:
        """Process ids of those that torchrun started, by rank."""
        return {rank: pid for pid, rank in (marked if isinstance(self.process, subprocess.Popen) else noted)(self).items()}

    def text(self) -> bytes:
        return self.out.read_bytes()

    def said(self) -> str:
        return self.err.read_text(errors="replace")


def marked(run: Run) -> dict[int, int]:
    """Ranks of living processes whose environment has the mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            rank = next((word[5:] for word in words if word.startswith("RANK=")), None)
            if f"{MARK}={run.mark}" in words and rank is not None and lives(int(folder.name)):
                found[int(folder.name)] = int(rank)
    return found


def noted(run: Run) -> dict[int, int]:
    """The same of processes that were forked: their environment in /proc is their parent's, so there is a note."""
    notes = run.out.parent.glob(f"{run.mark}.*.pid")
    pids = {int(note.read_text() or 0): int(note.name.split(".")[1]) for note in notes}
    return {pid: rank for pid, rank in pids.items() if lives(pid)}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class World:
    """Tiny models, the text of a run that is left alone, and how long the parts of a run take."""

    def __init__(self, folder: Path, processes: int, timeout: float, real: bool) -> None:
        sys.path.insert(0, str(ROOT))
        import torch

        torch.set_num_threads(1)  # others would not survive a fork
        import eyas.commands.generate  # noqa: F401
        from tests.tiny import save_tiny_draft, save_tiny_target

        self.folder, self.processes, self.timeout, self.real = folder, processes, timeout, real
        save_tiny_target(folder / "target", num_hidden_layers=8, intermediate_size=64, max_position_embeddings=2048)
        save_tiny_draft(folder / "draft", folder / "target", taps=None)
        self.before, self.behind = 20.0, 5.0
        self.note(run := self.start())
        self.whole = run.text().rstrip(b"\n")
        assert run.process.returncode == 0 and self.whole, run.said()[-3000:]
        print(f"left alone: {len(self.whole)} bytes; text begins after {self.before:.1f} s and takes {self.behind:.1f} s", flush=True)

    def start(self) -> Run:
        mark = uuid.uuid4().hex
        out, err = self.folder / f"{mark}.out", self.folder / f"{mark}.err"
        words = [
            "generate",
            "Hawks and owls. " * 40,
            "--target",
            self.folder / "target",
            "--draft",
            self.folder / "draft",
            "--context-parallel",
        ]
        words += ["--precision", "fp32", "--tree", "12x3x4", "--max-new-tokens", TOKENS, "--ignore-eos", "--seed", "1"]
        words += ["--peer-timeout", self.timeout]
        command = ["--nproc-per-node", str(self.processes), "--standalone", "-m", "eyas", *map(str, words)]
        environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        with out.open("wb") as to, err.open("wb") as said:
            if self.real:
                process = subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *command],
                    stdin=subprocess.DEVNULL, stdout=to, stderr=said, env=environment, start_new_session=True,
                )  # fmt: skip
            else:
                files, there = (to.fileno(), said.fileno()), environment | {MARK: str(self.folder / mark)}
                process = Forked(lambda: in_environment(there, *files, lambda: torchrun(command)))
        return Run(process, mark, out, err)

    def all_begun(self, run: Run) -> float:
        """When all processes had begun, torchrun's table of them included: interrupted while it starts them, it forgets those there are,
        and they end because it is gone."""
        while run.process.poll() is None and len(run.alive()) < self.processes:
            time.sleep(0.02)
        time.sleep(0.03)
        return time.monotonic()

    def note(self, run: Run) -> None:
        """How long it takes from there to the first text, and from the first text to the end."""
        began = self.all_begun(run)
        while run.process.poll() is None and not run.text():
            time.sleep(0.05)
        before = time.monotonic() - began
        run.process.wait()
        self.before, self.behind = before, time.monotonic() - began - before

    def trial(self, what: str, rank: int, late: bool, share: float) -> dict[str, Any]:
        run = self.start()
        try:
            return self.tried(run, what, rank, late, share)
        finally:
            if run.process.poll() is None:
                os.kill(run.process.pid, signal.SIGKILL)
            for pid in run.alive().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.process.wait()

    def tried(self, run: Run, what: str, rank: int, late: bool, share: float) -> dict[str, Any]:
        if late:
            while run.process.poll() is None and not run.text():
                time.sleep(0.02)
        else:
            self.all_begun(run)
        time.sleep(share * (self.behind if late else self.before))
        pid, stage, sent = run.alive().get(rank), self.stage(run, rank), time.monotonic()
        with suppress(ProcessLookupError):
            if what == "ctrl-c":
                os.killpg(run.process.pid, signal.SIGINT)
            elif pid:
                os.kill(pid, SIGNALS[what])
        limit = sent + self.timeout + SLACK * (3 if self.real else 1)
        while time.monotonic() < limit and run.process.poll() is None:
            if what == "stop" and list(run.alive()) in ([rank], []):
                break
            time.sleep(0.02)
        seconds, others = time.monotonic() - sent, [other for other in run.alive() if other != rank]
        hung = bool(others) or (run.process.poll() is None and what != "stop")
        if what == "stop" and rank in run.alive():
            os.kill(pid or 0, signal.SIGKILL)
        try:
            status: int | None = run.process.wait(SLACK)
        except subprocess.TimeoutExpired:
            status, hung = None, True
        return self.judged(run, what, rank, stage, seconds, hung, status)

    def stage(self, run: Run, rank: int) -> str:
        """What a rank is at."""
        pid = run.alive().get(rank)
        if run.process.poll() is not None or pid is None:
            return "ended"
        if run.text():
            return "writing"
        with suppress(OSError):
            if self.real and "libtorch_python" not in Path(f"/proc/{pid}/maps").read_text():
                return "importing"
        return "before the first text"

    def judged(self, run: Run, what: str, rank: int, stage: str, seconds: float, hung: bool, status: int | None) -> dict[str, Any]:
        time.sleep(0.3)
        said, text = run.said(), run.text().rstrip(b"\n")
        left, complete = run.alive(), text == self.whole
        lines = [line for line in said.splitlines() if line.startswith("eyas: ")]
        wanted = "interrupted" if what == "ctrl-c" else f"process {rank + 1} of {self.processes} "
        named = len(lines) == 1 and wanted in lines[0]
        early = stage == "importing" or lines == ["eyas: ended by torchrun, whose report says why"]
        wrong = ["hangs"] * hung + ["processes left over"] * bool(left) + ["a traceback of ours"] * bool(own_tracebacks(said))
        wrong += ["status 0 of a text that was cut"] * (status == 0 and not complete)
        wrong += ["text not as the whole one begins"] * (not self.whole.startswith(text))
        told = (
            "by us" if named else "text complete" if complete and not lines else "by torchrun alone" if early and len(lines) < 2 else "not"
        )
        wrong += [f"said {lines}"] * (told == "not")
        return {
            "what": what, "rank": rank + 1, "stage": stage, "told": told, "line": lines[0] if lines else None, "seconds": round(seconds, 1),
            "status": status, "bytes": len(text), "wrong": wrong, "said": said,
        }  # fmt: skip


def own_tracebacks(said: str) -> list[str]:
    """Tracebacks that are not torchrun's own."""
    blocks = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*", re.sub(r"^\[?rank\d+\]?: ?", "", said, flags=re.M))
    return [block for block in blocks if not re.search(r"torch/distributed/(run|launcher|elastic)", block)]


def table(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| what | process | trials | named by us | text complete | torchrun's report alone | wrong | longest, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, rank in sorted({(one["what"], one["rank"]) for one in found}):
        some = [one for one in found if (one["what"], one["rank"]) == (what, rank)]
        told = Counter(one["told"] for one in some)
        cells = [what, "all" if what == "ctrl-c" else rank, len(some), told["by us"], told["text complete"], told["by torchrun alone"]]
        rows.append(f"| {' | '.join(map(str, [*cells, sum(bool(one['wrong']) for one in some), max(one['seconds'] for one in some)]))} |")
    return rows


if __name__ == "__main__":
    sys.exit(main())
