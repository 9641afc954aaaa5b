"""A data file is read for what it is, whatever its name; what is broken is named, and what stands before it is kept."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from eyas.config import EyasError
from eyas.files import records as module
from eyas.files.records import REFUSED_STARTS, records

ROWS = [{"id": number, "text": f'{{["ü\u2028\\ {number}' * 3} for number in range(5)]


def values(path):
    return [value for _, value in records(path, "conversation")]


def places(path):
    return [place.name for place, _ in records(path, "conversation")]


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n  \n"])
@pytest.mark.parametrize("shape", ["lines", "array", "objects"])
def test_lines_arrays_and_pretty_printed_objects_are_read_alike(tmp_path, shape, mark, packed, indent):
    if shape == "lines":
        text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    elif shape == "array":
        text = json.dumps(ROWS, indent=indent)
    else:
        text = "\n".join(json.dumps(row, indent=indent or 1) for row in ROWS)
    path = tmp_path / "data.any"
    content = mark + text.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert values(path) == ROWS
    if shape != "objects":
        blank = mark.count(b"\n")
        assert places(path)[1] == {"lines": f"line {3 + blank}", "array": "entry 2"}[shape]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50, 10_000])
def test_where_a_piece_ends_changes_nothing(tmp_path, monkeypatch, piece):
    """Pieces of the text, that is: the file's own first one must show what the file is."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    read = module.piece_of
    monkeypatch.setattr(module, "piece_of", lambda text, size, path: read(text, piece, path))
    assert values(path) == ROWS


def test_pretty_printed_objects_are_named_by_their_first_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n\n".join(json.dumps(row, indent=1) for row in ROWS[:3]))
    lines = path.read_text().split("\n")
    assert places(path) == [f"line {number}" for number, line in enumerate(lines, start=1) if line == "{"]


def test_a_large_array_is_never_held_whole(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 3000))
    asked, read = [], module.piece_of
    monkeypatch.setattr(module, "piece_of", lambda text, size, path: asked.append(size) or read(text, size, path))
    found = records(path, "conversation")
    next(found)
    assert sum(asked) < path.stat().st_size / 10
    assert len(list(found)) == 2999 and max(asked) <= 2 * module.PIECE


@pytest.mark.parametrize(
    ("text", "read", "complaint"),
    [
        ('[{"a": 1}, {"a": 2},\n]', 2, None),  # a comma too many is forgiven
        ('{"a": 1},\n{"a": 2},\n', 2, None),
        ('[{"a": 1}, {"a": tru}, {"a": 3}]', 1, "entry 2: not JSON (Expecting value); the file was read up to here"),
        ('[{"a": 1}, {"a": 2}', 2, "entry 3: it ends before the array does; the file was read up to here"),
        ('[{"a": 1}, [2], {"a": 3}]', 2, "entry 2: not a JSON object but a list"),
        ('{"a": 1}\n[1, 2]\n{"a": 3}', 2, "line 2: not a JSON object but a list"),
        ('[1, 2]\n{"a": 3}', 1, "line 1: not a JSON object but a list"),  # lines, of which the first is wrong
        ('{\n[1]\n{"a": 1}\n', 1, "line 1: not JSON"),
    ],
)
def test_what_is_broken_is_named_and_the_rest_is_kept(tmp_path, text, read, complaint):
    path = tmp_path / "data"
    path.write_text(text)
    found = list(records(path, "conversation"))
    assert sum(isinstance(value, dict) for _, value in found) == read
    complaints = [f"{place.name}: {value}" for place, value in found if isinstance(value, EyasError)]
    assert complaints[0].startswith(complaint) if complaint else not complaints


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_what_is_not_read_is_named_with_the_way_out(tmp_path, start):
    path = tmp_path / "data.jsonl"
    path.write_bytes(start + b"\0\0\0\0")
    with pytest.raises(EyasError, match=r"unpack it first|save it as|fetch the file itself") as caught:
        values(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_gzip_that_is_cut_off_is_one_line(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-12])
    with pytest.raises(EyasError, match="gzip is cut off or broken"):
        values(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    with pytest.raises(EyasError, match=r"pip install 'eyas\[parquet\]'"):
        values(path)


def test_parquet_rows_come_without_the_nulls_that_a_table_adds(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="parquet is an extra: pip install 'eyas[parquet]'")
    from pyarrow import parquet

    first = {"messages": [{"role": "user", "content": "hi"}]}
    rows = [first, {"messages": [{"role": "tool", "content": "12", "name": "w"}], "tools": "[]"}]
    path = tmp_path / "data.parquet"
    parquet.write_table(arrow.Table.from_pylist([{**first, "tools": None}, rows[1]]), path, row_group_size=1)
    assert values(path) == rows and places(path) == ["row 1", "row 2"]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(EyasError, match="pyarrow cannot read it"):
        values(path)
