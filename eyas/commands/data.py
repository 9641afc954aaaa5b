"""What `train` and `new-draft` train on: the user's conversations, or shards that the target writes (and has written before)."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from eyas.bench.prompts import read_prompts
from eyas.commands.output import progress
from eyas.config import DISK_SHARE, PRECISIONS, EyasError, TargetConfig, TrainSettings
from eyas.files.chat_data import Conversation
from eyas.files.chat_template import check_read
from eyas.files.disk import file_hash
from eyas.files.target import load_target
from eyas.files.tokenizer import check_known, encoded, load_tokenizer
from eyas.model.protocols import TargetModel
from eyas.train.build import Studied
from eyas.train.conversations import MIN_ANSWER_TOKENS, Document, causes, documents, read_conversations, truncate
from eyas.train.decontaminate import all_grams, decontaminated, meets
from eyas.train.features import Example, document_examples, shard_examples
from eyas.train.questions import Asked, SelfPlay
from eyas.train.shards import PATTERN, Counts, check_shards, counts_of, data_folder, settings_of_folder
from eyas.train.template import Template
from eyas.train.texts import check_text, text_examples
from eyas.train.writers import Limit, nothing_kept, write_own_data, writing_precision

MOST_CAUSES = 8  # why conversations were skipped: so many causes are named
FOREIGN = (
    "these answers were not written by this target, so the draft learns another model's words and does worse on the target's own; "
    "`eyas train --data .. --regenerate` keeps the questions and lets the target answer them"
)


FIRST_MINUTE = 60.0  # seconds after which it is said that nothing is kept yet


@dataclass(frozen=True)
class OwnWords:
    """How the target is to write: template, settings, and the questions that a user brings."""

    template: Template
    play: SelfPlay
    questions: list[Asked]
    directory: Path  # of the target

    @property
    def folder(self) -> Path:
        return data_folder(self.play)

    def write(self, limit: Limit, workers: int, report: Any) -> list[Path]:
        """Let the target write what is missing; the shards to train on."""
        return write_own_data(self.directory, self.folder, self.play, self.questions, limit, workers, report)


def own_words(studied: Studied, seed_prompts: str | None, regenerate: str | None, console: Console) -> OwnWords:
    template = Template(load_tokenizer(studied.directory), studied.config.eos_token_ids, studied.chat_template_kwargs)
    check_tokenizer(template.tokenizer, studied.config, studied.directory)
    if not template.chat:
        console.print("no chat template: the target writes plain text instead of conversations, and its draft is for --raw", markup=False)
    questions, key = regenerated_questions(regenerate, template, console) if regenerate else seed_questions(seed_prompts, console)
    play = SelfPlay(
        target=studied.sha256,
        template=template.text,
        taps=studied.taps,
        seed_prompts=key,
        seeded_share=SelfPlay.seeded_share if key else 0.0,
        regenerate=bool(regenerate),
        chat_template_kwargs=studied.chat_template_kwargs,
        read=studied.read_sha256,
    )
    return OwnWords(template, play, questions, studied.directory)


def check_tokenizer(tokenizer: Any, config: TargetConfig, directory: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        raise EyasError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, its model {config.vocab_size}: they do not belong together; "
            "put the model's own tokenizer there"
        )


def seed_questions(path: str | None, console: Console) -> tuple[list[Asked], str]:
    """User turns of a file, and a key that names it and what it holds."""
    if not path:
        return [], ""
    items, complaints = read_prompts(path)
    say_skipped(complaints, path, console)
    questions = [item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"] for item in items]
    return [Asked((question,)) for question in questions], key_of(path, questions)


def regenerated_questions(path: str, template: Template, console: Console) -> tuple[list[Asked], str]:
    """The user turns of a file's conversations, whose answers the target is to write anew."""
    if not template.chat:
        raise EyasError("--regenerate needs a target with a chat template: it answers the file's user turns")
    conversations, complaints = read_conversations(path, saying(console))
    found: list[Asked] = []
    for _, conversation in conversations:
        try:
            found.append(asked_in(conversation))
        except EyasError as error:
            complaints.append(f"{conversation.place}: {error}")
    say_skipped(complaints, path, console)
    if not found:
        raise EyasError(f"{path} holds no user turn to answer{f' ({complaints[0]})' if complaints else ''}")
    return found, key_of(path, found)


