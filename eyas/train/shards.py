"""Self-written conversations on disk: shards of a few conversations each, in a folder that carries the key of what made it.

A shard is written whole or not at all. Shard n holds conversations `per_shard * n` to `per_shard * (n + 1) - 1` of its folder's settings,
without those that were dropped. Knows files; knows nothing of how text comes to be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eyas.config import EyasError, cache_dir
from eyas.train.questions import SelfPlay
from eyas.train.selfplay import Finished, Writer

PATTERN = "[0-9]" * 8 + ".safetensors"


# ---- one shard ----


def save_shard(path: Path, conversations: Sequence[Finished | None], width: int, taps: int = 3) -> int:
    """Save tokens, lengths, answer numbers, features and hidden states of these conversations; returns the number of answer tokens.

    None stands for a conversation that was dropped: it is counted. `width`: the target's hidden size.
    """
    kept = [finished for finished in conversations if finished is not None]
    rows = [finished.row for finished in kept]
    nothing = torch.empty(0, width, dtype=torch.bfloat16)
    tensors = {
        "tokens": torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),
        "answers": torch.tensor([number for row in rows for number in row.numbers()], dtype=torch.int32),
        "temperatures": torch.tensor([row.start.temperature for row in rows], dtype=torch.float32),
        "features": torch.cat([nothing.new_empty(0, taps * width), *(finished.features for finished in kept)]),
        "hidden": torch.cat([nothing, *(finished.hidden for finished in kept)]),
        "favourites": torch.cat([torch.empty(0, dtype=torch.int32), *(finished.target_argmax for finished in kept)]),
    }
    answers = int((tensors["answers"] >= 0).sum())
    counted = {"answer_tokens": answers, "dropped": len(conversations) - len(kept), "looped": sum(row.looped for row in rows)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"counts": json.dumps(counted)})  # one entry, since several would have no fixed order
    os.replace(temporary, path)
    return answers


class Written(NamedTuple):
    """A conversation as it was written, without the target's states."""

    tokens: list[int]
    answers: list[int]  # for each token the number of its answer; -1 outside
    temperature: float  # of its answers


def written_in(path: Path) -> Iterator[Written]:
    """The conversations of a shard, in its order."""
    with safe_open(path, framework="pt") as file:
        tokens, lengths = file.get_tensor("tokens").tolist(), file.get_tensor("lengths").tolist()
        numbers, temperatures = file.get_tensor("answers").tolist(), file.get_tensor("temperatures").tolist()
    start = 0
    for length, temperature in zip(lengths, temperatures, strict=True):
        own = slice(start, start + length)
        yield Written(tokens[own], numbers[own], temperature)
        start += length


@dataclass(frozen=True)
class Counts:
    """What a shard, or a folder of them, holds."""

    answer_tokens: int = 0
    dropped: int = 0  # conversations with too little of an answer
    looped: int = 0  # answers cut where they began to loop
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(ours + theirs for ours, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def counts_of(path: Path) -> Counts:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["counts"])
        return Counts(**told, bytes=path.stat().st_size)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise EyasError(f"{path} is damaged or no shard of this form ({error}); delete it and it will be written again") from None


# ---- a folder ----


def data_folder(settings: SelfPlay) -> Path:
    """The folder for shards of these settings; other settings have another one."""
    return cache_dir() / "selfplay" / settings.digest()


def number_of(path: Path) -> int:
    return int(path.name.split(".")[0])


class Folder:
    """The shards of a folder; the counts of each are read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[int, Counts] = {}

    def file(self, number: int) -> Path:
        return self.path / f"{number:08d}.safetensors"

    def look(self) -> Folder:
        """Read the counts of the shards that were written since the last look."""
        for path in self.path.glob(PATTERN):
            if (number := number_of(path)) not in self.counts:
                self.counts[number] = counts_of(path)
        return self

    def total(self) -> Counts:
        return sum(self.counts.values(), Counts())

    def in_order(self, tokens: int) -> list[int] | None:
        """The first shards, none left out, that together hold `tokens` answer tokens; None while there are not enough.

        Which these are does not depend on how many workers wrote them, or when.
        """
        found: list[int] = []
        held = 0
        while held < tokens:
            if len(found) not in self.counts:
                return None
            held += self.counts[len(found)].answer_tokens
            found.append(len(found))
        return found


def claim_folder(folder: Path, settings: SelfPlay) -> None:
    """Mark a folder with the settings that its shards are written with. Raises `EyasError` for a folder of other settings."""
    key = json.loads(json.dumps(asdict(settings)))
    marker = folder / "key.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EyasError(f"cannot write {folder} ({error.strerror}); set EYAS_CACHE to a directory that can be written") from None
    if marker.exists():
        found = settings_of_folder(folder)
        different = [name for name in key.keys() | found.keys() if key.get(name) != found.get(name)]
        if different:
            raise EyasError(
                f"{folder} holds self-written data of other settings ({', '.join(sorted(different))} differ); name another folder"
            )
    else:
        replaced = marker.with_suffix(f".{os.getpid()}.tmp")
        replaced.write_text(json.dumps(key, indent=1))
        os.replace(replaced, marker)


def settings_of_folder(folder: Path) -> dict[str, Any]:
    """The settings of a folder of shards, as `claim_folder` wrote them there."""
    try:
        return json.loads((folder / "key.json").read_text())
    except (OSError, ValueError):
        raise EyasError(f"{folder} is not a folder of self-written shards (its key.json cannot be read); leave it out") from None


def check_shards(folder: Path, settings: SelfPlay) -> None:
    """Shards of other settings may train together, but only where the same target, template and taps wrote them, in the same form."""
    check_writing(folder, settings_of_folder(folder), settings, ("target", "template", "taps", "version"))


def check_writing(path: Path, found: Mapping[str, Any], settings: SelfPlay, names: Sequence[str]) -> None:
    """Raise `EyasError` where what `found` says of these settings is not what `settings` say."""
    wanted = json.loads(json.dumps(asdict(settings)))
    different = [name for name in names if found.get(name) != wanted[name]]
    if found.get("read") not in (None, "", wanted["read"]):  # not everything that was written says it
        different.append("the target's config or tokenizer")
    if different:
        raise EyasError(f"{path} was written by another target or in another way ({', '.join(different)} differ); leave it out")


# ---- writing ----


def write_shards(writer: Writer, folder: Folder, numbers: Iterator[int]) -> Iterator[int]:
    """Write the shards of these numbers, and yield the number of each once it is written. Conversations in flight may belong to several."""
    settings, questions = writer.settings, len(writer.dialogues.questions.given)
    last = questions if settings.regenerate else None
    held: dict[int, dict[int, Finished | None]] = {}

    def indices() -> Iterator[int]:
        for number in numbers:
            first = number * settings.per_shard
            if last is not None and first >= last:
                return
            yield from range(first, first + size(number))

    def size(number: int) -> int:
        return settings.per_shard if last is None else min(settings.per_shard, last - number * settings.per_shard)

    for index, finished in writer.write(indices()):
        number = index // settings.per_shard
        shard = held.setdefault(number, {})
        shard[index] = finished
        if len(shard) == size(number):
            save_shard(folder.file(number), [shard[i] for i in sorted(shard)], writer.target.config.hidden_size, len(settings.taps))
            del held[number]
            yield number
