"""Which ids end an answer: what config.json, generation_config.json, the tokenizer and its chat template say together.

A chat fine-tune often keeps its base model's config.json, whose end no answer has; a base model's tokenizer may have been given a chat
template with an end of its own. Knows these files; loads a whole tokenizer only where there is no tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from eyas.config import EyasError, short
from eyas.files.chat_template import in_parts, wants_parts
from eyas.files.disk import read_json
from eyas.files.tokenizer import chat_template_of, load_tokenizer

ANSWER = "\ue003answer\ue003"  # private-use characters: stands in for an answer while the template shows what it writes after one
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "vocab.json", "added_tokens.json"),
)


def end_of_turn_ids(directory: Path, of_config: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer, ascending, of those that a model of `vocab_size` tokens can say. `of_config`: its config's eos_token_id.

    Raises `EyasError` for an eos_token_id that is neither an id nor a list of ids.
    """
    generation = directory / "generation_config.json"
    of_generation = read_json(generation).get("eos_token_id") if generation.exists() else None
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) if (path := directory / name).exists() else None for name in FILES)
    found = {*listed(of_config, directory / "config.json"), *listed(of_generation, generation), *tokenizer_ends(directory, stamps)}
    return tuple(sorted(index for index in found if 0 <= index < vocab_size))


def listed(ids: Any, path: Path) -> list[int]:
    found = ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in found):
        raise EyasError(f"{path}: eos_token_id must be an id or a list of ids, not {short(ids)}")
    return list(found)


@lru_cache(maxsize=16)
def tokenizer_ends(directory: Path, stamps: tuple[Any, ...]) -> frozenset[int]:
    """The ids of the tokenizer's own end and of the token that its chat template writes after an answer. None of them where the files
    cannot be read, which whoever loads the tokenizer says. `stamps`: when the files were written, and their sizes."""
    try:
        if not (directory / "tokenizer.json").exists():
            return ends_of_loaded(directory)
        special = special_tokens(directory)
        ids, end = added_tokens(directory), special.get("eos_token")
        after = written_after_an_answer(default_template(chat_template_of(directory)), special)
        if end is not None and end not in ids:
            ids[end] = vocabulary(directory).get(end, -1)
    except (EyasError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return frozenset()
    return frozenset({ids[end]} if end is not None else ()) | first_token(after, ids)


def ends_of_loaded(directory: Path) -> frozenset[int]:
    if not any((directory / name).exists() for name in FILES):
        return frozenset()
    tokenizer = load_tokenizer(directory)
    ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    after = written_after_an_answer(default_template(tokenizer.chat_template), tokenizer.special_tokens_map)
    return frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)) | first_token(after, ids)


# ---- the tokenizer's files ----


def special_tokens(directory: Path) -> dict[str, str]:
    """Names of special tokens (eos_token, ..) and their texts."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is the one that transformers believes
        if (directory / name).exists():
            for key, token in read_json(directory / name).items():
                text = token.get("content") if isinstance(token, dict) else token
                if key.endswith("_token") and isinstance(text, str):
                    found[key] = text
    return found


def added_tokens(directory: Path) -> dict[str, int]:
    """The tokens that were added to the vocabulary, with their ids. They stand at the head of a tokenizer.json of many megabytes."""
    text, settings = (directory / "tokenizer.json").read_text(encoding="utf-8"), directory / "tokenizer_config.json"
    head = re.search(r'"added_tokens":\s*', text)
    found = {token["content"]: token["id"] for token in json.JSONDecoder().raw_decode(text, head.end())[0]} if head else {}
    more = read_json(settings).get("added_tokens_decoder") if settings.exists() else None
    return found | {token["content"]: int(index) for index, token in (more or {}).items()}


def vocabulary(directory: Path) -> dict[str, int]:
    vocab = read_json(directory / "tokenizer.json")["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}  # Unigram's: [token, score]


# ---- the template ----


def default_template(template: Any) -> str | None:
    """Of several templates the one for a conversation without tools."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


def written_after_an_answer(template: str | None, special: Mapping[str, Any]) -> str:
    """What a chat template writes after an answer that ends the conversation; "" where it does not write such a conversation."""
    if not template:
        return ""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    turns = list(map(in_parts, turns)) if wants_parts(template) else turns
    try:
        (text,), _ = render_jinja_template([turns], chat_template=template, **special)
    except Exception:  # a template may refuse anything, in any way
        return ""
    return text.rpartition(ANSWER)[2] if ANSWER in text else ""


def first_token(text: str, ids: Mapping[str, int]) -> frozenset[int]:
    """The id of the added token that a text begins with, blanks aside; nothing where it begins with none."""
    text = text.lstrip()
    found = max((token for token in ids if token.strip() and text.startswith(token)), key=len, default=None)
    return frozenset(() if found is None else (ids[found],))
