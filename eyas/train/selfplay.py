"""The target writes its own training data: it asks itself questions through its chat template's open user turn, and answers them.

A batched sampler over flat rows with continuous refill: a finished conversation's slot is taken by the next one at once. The features
and last hidden states that the target computes on the way are handed over with the tokens, so training needs no second target pass.
Knows the target and the template; knows nothing of drafts.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors.torch import save_file
from torch import Tensor

from eyas.config import EyasError, cache_dir
from eyas.decode.sampling import derived_seed, uniforms
from eyas.model import native
from eyas.model.attention import Segment
from eyas.model.linear import cpu_multiplies_bfloat16
from eyas.model.target import Rows, Target, chain_rows
from eyas.model.weights import target_config

PROBE = "\ue001question\ue001"
SLOTS = 64  # conversations in flight a worker: beyond this the products gain nothing and the keys leave the cache
PER_SHARD = 32  # conversations, about a minute of a worker: what a kill may cost


@dataclass(frozen=True)
class SelfPlay:
    """What decides the text (beside the number format, see `writing_precision`); a folder of shards carries it as its key."""

    target: str  # hash of the target's weights
    template: str  # the chat template around a question, as text
    taps: tuple[int, int, int]
    seed_prompts: str = ""  # name of a file of user turns and a hash of them, if any
    seeded_share: float = 0.2  # of conversations that take their question from there
    question_top_p: float = 0.95
    # Drawn evenly. Most users decode near greedy; but greedy answers to alike questions are alike, and teach little after the first.
    answer_temperatures: tuple[float, ...] = (0.0, 0.7, 0.7, 1.0, 1.0)
    answer_top_p: float = 0.98
    turns: tuple[int, ...] = (1, 1, 1, 2, 3)  # questions of a conversation, drawn evenly
    longest_question: int = 96
    longest_answer: int = 320
    longest: int = 640  # tokens of a conversation, its template's included
    loop_gram: int = 16  # an answer is cut where it repeats this many tokens in a row
    candidates: int = 64  # sampling looks at the best so many tokens
    version: int = 3

    def digest(self) -> str:
        """Ten hex digits of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]


@dataclass
class Conversation:
    """One row of the batch while it is written."""

    index: int
    seed: int
    temperature: float  # of its answers
    turns: int  # questions it may have
    tokens: list[int]
    waiting: list[int]  # tokens known but not yet read by the target
    read: int  # tokens the target has read
    part: int  # where the question or answer under way begins
    asking: bool = True
    answers: list[range] = field(default_factory=list)  # where the finished answers lie, their end-of-turn tokens included
    grams: set[tuple[int, ...]] = field(default_factory=set)  # of the answer under way

    def numbers(self) -> list[int]:
        """For each token the number of its answer, -1 outside."""
        found = [-1] * len(self.tokens)
        for number, places in enumerate(self.answers):
            found[places.start : places.stop] = [number] * len(places)
        return found


class Finished(NamedTuple):
    """A conversation of n read tokens and what the target knew at each."""

    row: Conversation
    features: Tensor  # [n, taps * H] bfloat16
    hidden: Tensor  # [n, H] bfloat16, after the final norm
    favourites: Tensor  # [n] int32: the target's argmax over its full vocabulary, at rows the target was asked about (others -1)


