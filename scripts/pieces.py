"""A file in pieces, each below a size, that say by their names what they are pieces of: NAME-0003-1f2e3d4c5b6a7988-1of2.

Pieces are written one by one and may be lost with the machine at any moment. A later edition of a file stands beside the earlier one until
it is whole; whoever joins takes the latest whose hash is right. Knows bytes and folders; knows nothing of what they hold.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

PIECE = re.compile(r"(?P<name>[\w.-]+)-(?P<edition>\d{4})-(?P<hash>[0-9a-f]{16})-(?P<part>\d+)of(?P<count>\d+)")


def split(content: bytes, folder: Path, name: str, most: int) -> list[Path]:
    """Write `content` in pieces of at most `most` bytes, as the next edition of `name`; then delete earlier ones."""
    before = editions(folder, name)
    edition = max((number for number, _ in before), default=0) + 1
    told = hashlib.sha256(content).hexdigest()[:16]
    count = -(-max(len(content), 1) // most)
    pieces = [folder / f"{name}-{edition:04d}-{told}-{part}of{count}" for part in range(1, count + 1)]
    for index, piece in enumerate(pieces):
        unfinished = piece.with_suffix(".tmp")
        unfinished.write_bytes(content[index * most : (index + 1) * most])
        os.replace(unfinished, piece)
    for parts in before.values():
        for piece in parts.values():
            piece.unlink(missing_ok=True)
    return pieces


def join(folder: Path, name: str) -> bytes:
    """The latest whole edition of `name`. Raises FileNotFoundError where there is none."""
    for (_, told), parts in sorted(editions(folder, name).items(), reverse=True):
        content = b"".join(parts[part].read_bytes() for part in sorted(parts))
        if hashlib.sha256(content).hexdigest()[:16] == told:
            return content
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"no whole {name} in {folder} ({there})")


def editions(folder: Path, name: str) -> dict[tuple[int, str], dict[int, Path]]:
    """(number, hash) of each edition -> its pieces by part."""
    found: dict[tuple[int, str], dict[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (told := PIECE.fullmatch(path.name)) and told["name"] == name:
            found.setdefault((int(told["edition"]), told["hash"]), {})[int(told["part"])] = path
    return found
