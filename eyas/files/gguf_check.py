"""Whether a GGUF's header is honest. The library that reads a GGUF follows the lengths it claims, so they are compared with the file first.

Knows the container; nothing of what is in it.
"""

from __future__ import annotations

import struct
from pathlib import Path

from eyas.config import EyasError

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a scalar, by its type number
STRING, ARRAY = 8, 9


class Header:
    """Walks a GGUF header without believing it."""

    def __init__(self, path: Path) -> None:
        self.file, self.left = open(path, "rb"), path.stat().st_size  # noqa: SIM115 (closed by check_gguf)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EyasError(f"claims {count} bytes where {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise EyasError(f"claims {count} bytes where {self.left} are left")
        self.left -= count
        self.file.seek(count, 1)

    def number(self, form: str = "<Q") -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == STRING:
            self.skip(self.number())
        elif kind == ARRAY and depth == 0:
            inner, count = self.number("<I"), self.number()
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            elif 8 * count > self.left:
                raise EyasError(f"claims a list of {count} where {self.left} bytes are left")
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise EyasError(f"has a field of type {kind}, which there is not")


def check_gguf(path: Path) -> None:
    """Raise `EyasError` where the file is no GGUF, or its header claims more than the file holds."""
    header = Header(path)
    try:
        if header.take(4) != b"GGUF" or header.number("<I") not in (2, 3):
            raise EyasError("is not a GGUF file of version 2 or 3")
        tensors, fields = header.number(), header.number()
        if 24 * tensors + 12 * fields > header.left:
            raise EyasError(f"claims {tensors} tensors and {fields} fields")
        for _ in range(fields):
            header.skip(header.number())
            header.value(header.number("<I"))
        for _ in range(tensors):
            header.skip(header.number())
            if (dimensions := header.number("<I")) > 8:
                raise EyasError(f"has a tensor of {dimensions} dimensions")
            header.skip(8 * dimensions + 12)
    except EyasError as error:
        raise EyasError(f"{path} cannot be read as GGUF: it {error}") from None
    finally:
        header.file.close()