class Template:
    """The chat template cut open: tokens before the first question, between question and answer, between answer and next question."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise EyasError("the target has no chat template, so it cannot ask itself questions; use its instruction-tuned form")
        text = tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True)
        if text.count(PROBE) != 1:
            raise EyasError("the chat template does not show a user turn as it is written; train from conversations with --data")
        before, after = text.split(PROBE)
        self.text = before + "{question}" + after
        self.before: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
        self.after: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        self.again: list[int] = tokenizer(between_turns(tokenizer, text), add_special_tokens=False)["input_ids"]  # empty: one turn only
        self.tokenizer = tokenizer
        self.ends = {*end_ids, self.after[0]}

    def question(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def between_turns(tokenizer: Any, text: str) -> str:
    """What the template writes between an answer and the next question, from the end-of-turn token on; nothing where it rewrites turns."""
    said = "\ue002answer\ue002"
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": said}, {"role": "user", "content": PROBE}]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return ""
    if not whole.startswith(text + said) or whole.count(PROBE) != 2:
        return ""
    return whole[len(text + said) : whole.rindex(PROBE)]


class Writer:
    """Keeps `slots` conversations in flight and yields each as it is finished."""

    def __init__(self, target: Target, template: Template, settings: SelfPlay, questions: Sequence[str], slots: int) -> None:
        self.target, self.template, self.settings, self.questions = target, template, settings, questions
        self.capacity = min(settings.longest, target.config.max_position_embeddings)
        self.cache = target.new_cache(slots, self.capacity)
        width = (len(settings.taps) + 1) * target.config.hidden_size
        self.handed_over = torch.empty(slots, self.capacity, width, dtype=torch.bfloat16)
        self.favourites = torch.full((slots, self.capacity), -1, dtype=torch.int32)
        self.dropped = 0
        self.root = int(settings.digest(), 16)  # other settings, other conversations: folders may train together
        opening = template.before[:-1]  # every conversation begins with it: read once, copied to each
        self.opening = target.new_cache(1, len(opening))
        read = target(chain_rows(0, opening, 0), self.opening, settings.taps, slice(0, 1))
        self.opening_states = torch.cat([read.features, read.hidden], -1).to(torch.bfloat16)

    def write(self, seed: int, first: int = 0) -> Iterator[Finished]:
        rows = [self.begin(slot, seed, first + slot) for slot in range(self.cache.slots)]
        following = first + len(rows)
        while True:
            for slot, outcome in self.step(rows):
                if outcome is not None:
                    yield outcome
                rows[slot], following = self.begin(slot, seed, following), following + 1

    def begin(self, slot: int, seed: int, index: int) -> Conversation:
        """Let `slot` hold conversation `index` of a seed: the template's opening, and a question where one comes from the seed prompts."""
        opened = len(self.template.before) - 1
        self.cache.copy_prefix(self.opening, 0, slot, opened)
        self.handed_over[slot, :opened] = self.opening_states
        self.favourites[slot] = -1
        settings, own_seed = self.settings, derived_seed(self.root + seed, index)
        u_share, u_question, u_temperature, u_turns = uniforms(own_seed, 2**32, 4)
        temperature = settings.answer_temperatures[int(u_temperature * len(settings.answer_temperatures))]
        turns = settings.turns[int(u_turns * len(settings.turns))] if self.template.again else 1
        before = self.template.before
        row = Conversation(index, own_seed, temperature, turns, before[:-1], before[-1:], opened, opened + 1)
        if self.questions and u_share < settings.seeded_share:
            question = self.template.question(self.questions[int(u_question * len(self.questions))])[: settings.longest_question]
            self.open_answer(row, question)
        return row

    def open_answer(self, row: Conversation, question: list[int]) -> None:
        row.waiting += question + self.template.after
        row.part, row.asking = row.read + len(row.waiting), False
        row.grams.clear()

    def step(self, rows: list[Conversation]) -> Iterator[tuple[int, Finished | None]]:
        """One pass over all rows' waiting tokens; yields (slot, finished conversation, or None if dropped) for slots that are free."""
        counts = [len(row.waiting) for row in rows]
        tokens = torch.tensor([token for row in rows for token in row.waiting])
        positions = torch.cat([torch.arange(row.read, row.read + count) for row, count in zip(rows, counts)])
        last = torch.tensor(np.cumsum(counts) - 1)
        pass_rows = Rows(tokens, positions, [Segment(slot, count) for slot, count in enumerate(counts)])
        out = self.target(pass_rows, self.cache, self.settings.taps, last)
        self.hand_over(rows, counts, torch.cat([out.features, out.hidden], -1))
        ends = torch.tensor([row.read + count - 1 for row, count in zip(rows, counts)])
        self.favourites[torch.arange(len(rows)), ends] = out.logits.argmax(-1).int()
        chosen = self.choose(out.logits, rows)
        for slot, (row, token) in enumerate(zip(rows, chosen)):
            self.cache.keep(slot, range(counts[slot]))
            row.tokens += row.waiting
            row.read += counts[slot]
            row.waiting = [token]
            if self.over(row, token):
                yield slot, self.finish(slot, row)

    def hand_over(self, rows: list[Conversation], counts: list[int], states: Tensor) -> None:
        states = states.to(torch.bfloat16)
        if all(count == 1 for count in counts):
            self.handed_over[torch.arange(len(rows)), torch.tensor([row.read for row in rows])] = states
            return
        for slot, (row, part) in enumerate(zip(rows, states.split(counts))):
            self.handed_over[slot, row.read : row.read + counts[slot]] = part

    def choose(self, logits: Tensor, rows: list[Conversation]) -> list[int]:
        """One token a row: temperature and top-p within the best candidates, by one uniform keyed to (row's seed, position)."""
        settings = self.settings
        asking = torch.tensor([row.asking for row in rows])
        temperature = torch.tensor([1.0 if row.asking else row.temperature for row in rows])
        values, ids = logits.float().topk(settings.candidates, -1)
        law = (values / temperature.clamp_min(1e-4)[:, None]).softmax(-1)
        above = law.cumsum(-1) - law
        top_p = torch.where(asking, settings.question_top_p, settings.answer_top_p)
        law = law.masked_fill(above >= top_p[:, None], 0.0)
        u = torch.tensor([uniforms(row.seed, row.read + len(row.waiting), 1)[0] for row in rows], dtype=torch.float32)
        place = (law.cumsum(-1) <= (u * law.sum(-1))[:, None]).sum(-1).clamp_max(settings.candidates - 1)
        place = torch.where(temperature > 0, place, 0)  # at 0 the best, however near the second is
        return ids.gather(1, place[:, None])[:, 0].tolist()

    def over(self, row: Conversation, token: int) -> bool:
        """Take the drawn token; whether the conversation is over with it. An ended question opens the answer, an answer the next one."""
        settings, drawn = self.settings, row.read + 1 - row.part  # tokens of the part under way, this one included
        full = row.read + 2 >= self.capacity
        if row.asking:
            if token in self.template.ends and drawn > 3 and row.read + len(self.template.after) + 8 < self.capacity:
                row.waiting = []
                self.open_answer(row, [])
                return False
            return token in self.template.ends or drawn > settings.longest_question or full
        gram = (*row.tokens[-settings.loop_gram + 1 :], token)
        looping = drawn >= settings.loop_gram and gram in row.grams
        row.grams.add(gram)
        if not (looping or token in self.template.ends or drawn >= settings.longest_answer or full):
            return False
        row.answers.append(range(row.part, row.read + 1))
        again = self.template.again
        if looping or len(row.answers) >= row.turns or token != again[0] or row.read + len(again) + 16 > self.capacity:
            return True
        row.waiting = list(again)
        row.part, row.asking = row.read + len(again), True
        return False

    def finish(self, slot: int, row: Conversation) -> Finished | None:
        """Cut behind the last answer. Its last token may be written but not read: it has no feature, and as a label it needs none."""
        if sum(map(len, row.answers)) < 8:
            self.dropped += 1
            return None
        row.tokens = (row.tokens + row.waiting)[: row.answers[-1].stop]
        row.read = len(row.tokens) - 1
        states = self.handed_over[slot, : row.read]
        width = len(self.settings.taps) * self.target.config.hidden_size
        return Finished(row, states[:, :width].clone(), states[:, width:].clone(), self.favourites[slot, : row.read].clone())


