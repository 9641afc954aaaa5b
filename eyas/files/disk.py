"""JSON, hashes, and folders that are written whole or not at all.

Knows files; knows nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eyas.config import EyasError

POINTER = b"version https://git-lfs"  # how a file of Git LFS begins that was never fetched


def check_fetched(path: Path) -> None:
    """Raise `EyasError` where a file is the pointer that Git LFS leaves in its place."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise EyasError(f"{path} is the pointer that Git LFS leaves in a file's place; fetch the file itself (git lfs pull)")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EyasError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        check_fetched(path)
        raise EyasError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise EyasError(f"{path} holds no JSON object")
    return content


@contextmanager
def atomic_directory(final: Path, ours: Collection[str] | None = None) -> Iterator[Path]:
    """A temporary folder beside `final` that replaces it only when the block ends well; until then `final` stays as it was.

    `ours`: the names that are replaced. Other files in `final` (such as a user's notes) are copied along. None: all are replaced. Where
    `final` is a link to a folder, that folder is replaced.
    """
    final = final.resolve() if final.is_symlink() else final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=temporary_prefix(final), dir=final.parent))
    except OSError as error:
        raise EyasError(f"cannot write {final}: {error.strerror}") from None
    try:
        yield work
        os.chmod(work, 0o755)
        for file in work.iterdir():  # safetensors leaves files that only their writer may read
            os.chmod(file, 0o644)
        if ours is not None and final.exists():
            for other in final.iterdir():
                if other.name not in ours and not (work / other.name).exists():
                    copy = shutil.copytree if other.is_dir() else shutil.copy2
                    copy(other, work / other.name)
        old = work.with_name(work.name + "-old")
        if final.exists():
            os.replace(final, old)
        try:
            os.replace(work, final)
        except BaseException:
            if old.exists():
                os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise EyasError(f"cannot write {final}: {error.strerror or error}; what was there before is untouched") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def recover_directory(final: Path) -> None:
    """Repair a folder after a kill inside `atomic_directory`: move the earlier content back where it was renamed away, and delete what is
    left of a save. Only folders with the names that `atomic_directory` gives are touched."""
    mine = re.compile(re.escape(temporary_prefix(final)) + r"\w{8}(-old)?")
    beside = final.parent.iterdir() if final.parent.is_dir() else ()
    leftovers = [path for path in beside if mine.fullmatch(path.name) and path.is_dir()]
    old = [path for path in leftovers if path.name.endswith("-old")]
    if not final.exists() and old:
        os.replace(max(old, key=lambda path: path.stat().st_mtime), final)
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def temporary_prefix(final: Path) -> str:
    """How the names of a folder's temporary neighbours begin; eight characters by chance follow. No folder of a user's is called so."""
    return f".{final.name}.eyas-"


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError where it cannot be written."""
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    work.write_text(text)
    os.replace(work, path)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def directory_hash(directory: Path) -> str:
    """sha256 over the weight files of a directory (of the file itself where there is one), and over nothing else: a model that was saved
    again is the same."""
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
