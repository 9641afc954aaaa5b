"""Processes of one thread each in which the target writes, until there is enough text, time is up, or the disk's share is used.

Each worker writes every n-th shard that is missing, so a folder's first shards hold the same text however many workers there were and
however often they were killed (where a row's sums do not depend on the pass's other rows: kernels/native.py). Knows shards and processes.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch

from eyas import plugins
from eyas.config import EyasError
from eyas.decode.memory import free_bytes
from eyas.files.target import target_config
from eyas.kernels import native
from eyas.kernels.linear import cpu_multiplies_bfloat16
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import SLOTS, Writer
from eyas.train.shards import Counts, Folder, claim_folder, write_shards
from eyas.train.template import Template

GRACE = 2.0  # minutes over the time that writing may take until there are two conversations
SPARE_BYTES = 2 << 30  # bytes of the disk that are left free whatever the budget


@dataclass(frozen=True)
class Limit:
    """When writing ends: when the first of these limits is reached."""

    tokens: float = math.inf  # answer tokens
    minutes: float = math.inf
    bytes: float = math.inf  # of all shards together

    @staticmethod
    def late(deadline: float, kept: Callable[[], int]) -> bool:
        """Whether the minutes are over, at `deadline` on the clock of time.monotonic, with a conversation to train on and one to measure
        with, if they come soon. `kept`: how many there are."""
        over = time.monotonic() - deadline
        return over >= 60 * GRACE or (over >= 0 and kept() > 1)


def write_own_data(
    directory: Path,
    folder: Path,
    settings: SelfPlay,
    questions: Sequence[Asked],
    limit: Limit,
    workers: int,
    report: Callable[[int], None],
) -> list[Path]:
    """Let workers write until `limit`, and return the shards to train on: with a limit of tokens the first shards that hold them, else all.
    Raises `EyasError` where the disk's share or the workers end before there is enough."""
    claim_folder(folder, settings)
    deadline = time.monotonic() + 60 * limit.minutes
    shards = Folder(folder).look()
    last = -(-len(questions) // settings.per_shard) if settings.regenerate else math.inf

    def done() -> bool:
        total = shards.look().total()
        enough = math.isfinite(limit.tokens) and shards.in_order(int(limit.tokens)) is not None
        kept = settings.per_shard * len(shards.counts) - total.dropped
        return enough or limit.late(deadline, lambda: kept) or full(total.bytes) or len(shards.counts) >= last

    def full(used: int) -> bool:
        return used >= limit.bytes or shutil.disk_usage(folder).free < SPARE_BYTES

    report(int(min(shards.total().answer_tokens, limit.tokens)))
    if not done():
        workers = affordable(workers, directory, settings)
        write_in_processes(directory, shards, settings, questions, workers, limit, done, report)
    total = shards.total()
    chosen = shards.in_order(int(limit.tokens)) if math.isfinite(limit.tokens) else sorted(shards.counts)
    short = (chosen is None and len(shards.counts) < last) or total.answer_tokens == 0
    if short and full(total.bytes):
        raise EyasError(
            f"{folder} has used its share of the disk ({total.bytes / 1e9:.1f} GB) at {total.answer_tokens} answer tokens; "
            "ask for fewer, or give more with --disk"
        )
    if time.monotonic() >= deadline and settings.per_shard * len(shards.counts) - total.dropped < 2:
        raise EyasError(f"in {limit.minutes + GRACE:.1f} minutes the target wrote nothing to train on: {nothing_kept(total, settings)}")
    if short or not done():
        raise EyasError(f"the target stopped writing at {total.answer_tokens} answer tokens; see the error above")
    return [shards.file(number) for number in (sorted(shards.counts) if chosen is None else chosen)]


def nothing_kept(total: Counts, settings: SelfPlay) -> str:
    """Why nothing is there to train on, and what to do."""
    see = "see with `eyas generate` how its answers end, or give more time"
    if total.dropped:
        return f"{total.dropped} conversations were dropped, their answers shorter than 8 tokens; {see}"
    never = f"an answer that never ends runs to {settings.longest_answer} tokens"
    return f"not yet {settings.per_shard} conversations have ended ({never}, so does one without an end-of-turn token); {see}"


def write_in_processes(
    directory: Path,
    shards: Folder,
    settings: SelfPlay,
    questions: Sequence[Asked],
    workers: int,
    limit: Limit,
    done: Callable[[], bool],
    report: Callable[[int], None],
) -> None:
    for unfinished in shards.path.glob("*.tmp"):  # left by a writer that was killed
        unfinished.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    slots, there = slots_for(limit), frozenset(shards.counts)  # listed once: workers that each looked would divide different lists
    processes = [
        context.Process(target=work, args=(directory, shards.path, settings, list(questions), slots, there, number, workers), daemon=True)
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) and not done():
            wait([process.sentinel for process in processes if process.is_alive()], timeout=2.0)
            report(int(min(shards.total().answer_tokens, limit.tokens)))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    shards.look()


def slots_for(limit: Limit) -> int:
    """How many conversations a worker writes at once; fewer where little is wanted. 64 are written 1.8 times as fast as 16 (438 tokens a
    second, 240), but their first shards come after two minutes and more, and unfinished ones are lost at the end."""
    return SLOTS if limit.minutes > 5 and limit.tokens > 50_000 else SLOTS // 4


def affordable(workers: int, directory: Path, settings: SelfPlay) -> int:
    """How many of the workers half of the free memory can hold, at least one; all of them where the system does not tell free memory."""
    free = free_bytes()
    if free is None:
        return workers
    config = target_config(directory)
    weights = 3 * sum(file.stat().st_size for file in directory.glob("*.safetensors"))  # as stored, in float32 while loading
    keys = 8 * SLOTS * settings.longest * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # at most 4 bytes each
    return max(1, min(workers, int(free // 2 // (weights + keys))))


def work(
    directory: Path, folder: Path, settings: SelfPlay, questions: list[Asked], slots: int, there: frozenset[int], number: int, workers: int
) -> None:
    """What worker `number` runs: it writes with one thread, until its process is ended or no question is left."""
    from eyas.files.target import load_target
    from eyas.files.tokenizer import load_tokenizer

    plugins.load_inherited()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; finished shards stay
    threading.Thread(target=die_with_parent, daemon=True).start()
    with torch.inference_mode():
        target = load_target(directory, writing_precision()).prepare()
        template = Template(load_tokenizer(directory), target.config.eos_token_ids, settings.chat_template_kwargs)
        writer = Writer(target, template, settings, questions, slots)
        missing = (shard for shard in itertools.count() if shard not in there)
        for _ in write_shards(writer, Folder(folder), itertools.islice(missing, number, None, workers)):
            pass


def writing_precision() -> str:
    """The precision the target writes with. bf16 halves keys and values; but where nothing multiplies bf16 fast, rows would be computed one
    by one."""
    return "bf16" if native.kernel() is not None or cpu_multiplies_bfloat16() else "fp32"


def die_with_parent() -> None:
    """End this process when its parent is gone. A killed parent cannot end its workers, and the next run's would write the same shards."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
