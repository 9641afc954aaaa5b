"""Self-written text as tokens alone: one file of about two bytes a token, in the place of shards whose states take kilobytes a token.

Ten million tokens are 20 MB, so text can travel and be kept where its states cannot; whoever trains on it lets the target read it again
(features.py: KeptStates). It serves any taps. Knows shards and files; knows nothing of models or drafts.

The file is safetensors of D conversations, M tokens and A answers, laid end to end:

    tokens        [M]     uint16, or int32 where ids are larger
    lengths       [D]     int32, tokens of a conversation
    temperatures  [D]     float32, of its answers
    answers_of    [D]     int32, how many answers it has
    answers       [A, 2]  int32, where an answer begins in its conversation, and where it has ended
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eyas.config import EyasError
from eyas.files.disk import check_fetched
from eyas.train.features import Example, written_examples
from eyas.train.questions import SelfPlay
from eyas.train.shards import PATTERN, Counts, Written, check_writing, counts_of, settings_of_folder, written_in

SAME = ("target", "template", "version")  # settings in which texts of one file, or of one training, agree


class Text(NamedTuple):
    """What a file of text says of itself."""

    settings: list[dict[str, Any]]  # of SelfPlay, one for each folder that it was made of
    counts: Counts


def pack_text(folders: Sequence[Path], out: Path) -> Text:
    """Write the text of some folders of shards into one file, whole or not at all. Raises `EyasError` where there is none, or where it was
    not all written by one target in one way."""
    settings = [settings_of_folder(folder) for folder in folders]
    for folder, found in zip(folders, settings, strict=True):
        if different := [name for name in SAME if found.get(name) != settings[0].get(name)]:
            raise EyasError(f"{folder} and {folders[0]} were not written alike ({', '.join(different)} differ); pack them apart")
    shards = [shard for folder in folders for shard in sorted(folder.glob(PATTERN))]
    conversations = [written for shard in shards for written in written_in(shard)]
    if not conversations:
        raise EyasError(f"{', '.join(map(str, folders))} hold no conversation")
    write_text(conversations, settings, sum(map(counts_of, shards), Counts()), out)
    return read_facts(out)


def write_text(conversations: Sequence[Written], settings: Sequence[dict[str, Any]], counts: Counts, out: Path) -> None:
    """Write conversations into one file, whole or not at all. `settings`: of SelfPlay, one for each way in which they were written."""
    told = {"settings": list(settings), "counts": asdict(counts) | {"bytes": 0}}  # which are those of states
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_file(laid_end_to_end(conversations), temporary, metadata={"text": json.dumps(told)})
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise EyasError(f"cannot write {out} ({error})") from None


def laid_end_to_end(conversations: Sequence[Written]) -> dict[str, Tensor]:
    spans = [list(answer_spans(written.answers)) for written in conversations]
    tokens = torch.tensor([token for written in conversations for token in written.tokens], dtype=torch.int32)
    small = len(tokens) == 0 or int(tokens.max()) < 1 << 16
    return {
        "tokens": tokens.to(torch.uint16) if small else tokens,
        "lengths": torch.tensor([len(written.tokens) for written in conversations], dtype=torch.int32),
        "temperatures": torch.tensor([written.temperature for written in conversations], dtype=torch.float32),
        "answers_of": torch.tensor(list(map(len, spans)), dtype=torch.int32),
        "answers": torch.tensor([span for own in spans for span in own], dtype=torch.int32).view(-1, 2),
    }


def answer_spans(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each answer begins and where it has ended. Answers are numbered in the order in which they lie."""
    place = 0
    for number, run in groupby(numbers):
        begun, place = place, place + len(list(run))
        if number >= 0:
            yield begun, place


def read_facts(path: Path) -> Text:
    """What a file of text says of itself. Raises `EyasError` where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["text"])
        counts = Counts(**told["counts"] | {"bytes": path.stat().st_size})
        return Text(list(told["settings"]), counts)
    except FileNotFoundError:
        raise EyasError(f"{path} does not exist") from None
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        if path.is_file():
            check_fetched(path)
        raise EyasError(f"{path} is no file of self-written text ({error}); scripts/pack_text.py makes one of folders of shards") from None


def read_text(path: Path) -> Iterator[Written]:
    """The conversations of a file of text, in its order."""
    names = ("tokens", "lengths", "temperatures", "answers_of", "answers")
    with safe_open(path, framework="pt") as file:
        tokens, lengths, temperatures, counts, spans = (file.get_tensor(name).tolist() for name in names)
    start = first = 0
    for length, temperature, count in zip(lengths, temperatures, counts, strict=True):
        numbers = [-1] * length
        for number, (begun, ended) in enumerate(spans[first : first + count]):
            numbers[begun:ended] = [number] * (ended - begun)
        yield Written(tokens[start : start + length], numbers, temperature)
        start, first = start + length, first + count


def text_examples(paths: Sequence[Path], max_length: int) -> list[Example]:
    """Examples of files of text: those of the shards that they were made of, without their states."""
    return [example for path in paths for written in read_text(path) for example in written_examples(written, max_length)]


def check_text(path: Path, settings: SelfPlay) -> Text:
    """What a file of text says of itself. Raises `EyasError` where another target wrote it, or in another way; its taps do not matter."""
    text = read_facts(path)
    for found in text.settings:
        check_writing(path, found, settings, SAME)
    return text
