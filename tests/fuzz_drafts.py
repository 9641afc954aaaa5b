"""Damages drafts in every layout and imports them: each must give one line or a draft, never a traceback, run nothing and take no memory.

    python -m tests.fuzz_drafts [--cases 1000] [--seed 0] [--out F.json]

A tiny random draft is written in each layout, then damaged in a seeded way: bytes flipped, files cut, keys of a config dropped, retyped or
inflated, tensors dropped, renamed, reshaped or made another number format, archives that claim more than they hold, pickles with code in
them. `eyas import --force` reads each over a folder that exists, in a process that may not take more than MEMORY above what it has.
Counted: what was refused in one line, what was read (many damages leave a draft whole: a flipped bit of a weight, say), and what went
wrong, which must be nothing. Knows layouts only through `eyas export` and `eyas import`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eyas import cli
from tests.tiny import save_tiny_draft, save_tiny_target

LAYOUTS = ("sglang", "vllm", "speculators", "safeailab-bin", "llama_cpp")
MEMORY = 1 << 30  # bytes above what the process has when the campaign begins
LAYERS = 8
Damage = Callable[[Path, random.Random], None]


# ---- damages: each changes a folder in place ----


def weights_file(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".gguf"))


def flip_bytes(folder: Path, draw: random.Random) -> None:
    path = draw.choice([weights_file(folder), folder / "config.json"]) if (folder / "config.json").exists() else weights_file(folder)
    held = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 4, 32])):
        most = len(held) if draw.random() < 0.3 else min(len(held), 4096)  # headers are where lengths and names are
        held[draw.randrange(most)] = draw.randrange(256)
    path.write_bytes(held)


def cut_file(folder: Path, draw: random.Random) -> None:
    path = weights_file(folder)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def inflate_number(folder: Path, draw: random.Random) -> None:
    """Eight bytes near the beginning become a huge length."""
    path = weights_file(folder)
    held = bytearray(path.read_bytes())
    place = draw.randrange(min(len(held) - 8, 2000))
    held[place : place + 8] = draw.choice([(1 << 62), (1 << 40), (1 << 33) - 1]).to_bytes(8, "little")
    path.write_bytes(held)


def config_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    return path, json.loads(path.read_text())


def inner(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The config or one of the objects in it."""
    return draw.choice([config] + [value for value in config.values() if isinstance(value, dict) and value])


def drop_key(folder: Path, draw: random.Random) -> None:
    path, config = config_of(folder)
    place = inner(config, draw)
    del place[draw.choice(sorted(place))]
    path.write_text(json.dumps(config))


def retype_key(folder: Path, draw: random.Random) -> None:
    path, config = config_of(folder)
    place = inner(config, draw)
    place[draw.choice(sorted(place))] = draw.choice(["text", None, [], {}, [1, 2], -1, 0.5, True, "1e9", [[]], {"a": 1}, "\u2028\n", 1e308])
    path.write_text(json.dumps(config))


def inflate_key(folder: Path, draw: random.Random) -> None:
    path, config = config_of(folder)
    place = inner(config, draw)
    numbers = sorted(key for key, value in place.items() if isinstance(value, (int, float)) and not isinstance(value, bool))
    if not numbers:
        return drop_key(folder, draw)
    place[draw.choice(numbers)] = draw.choice([10**6, 1 << 24, 1 << 31, 10**18, 10**400, -5])
    path.write_text(json.dumps(config))