def write_shards(writer: Writer, folder: Path, seed: int, tokens: int, per_shard: int, report: Callable[[int, int], None]) -> int:
    """Write shards of `per_shard` conversations until the folder's shards of this seed hold `tokens` answer tokens; returns their number.

    Each shard is written atomically; a run that was stopped goes on behind the last one.
    """
    done = [shard for shard in sorted(folder.glob(f"{seed:08d}-*.safetensors"))]
    written = sum(answer_tokens(shard) for shard in done)
    first = max((last_index(shard) for shard in done), default=-1) + 1
    held: list[Finished] = []
    number = len(done)
    for finished in writer.write(seed, first) if written < tokens else ():
        held.append(finished)
        if len(held) == per_shard:
            written += save_shard(folder / f"{seed:08d}-{number:05d}.safetensors", held)
            held, number = [], number + 1
            report(written, writer.dropped)
            if written >= tokens:
                break
    return written


def save_shard(path: Path, conversations: list[Finished]) -> int:
    """Tokens, lengths, answer numbers, features and hidden states of finished conversations; returns the answer tokens in it."""
    rows = [finished.row for finished in conversations]
    tensors = {
        "tokens": torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int32),
        "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),
        "answers": torch.tensor([number for row in rows for number in row.numbers()], dtype=torch.int32),
        "temperatures": torch.tensor([row.temperature for row in rows]),
        "features": torch.cat([finished.features for finished in conversations]),
        "hidden": torch.cat([finished.hidden for finished in conversations]),
        "favourites": torch.cat([finished.favourites for finished in conversations]),
    }
    answers = int((tensors["answers"] >= 0).sum())
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"answer_tokens": str(answers), "last_index": str(max(row.index for row in rows))})
    os.replace(temporary, path)
    return answers


def shard_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def answer_tokens(path: Path) -> int:
    return int(shard_metadata(path)["answer_tokens"])


def last_index(path: Path) -> int:
    return int(shard_metadata(path)["last_index"])


