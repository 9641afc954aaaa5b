"""The objects of a data file: JSON Lines, a JSON array or pretty-printed objects, plain or gzipped, and parquet.

Told apart by what the file begins with, never by its name. Knows nothing of what the objects hold. A file is read a piece at a time, so it
may be larger than memory.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from eyas.config import EyasError
from eyas.files.disk import POINTER

T = TypeVar("T")
PIECE = 1 << 16  # bytes or characters that are read at a time
BOM = b"\xef\xbb\xbf"
BETWEEN = re.compile(r"[\s,]*")  # what may stand between two values; a comma too many is forgiven
KINDS = {  # how a file is told apart: (kind, what it begins with, what its objects are counted as)
    "JSON Lines": ("anything else: one object on each line", "line"),
    "JSON array": ("`[`, on one line or over several", "entry"),
    "pretty-printed JSON objects": ("`{` alone on its line, then a key", "line"),
    "gzip of any of these": ("the bytes 1f 8b", "as inside"),
    "parquet": ("`PAR1`; read by pyarrow (`pip install 'eyas[parquet]'`)", "row"),
}
REFUSED_STARTS = {
    POINTER: "the pointer that Git LFS leaves in a file's place; fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a web page; fetch the file itself",
    b"<html": "a web page; fetch the file itself",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first (zstd -d)",
    b"BZh": "compressed with bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz; unpack it first (unxz)",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"ARROW1": "an Arrow file; save it as JSON Lines or parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; save it as JSON Lines or parquet",
    b"\xff\xfe": "UTF-16; save it as UTF-8 text",
    b"\xfe\xff": "UTF-16; save it as UTF-8 text",
}


class Place(NamedTuple):
    """Where an object stands in its file."""

    number: int  # counted from 1: the line, or the entry of an array, or the row of a table
    name: str  # for messages: "line 3"


Record = tuple[Place, "dict[str, Any] | EyasError"]  # an object, or why it cannot be used


def read_objects(
    path: str | Path, parse: Callable[[dict[str, Any]], T], what: str, form: str, limit: int | None = None
) -> tuple[list[tuple[Place, T]], list[str]]:
    """(place, parsed object) of up to `limit` usable objects, and a complaint for each that was skipped on the way.

    `parse` raises EyasError for an object it cannot use. Raises EyasError if the file cannot be read or no object is usable; `what` (a
    prompt, say) and `form` (how an object is written) are for that message.
    """
    found: list[tuple[Place, T]] = []
    complaints: list[str] = []
    for place, value in records(path, what):
        if len(found) == limit:
            break
        try:
            if isinstance(value, EyasError):
                raise value
            found.append((place, parse(value)))
        except EyasError as error:
            complaints.append(f"{place.name}: {error}")
    if not found:
        reason = complaints[0] if complaints else "the file is empty"
        raise EyasError(f"{path}: no {what} could be read ({reason}); write one JSON object a line, say {form}")
    return found, complaints


def records(path: str | Path, what: str) -> Iterator[Record]:
    """What a file holds, object by object. Raises EyasError if it cannot be read; one that is broken is a record that says so."""
    try:
        with io.BufferedReader(io.FileIO(path), PIECE) as file:
            start = file.peek(8)
            for magic, reason in REFUSED_STARTS.items():
                if start.startswith(magic):
                    raise EyasError(f"{path} is {reason}")
            if start.startswith(b"PAR1"):
                yield from parquet_rows(path)
            elif start.startswith(b"\x1f\x8b"):
                unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=file))
                yield from json_records(io.BufferedReader(unpacked, PIECE), path)
            else:
                yield from json_records(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EyasError(f"{path}: its gzip is cut off or broken ({error}); fetch or make it again") from None
    except OSError as error:
        raise EyasError(f"{path}: cannot be read ({error.strerror}); give a file of {what}s, JSON Lines say") from None


def json_records(stream: io.BufferedReader[Any], path: str | Path) -> Iterator[Record]:
    head = stream.peek(PIECE).removeprefix(BOM).lstrip()
    first, _, rest = head.partition(b"\n")
    if head.startswith(b"[") and not (rest.strip() and is_json(first)):
        return json_values(stream, path, "entry")
    if first.strip() == b"{" and rest.lstrip().startswith((b'"', b"}")):
        return json_values(stream, path, "line")
    return json_lines(stream, path)


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(stream: io.BufferedReader[Any], path: str | Path) -> Iterator[Record]:
    """Lines that are not blank, counted from 1. Only "\\n" ends one: splitlines would also cut at U+2028, which JSON allows."""
    place = 0
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise EyasError(f"{path}: not UTF-8 (byte {place + len(raw) - len(line) + error.start}); save it as UTF-8 text") from None
        place += len(raw)
        if text.strip():
            yield Place(number, f"line {number}"), object_of(text)


def object_of(line: str) -> dict[str, Any] | EyasError:
    """The object that a line holds (a comma after it is forgiven), or what is wrong with it."""
    try:
        return an_object(json.loads(line.strip().removesuffix(",")))
    except (ValueError, RecursionError) as error:
        return EyasError(f"not JSON ({' '.join(str(error).split())})")


def an_object(value: Any) -> dict[str, Any] | EyasError:
    return value if isinstance(value, dict) else EyasError(f"not a JSON object but a {type(value).__name__}")


def json_values(stream: io.BufferedReader[Any], path: str | Path, unit: str) -> Iterator[Record]:
    """The entries of an array, or objects that follow one another over lines of their own, decoded one at a time from pieces of the file.

    After a broken one there is no telling where the next begins: it is reported, and the reading ends.
    """
    text, decoder = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), json.JSONDecoder()
    array, number, line = unit == "entry", 0, 1
    buffer, at = piece_of(text, PIECE, path).lstrip(), 0
    if array:
        at = 1  # after the bracket
    problem = "it ends before the array does"
    while True:
        begin, at = at, BETWEEN.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        line += buffer.count("\n", begin, at)
        if array and buffer.startswith("]", at):
            return
        place = Place(number + 1, f"entry {number + 1}") if array else Place(line, f"line {line}")
        if at < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({getattr(error, 'msg', error)})"
            else:
                yield place, an_object(value)
                line, at, number = line + buffer.count("\n", at, end), end, number + 1
                continue
        more = piece_of(text, max(PIECE, len(buffer) - at), path)
        if not more:
            if array or at < len(buffer):
                yield place, EyasError(f"{problem}; the file was read up to here")
            return
        buffer, at = buffer[at:] + more, 0


def piece_of(text: io.TextIOWrapper, size: int, path: str | Path) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError:
        raise EyasError(f"{path}: not UTF-8; save it as UTF-8 text") from None


def parquet_rows(path: str | Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EyasError(f"{path} is parquet, which pyarrow reads: pip install 'eyas[parquet]', or save it as JSON Lines") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Place(number, f"row {number}"), without_nulls(row)
    except ArrowException as error:
        raise EyasError(f"{path}: pyarrow cannot read it ({' '.join(str(error).split())})") from None


def without_nulls(value: Any) -> Any:
    """A value without the nulls of its objects: a table gives every object every field that any of its rows has."""
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value
