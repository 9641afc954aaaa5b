"""Where a command's output goes: consoles whose lines nobody cuts, and files that are checked before anything is loaded.

Knows terminals, pipes and paths; knows nothing of what is told.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from eyas.config import EyasError
from eyas.files.disk import replace_text
from eyas.view.pictures import PICTURES, can_draw

WIDE = 10_000  # columns where no terminal shows the lines
SILENCE = 30.0  # seconds between lines where no terminal shows a bar


def terminal(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that folds lines at a terminal's edge alone: what goes into a pipe or a file has no edge."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, quiet=quiet, soft_wrap=True, width=None if stream.isatty() else WIDE)


class Count(ProgressColumn):
    """How much is done: `told` where the task says it in words, else numbers in its `unit`."""

    def render(self, task: Task) -> Text:
        return Text(counted(task))


def counted(task: Task) -> str:
    if told := task.fields.get("told"):
        return str(told)
    unit = task.fields.get("unit", "")
    done = task.completed / 1e6 if unit == "MB" else task.completed
    most = task.total / 1e6 if unit == "MB" and task.total else task.total
    return f"{done:,.0f} {unit}".rstrip() if most is None else f"{done:,.0f} of {most:,.0f} {unit}".rstrip()


class Bar(Progress):
    """A bar with what is done and the time that is left; where no terminal shows it, a line twice a minute."""

    def __init__(self, shown: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), Count(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=shown, transient=True)
        self.said = time.monotonic()

    def start(self) -> None:
        if self.console.is_terminal:
            super().start()

    def stop(self) -> None:
        if self.console.is_terminal:
            super().stop()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if not self.console.is_terminal and time.monotonic() - self.said >= SILENCE:
            self.said = time.monotonic()
            task = self.tasks[task_id]
            left = f", {task.time_remaining / 60:.0f} min left" if task.time_remaining else ""
            self.console.print(f"{task.description}: {counted(task)}{left}", markup=False)


def progress(shown: Console | None = None) -> Bar:
    """A bar on the standard error."""
    return Bar(shown or terminal(stderr=True))


# ---- files ----


def result_file(out: str | None) -> Path | None:
    """The path for a result as JSON, once it is sure that it can be written there; an earlier result stays as it is until then. Raises
    `EyasError` where something else than a result lies there."""
    if out is None:
        return None
    path = checked("--out", out)
    if path.suffix in PICTURES:
        raise EyasError(f"--out {out} is named like a picture; the result is JSON: give a name like r.json")
    if path.exists() and path.stat().st_size:
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            held = None
        if not isinstance(held, dict) or (held and "conditions" not in held):
            raise EyasError(f"--out {out} holds something else than an earlier result; it is not replaced, choose another name")
    return path


def write_result(out: Path, result: dict[str, Any]) -> None:
    try:
        replace_text(out, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise EyasError(f"--out {out} could not be written ({error.strerror})") from None


def picture_file(option: str, given: str | None, endings: tuple[str, ...] = PICTURES) -> Path | None:
    """The path for a picture, once it is sure that it can be drawn and written there."""
    if given is None:
        return None
    if Path(given).suffix.lower() not in endings:
        raise EyasError(f"{option} {given}: a picture's name ends in {' or '.join(endings)}")
    if endings is PICTURES and not can_draw():
        raise EyasError(f"{option} needs matplotlib (pip install 'eyas[bench]')")
    return checked(option, given)


def checked(option: str, given: str) -> Path:
    """A path that can be written; nothing is left there, and what is there stays."""
    path = Path(given).expanduser()
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise EyasError(f"{option} {given} cannot be written ({error.strerror}); give a file in a directory that exists") from None
    if not existed:
        path.unlink()
    return path