def claim_folder(folder: Path, settings: SelfPlay) -> None:
    """Mark a folder of shards with what made them; a folder made otherwise is refused."""
    key = json.loads(json.dumps(asdict(settings)))
    marker = folder / "key.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EyasError(f"cannot write {folder} ({error.strerror}); set EYAS_CACHE to a directory that can be written") from None
    if marker.exists():
        found = json.loads(marker.read_text())
        different = [name for name in key.keys() | found.keys() if key.get(name) != found.get(name)]
        if different:
            raise EyasError(
                f"{folder} holds self-written data of other settings ({', '.join(sorted(different))} differ); name another folder"
            )
    else:
        marker.write_text(json.dumps(key, indent=1))


def settings_of_folder(folder: Path) -> dict[str, Any]:
    """What made a folder of shards, as `claim_folder` wrote it there."""
    try:
        return json.loads((folder / "key.json").read_text())
    except (OSError, ValueError):
        raise EyasError(f"{folder} is not a folder of self-written shards (its key.json cannot be read); leave it out") from None


def check_shards(folder: Path, settings: SelfPlay) -> None:
    """Shards of other settings may train together, but only where the same target, template and taps wrote them, in the same form."""
    found, wanted = settings_of_folder(folder), json.loads(json.dumps(asdict(settings)))
    different = [name for name in ("target", "template", "taps", "version") if found.get(name) != wanted[name]]
    if different:
        raise EyasError(f"{folder} was written by another target or in another way ({', '.join(different)} differ); leave it out")


def data_folder(settings: SelfPlay) -> Path:
    """Where shards of these settings lie: other settings, another folder."""
    return cache_dir() / "selfplay" / settings.digest()


def write_own_data(
    directory: Path,
    folder: Path,
    settings: SelfPlay,
    questions: Sequence[str],
    tokens: int,
    workers: int,
    report: Callable[[int], None],
    minutes: float = math.inf,
) -> None:
    """Let single-thread workers, each with a seed of its own, write until the folder holds `tokens` answer tokens or time is up."""
    claim_folder(folder, settings)
    deadline = time.monotonic() + 60 * minutes

    def written() -> int:
        return sum(map(answer_tokens, folder.glob("*.safetensors")))

    def done() -> bool:
        return written() >= tokens or (time.monotonic() >= deadline and written() > 0)  # something, however little time there is

    report(min(written(), tokens))
    if done():
        return
    workers = affordable(workers, directory, settings)
    for unfinished in folder.glob("*.tmp"):  # of a writer that was killed
        unfinished.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    per_shard = int(max(4, min(PER_SHARD, tokens // 2000, 4 * minutes)))  # small where little is wanted
    shares = (directory, folder, settings, list(questions), max(1, -(-tokens // workers)), per_shard)
    processes = [context.Process(target=work, args=(seed, *shares), daemon=True) for seed in range(1, workers + 1)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) and not done():
            wait([process.sentinel for process in processes if process.is_alive()], timeout=2.0)
            report(min(written(), tokens))
    finally:
        for process in processes:
            process.terminate()
    if not done():
        raise EyasError(f"the target stopped writing at {written()} answer tokens; see the error above")


def affordable(workers: int, directory: Path, settings: SelfPlay) -> int:
    """So many of the workers as half of the free memory can hold (where the system says how much that is), at least one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return workers
    config = target_config(directory)
    weights = 3 * sum(file.stat().st_size for file in directory.glob("*.safetensors"))  # as stored, in float32 while loading
    keys = 8 * SLOTS * settings.longest * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # at most 4 bytes each
    return max(1, min(workers, free // 2 // (weights + keys)))


def work(seed: int, directory: Path, folder: Path, settings: SelfPlay, questions: list[str], tokens: int, per_shard: int) -> None:
    """One worker: a process with one thread."""
    from eyas.engine import load_target, load_tokenizer

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; finished shards stay
    threading.Thread(target=die_with_parent, daemon=True).start()
    with torch.inference_mode():
        target = load_target(directory, writing_precision()).prepare()
        template = Template(load_tokenizer(directory), target.config.eos_token_ids)
        writer = Writer(target, template, settings, questions, SLOTS)
        write_shards(writer, folder, seed, tokens, per_shard, lambda written, dropped: None)


def writing_precision() -> str:
    """bf16 halves keys and values; where nothing multiplies it fast, rows would be computed one by one."""
    return "bf16" if native.kernel() is not None or cpu_multiplies_bfloat16() else "fp32"


def die_with_parent() -> None:
    """A parent that is killed cannot end its workers, and two sets of them would write the same shards."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