def asked_in(conversation: Conversation) -> Asked:
    """What a conversation asks the target. Raises EyasError where it asks under conditions that cannot be met anew."""
    if conversation.text is not None:
        raise EyasError("its text is in one piece; --regenerate needs messages")
    if conversation.tools or any(message["role"] == "tool" for message in conversation):
        raise EyasError("it uses tools, and nobody would answer the calls that the target makes anew")
    if conversation.variables:
        raise EyasError("it has chat template variables of its own")
    systems = [message["content"] for message in conversation if message["role"] in ("system", "developer")]
    turns = tuple(message["content"] for message in conversation if message["role"] == "user")
    if len(systems) > 1 or not turns:
        raise EyasError("it has several system messages" if turns else "it has no user turn to answer")
    return Asked(turns, systems[0] if systems else None)


def saying(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def say_skipped(complaints: Sequence[str], path: str, console: Console) -> None:
    for cause in causes(complaints)[:MOST_CAUSES]:
        saying(console)(f"skipped: {cause}")
    if complaints:
        saying(console)(f"skipped {len(complaints)} lines of {path}")


def key_of(path: str, content: Any) -> str:
    return f"{Path(path).name} {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"


def disk_limit(gigabytes: float | None, folder: Path) -> float:
    """How many bytes self-written data may take: what the user says, else a share of the free disk."""
    if gigabytes is not None:
        if not gigabytes > 0:
            raise EyasError(f"--disk must be above 0 gigabytes, not {gigabytes}")
        return gigabytes * 1e9
    return DISK_SHARE * (free_space(folder) + sum(path.stat().st_size for path in folder.glob("*.safetensors")))


def free_space(folder: Path) -> int:
    """The free bytes of the disk where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- examples ----


def from_conversations(
    path: Path, studied: Studied, settings: TrainSettings, console: Console, apart: Sequence[str]
) -> tuple[list[Example], dict[str, Any]]:
    """A file's conversations in the target's template, without those that ask what the files `apart` ask."""
    say = saying(console)
    conversations, complaints = read_conversations(path, say)
    read = len(conversations) + len(complaints)
    tokenizer, directory = load_tokenizer(studied.directory), studied.directory
    if not getattr(tokenizer, "chat_template", None) and any(conversation.text is None for _, conversation in conversations):
        way = 'use the target\'s instruction-tuned form, or give plain text as {"text": ..}'
        raise EyasError(f"{directory} has no chat template, so conversations cannot be put to it; {way}")
    evaluated = evaluation_prompts(apart)
    avoided, met = all_grams(evaluated, lambda text: text_tokens(tokenizer, text)), 0
    cut, found, numbers = Cut(settings.max_length), [], []
    for number, (_, conversation) in enumerate(conversations):
        if avoided and meets((text_tokens(tokenizer, text) for text in asked_texts(conversation)), avoided):
            met += 1
            continue
        try:
            kept = cut.to_length(as_served(tokenizer, conversation, studied))
        except EyasError as error:
            complaints.append(f"{conversation.place}: {error}")
            continue
        found += kept
        numbers += [number if len(kept) > 1 else None] * len(kept)
    for cause in causes(complaints)[:MOST_CAUSES]:
        say(f"skipped: {cause}")
    if complaints:
        say(f"skipped {len(complaints)} of {read} conversations")
    if cut.long:
        say(cut.told())
    if not found:
        why = f"the first was skipped since {complaints[0]}" if complaints else "all of them ask what --apart's files ask"
        raise EyasError(f"{path} holds no conversation with an answer to learn from; {why}")
    say(FOREIGN)
    examples, twins = without_twins(document_examples(found, numbers))
    facts = {"kind": "conversations", "file": path.name, "skipped": len(complaints), "duplicates_dropped": twins}
    return examples, {"data": facts | {"answer_tokens_cut": cut.lost} | apart_facts(apart, evaluated, met)}


def as_served(tokenizer: Any, conversation: Conversation, studied: Studied) -> list[Document]:
    """A conversation's documents under the run's variables of the chat template. Raises EyasError for tokens that the target does not
    know."""
    if conversation.text is None and studied.chat_template_kwargs:
        check_read(tokenizer, conversation, studied.chat_template_kwargs)
    conversation.variables = {**(studied.chat_template_kwargs or {}), **conversation.variables}
    conversation.kept = True
    found = documents(tokenizer, conversation)
    for document in found:
        check_known(tokenizer, document.tokens, studied.config.vocab_size, "it")
    return found


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    return encoded(tokenizer, text, add_special_tokens=False)["input_ids"]


def asked_texts(conversation: Conversation) -> list[str]:
    """What a conversation asks: its user turns; all of a text in one piece."""
    if conversation.text is not None:
        return [conversation.text]
    return [message["content"] for message in conversation if message["role"] == "user"]


class Cut:
    """Documents cut to a length, and what that took away."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.long = self.lost = self.answers = self.longest = 0

    def to_length(self, whole: Sequence[Document]) -> list[Document]:
        """What is left of one conversation's documents. Raises EyasError if that has no answer to learn."""
        for document in whole:
            self.longest = max(self.longest, len(document.tokens))
            self.answers += sum(answer >= 0 for answer in document.answers)
            self.long += len(document.tokens) > self.max_length
            self.lost += sum(answer >= 0 for answer in document.answers[self.max_length :])
        kept = [shorter for document in whole if (shorter := truncate(document, self.max_length))]
        if not kept and any(len(document.tokens) > self.max_length for document in whole):
            raise EyasError(f"longer than max_length={self.max_length}, with too little of an answer before it")
        if not kept:
            raise EyasError(f"too little of an answer: fewer than {MIN_ANSWER_TOKENS} tokens")
        return kept

    def told(self) -> str:
        lost = f"{self.lost} of {self.answers} answer tokens lie beyond it and are not learned"
        raise_it = f"--set max_length={self.longest} keeps all, in memory that grows with it"
        return f"{self.long} documents are longer than max_length={self.max_length}: {lost}; {raise_it}"


def without_twins(examples: list[Example]) -> tuple[list[Example], int]:
    """The examples without twins, and how many twins were dropped: a twin of a held-out conversation must not train."""
    kept = list({tuple(example.tokens): example for example in examples}.values())
    return kept, len(examples) - len(kept)


def from_self_play(
    options: argparse.Namespace, words: OwnWords, settings: TrainSettings, wanted: int, workers: int, before: dict[str, Any] | None
) -> tuple[list[Example], dict[str, Any]]:
    """Let the target write `wanted` answer tokens (all that a file asks for under --regenerate), then read those shards and --shards'.

    `before`: the checkpoint of a run to resume.
    """
    folders = [Path(folder).expanduser().resolve() for folder in dict.fromkeys(options.shards)]
    for folder in folders:
        check_shards(folder, words.play)
    shards = [shard for folder in folders for shard in sorted(folder.glob("*.safetensors"))]
    if options.self_play or options.regenerate or not folders:
        endless = words.play.regenerate and options.self_play is None
        limit = Limit(tokens=math.inf if endless else wanted, bytes=disk_limit(options.disk, words.folder))
        with progress() as bar:
            task = bar.add_task("the target writes", total=None if endless else wanted, unit="answer tokens")
            note = slow_start(words)

            def report(count: int) -> None:
                bar.update(task, completed=count)
                note(count, bar.console)

            written = words.write(limit, workers, report)
        shards += [shard for shard in written if shard not in shards]
        folders = list(dict.fromkeys([*folders, words.folder.resolve()]))
    return shard_facts(shards, folders, settings, before, words.template, options.apart)


def slow_start(words: OwnWords) -> Callable[[int, Console], None]:
    """What to call with the tokens that are kept: after a minute without any it says so once, with the likely cause."""
    begun, said = time.monotonic(), False

    def note(kept: int, console: Console) -> None:
        nonlocal said
        if not kept and not said and time.monotonic() - begun > FIRST_MINUTE:
            said = True
            why = nothing_kept(sum(map(counts_of, words.folder.glob(PATTERN)), Counts()), words.play)
            console.print(f"nothing is kept after a minute: {why}", markup=False, soft_wrap=True)

    return note


def from_text(
    files: Sequence[Path],
    words: OwnWords,
    settings: TrainSettings,
    before: dict[str, Any] | None,
    apart: Sequence[str],
    named: Callable[[Path], str] = lambda path: path.name,
) -> tuple[list[Example], dict[str, Any]]:
    """Examples of files of self-written text, and what they are. A resumed run has the files that it began with. `named`: as which a file
    is told."""
    texts = [check_text(path, words.play) for path in files]
    told = {"texts": [{"file": named(path), "sha256": file_hash(path)} for path in files]}
    if before and before["facts"]["data"].get("texts") != told["texts"]:
        raise EyasError("the run was trained on other text; resume with the same --text, or train anew into another --out")
    counts = sum((text.counts for text in texts), Counts())
    settled = [found for text in texts for found in text.settings]
    return self_written(text_examples(files, settings.max_length), counts, settled, told, words.template, apart)


def reading_target(studied: Studied, device: str) -> TargetModel:
    """The target as it reads text that it wrote: in the number format in which it writes."""
    precision = writing_precision() if device.startswith("cpu") else PRECISIONS[0]
    return load_target(studied.directory, precision, device).prepare()


def shard_facts(
    shards: list[Path],
    folders: list[Path],
    settings: TrainSettings,
    before: dict[str, Any] | None,
    template: Template,
    apart: Sequence[str] = (),
) -> tuple[list[Example], dict[str, Any]]:
    """Examples of some shards, and what they are. A resumed run goes on with the shards that it began with."""
    used = before["facts"]["data"].get("shards") if before else None
    if used is not None:
        missing = set(used) - set(map(place_of, shards))
        if missing:
            raise EyasError(f"the run was trained on shards that are gone ({sorted(missing)[0]}, ..); train anew into another --out")
        shards = [shard for shard in shards if place_of(shard) in set(used)]
    examples, counts = shard_examples(shards, settings.max_length), sum(map(counts_of, shards), Counts())
    told = {"shards": list(map(place_of, shards))}
    return self_written(examples, counts, [settings_of_folder(folder) for folder in folders], told, template, apart)


def self_written(
    examples: list[Example],
    counts: Counts,
    settings: list[dict[str, Any]],
    files: dict[str, Any],
    template: Template,
    apart: Sequence[str],
) -> tuple[list[Example], dict[str, Any]]:
    """Examples of text that the target wrote, without twins and without what an evaluation asks, and what they are. `files`: which files
    they are from."""
    examples, twins = without_twins(examples)
    evaluated = evaluation_prompts(apart)
    examples, met = decontaminated(examples, evaluated, template) if evaluated else (examples, 0)
    if not examples:
        raise EyasError("the text holds no conversation with an answer to learn from; let the target write more")
    facts = {
        "kind": "self-written",
        **asdict(counts),
        "conversations": len(examples),
        "duplicates_dropped": twins,
        **apart_facts(apart, evaluated, met),
        "settings": settings,
        **files,
    }
    return examples, {"data": facts}


def evaluation_prompts(paths: Sequence[str]) -> list[str]:
    """Every user turn of some files of prompts."""
    items = [item for path in paths for item in read_prompts(path)[0]]
    turns = [[item.prompt] if isinstance(item.prompt, str) else [turn["content"] for turn in item.prompt] for item in items]
    return [text for texts in turns for text in texts]


def apart_facts(paths: Sequence[str], evaluated: Sequence[str], dropped: int) -> dict[str, Any]:
    return {"kept_apart": {"from": [Path(path).name for path in paths], "prompts": len(evaluated), "dropped": dropped}}


def place_of(shard: Path) -> str:
    """A shard's folder and name, since names alone are the same in every folder."""
    return f"{shard.parent.name}/{shard.name}"