def break_json(folder: Path, draw: random.Random) -> None:
    path = folder / "config.json"
    text = path.read_text()
    kinds = ["", "[" * 100_000, "null", text[: len(text) // 2], text.replace("{", "{,", 1), "\x00" * 50, '{"a": NaN}', text + text]
    path.write_text(draw.choice(kinds))


def change_tensors(folder: Path, draw: random.Random) -> None:
    """Drop, rename, reshape, retype or replace a tensor of safetensors or of a pickled checkpoint."""
    path = weights_file(folder)
    pickled = path.suffix == ".bin"
    tensors: dict[str, Any] = torch.load(path, weights_only=True) if pickled else load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.randrange(8 if pickled else 6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice(["layers.1.", "model.", "x" * 300, "\u202e", "midlayer.midlayer.", "fc_norm.7."]) + name] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone()
    elif kind == 3:
        tensors[name] = tensor.to(draw.choice([torch.int64, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.float64]))
    elif kind == 4:
        tensors[name] = torch.full_like(tensor, draw.choice([0, 1]) if tensor.dtype in (torch.bool, torch.int64) else float("nan"))
    elif kind == 5:
        tensors[name] = torch.zeros(0, dtype=tensor.dtype) if draw.random() < 0.5 else torch.zeros((), dtype=tensor.dtype)
    elif kind == 6:
        tensors[name] = torch.zeros(1).expand(1 << 20, 1 << 20)  # a tebibyte that takes four bytes in the file
    else:
        tensors[name] = draw.choice([{"more": tensor}, 7, "text", [tensor], None])
    if pickled:
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


class Runs:
    """A pickle of this would create a file where it is read."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def hide_code(folder: Path, draw: random.Random) -> None:
    """pytorch_model.bin with code: as an archive, or as a bare pickle."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    marker = str(folder.parent / "executed")
    if draw.random() < 0.5:
        torch.save({"fc.weight": Runs(marker)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(marker)))


def zip_bomb(folder: Path, draw: random.Random) -> None:
    """An archive whose parts are far larger than the file."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    path = folder / "pytorch_model.bin"
    if not path.exists():
        torch.save({"fc.weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, held in parts.items():
            archive.writestr(name, bytes(1 << 26) if "/data/" in name and name.endswith("0") else held)


DAMAGES: dict[str, Damage] = {
    "bytes flipped": flip_bytes,
    "file cut": cut_file,
    "length inflated": inflate_number,
    "key dropped": drop_key,
    "key retyped": retype_key,
    "key inflated": inflate_key,
    "config broken": break_json,
    "tensor changed": change_tensors,
    "code in a pickle": hide_code,
    "archive inflated": zip_bomb,
}
NO_CONFIG = {"bytes flipped", "file cut", "length inflated"}  # what a layout of one file can suffer


# ---- one case ----


def import_over(folder: Path, out: Path) -> tuple[int, str]:
    """`eyas import FOLDER OUT --force`: status and what it said on the standard error."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = cli.main(["import", str(folder), str(out), "--target-layers", str(LAYERS), "--force"])
    return status, said.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def judge(status: int, said: str, before: dict[str, bytes], out: Path, room: Path) -> str | None:
    """What is wrong with how a case ended, or None."""
    lines = said.splitlines()
    if status not in (0, 2):
        return f"status {status}"
    if status == 2 and (len(lines) != 1 or not lines[0].startswith("eyas: ")):
        return f"{len(lines)} lines: {said[:300]}"
    if status == 2 and contents(out) != before:
        return "what was there before has changed"
    if (room / "executed").exists():
        return "code was run"
    if strange := [path.name for path in room.iterdir() if path.name not in ("case", "out")]:
        return f"left behind {strange}"
    return None


def run_case(base: Path, name: str, draw: random.Random, room: Path) -> tuple[str, str | None]:
    """Damage a copy of `base` and import it: 'refused' or 'read', and what went wrong, if anything did."""
    case, out = room / "case", room / "out"
    for folder in (case, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, case)
    out.mkdir()
    (out / "config.json").write_text('{"draft_vocab_size": 1, "eyas": {"what": "was there"}}')
    before = contents(out)
    DAMAGES[name](case, draw)
    try:
        status, said = import_over(case, out)
    except BaseException:
        return "crashed", traceback.format_exc()[-1500:]
    return ("read" if status == 0 else "refused"), judge(status, said, before, out, room)


def make_bases(folder: Path) -> dict[str, Path]:
    """A tiny random target and draft, written in every layout."""
    target = save_tiny_target(folder / "target", num_hidden_layers=LAYERS)
    draft = save_tiny_draft(folder / "draft", target, taps=None)  # the default ones, which every engine can read
    bases = {"eyas": draft}
    for layout in LAYOUTS:
        with redirect_stdout(io.StringIO()):
            status = cli.main(["export", str(draft), str(folder / layout), "--to", layout, "--target", str(target)])
        assert status == 0, f"{layout} could not be written"
        bases[layout] = folder / layout
    return bases


def campaign(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of how `cases` damages ended, by damage, and every case that went wrong."""
    bases = make_bases(folder)
    room = folder / "room"
    room.mkdir()
    limit_memory()
    counts: dict[str, Counter[str]] = {name: Counter() for name in DAMAGES}
    wrong = []
    for number in range(cases):
        draw = random.Random(f"{seed}-{number}")
        layout = draw.choice(sorted(bases))
        name = draw.choice(sorted(NO_CONFIG if layout == "llama_cpp" else DAMAGES))
        ended, problem = run_case(bases[layout], name, draw, room)
        counts[name][ended] += 1
        if problem:
            wrong.append({"case": number, "layout": layout, "damage": name, "problem": problem})
            shutil.rmtree(room / "executed", ignore_errors=True)
    return {"cases": cases, "seed": seed, "counts": {name: dict(count) for name, count in counts.items()}, "wrong": wrong}


def limit_memory() -> None:
    """No more address space than MEMORY above what there is; an allocation beyond fails, and the case with it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eyas-fuzz-") as folder:
        told = campaign(options.cases, options.seed, Path(folder))
    text = json.dumps(told, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    sys.exit(bool(told["wrong"]))


if __name__ == "__main__":
    main()
