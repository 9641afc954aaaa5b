"""The target writes on a GPU, in this process: very many conversations at once, each noted as soon as it is whole.

Its text is kept as tokens (texts.py): on a card their states are a prefill away. Knows the two writers, the journal and how much memory a
conversation takes; knows nothing of drafts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from eyas.config import EyasError, TargetConfig
from eyas.kernels.captured import NotCaptured
from eyas.model.protocols import TargetModel
from eyas.train.dialogue import Conversation, Dialogues
from eyas.train.fixed_writer import FixedWriter
from eyas.train.fixed_writer import fits as steps_fit
from eyas.train.journal import JOURNAL, Journal, Noted, packed
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Writer
from eyas.train.shards import claim_folder, data_folder
from eyas.train.template import Template
from eyas.train.writers import Limit

MOST_SLOTS, LEAST_SLOTS = 2048, 8
ANY_ROWS = 256  # conversations at once of a target whose steps have no fixed shapes: more would wait for the host
SHARE = 0.6  # of the free memory, for keys and values
A_SLOT = 250  # answer tokens that a slot writes before the end is near: for few tokens fewer slots, since what is under way then is lost


@dataclass(frozen=True)
class DevicePlay(SelfPlay):
    """The settings of text that is written on another device than the CPU: it rounds otherwise, so the text is another."""

    device: str = ""  # its kind

    @classmethod
    def of(cls, settings: SelfPlay, device: torch.device) -> DevicePlay:
        return cls(**{field.name: getattr(settings, field.name) for field in fields(SelfPlay)}, device=device.type)


def slots_for(config: TargetConfig, itemsize: int, longest: int, tokens: float, free: int | None) -> int:
    """How many conversations are written at once: as many as the memory holds, and no more than so many answer tokens need. Raises
    `EyasError` where not even a few fit."""
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    room = MOST_SLOTS if free is None else int(SHARE * free / (row * longest))
    if room < LEAST_SLOTS:
        needed = f"{LEAST_SLOTS * row * longest / 1e9:.1f} GB for {LEAST_SLOTS} conversations of {longest} tokens at once"
        words = f"{needed}, {(free or 0) / 1e9:.1f} are free"
        raise EyasError(f"the device has too little memory left to write: {words}; let an engine write (--writer), or write on the CPU")
    wanted = MOST_SLOTS if math.isinf(tokens) else max(LEAST_SLOTS, int(tokens / A_SLOT))
    return min(room, wanted, MOST_SLOTS)


def write_here(
    target: TargetModel, template: Template, settings: DevicePlay, given: Sequence[Asked], limit: Limit, report: Callable[[int], None]
) -> Path:
    """Let a prepared target write until `limit`, where the folder does not hold enough already. A file of text: the first conversations
    that hold the limit's tokens, or all. Whatever is whole when it is interrupted is kept."""
    folder = data_folder(settings)
    claim_folder(folder, settings)
    journal = Journal(folder / JOURNAL)
    deadline = time.monotonic() + 60 * limit.minutes

    report(int(min(journal.answer_tokens, limit.tokens)))
    try:
        if not journal.enough(limit, deadline):
            longest = min(settings.longest, target.config.max_position_embeddings)
            last = len(given) if settings.regenerate else None
            indices = missing(Dialogues(template, settings, given, longest), journal, limit.tokens, last)
            for index, row in conversations(target, template, settings, given, indices, limit.tokens):
                journal.add(Noted.of(row, True) if row is not None else Noted(index, [], [], 0.0, False))
                report(int(min(journal.answer_tokens, limit.tokens)))
                if journal.enough(limit, deadline):
                    break
    finally:
        journal.close()
    return packed(journal.in_order(limit.tokens), settings, folder, "the target")


def conversations(
    target: TargetModel, template: Template, settings: DevicePlay, given: Sequence[Asked], indices: Iterator[int], tokens: float
) -> Iterator[tuple[int, Conversation | None]]:
    """The conversations of these indices as they end, in the form that suits the target; `tokens`: how many of answers are wanted."""
    config = target.config
    longest = min(settings.longest, config.max_position_embeddings)
    free = torch.cuda.mem_get_info(target.device)[0] if target.device.type == "cuda" else None
    slots = slots_for(config, target.dtype.itemsize, longest, tokens, free)
    if steps_fit(target):
        try:
            fixed = FixedWriter(target, template, settings, given, slots)
        except NotCaptured:  # it has said so
            pass
        else:
            yield from fixed.write(indices)
            return
    with torch.inference_mode():
        for index, finished in Writer(target, template, settings, given, min(slots, ANY_ROWS)).write(indices):
            yield index, finished and finished.row


def missing(dialogues: Dialogues, journal: Journal, tokens: float, last: int | None) -> Iterator[int]:
    """The numbers of conversations that are not there. Those that follow one another are written together or not at all."""
    for run in dialogues.runs(itertools.count() if last is None else iter(range(last))):
        if journal.begins_no_more(run, tokens):
            return
        if not all(index in journal.noted for index in run):
            yield from run
