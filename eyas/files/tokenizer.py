"""A target's tokenizer, its chat template, and the template's hash.

Knows a directory; knows nothing of prompts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eyas.config import EyasError
from eyas.files.disk import file_hash, read_json

CUT_SHORT = 4096  # bytes under which no tokenizer.json describes a tokenizer of any use
NAMES = ("tokenizer", "special_tokens", "vocab", "merges", "spiece", "sentencepiece", "tiktoken", "tekken")  # how its files' names begin
PACKAGES = {"tokenizer.model": "sentencepiece", "tiktoken.model": "tiktoken"}  # what reads a tokenizer that has no tokenizer.json


def chat_template_of(directory: Path) -> Any:
    """A model's chat template as its files hold it: text, or several as a list of names and templates; None where it has none."""
    own, settings, processor = (directory / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"))
    if own.exists():
        others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        templates = [("default", own), *((path.stem, path) for path in others)]
        named = [{"name": name, "template": path.read_text(encoding="utf-8")} for name, path in templates]
        return named if others else named[0]["template"]
    template = read_json(settings).get("chat_template") if settings.exists() else None
    if not template and processor.exists():  # of models for more than text, whose tokenizer may have none
        template = read_json(processor).get("chat_template")
    return template or None


def chat_template_hash(directory: Path) -> str | None:
    """sha256 of a model's chat template; None where it has none."""
    template = chat_template_of(directory)
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def tokenizer_hash(directory: Path) -> str:
    """sha256 over the files of a directory that say how text becomes tokens and tokens text, chat templates included."""
    files = sorted(path for path in directory.iterdir() if path.name.startswith((*NAMES, "chat_template")) and path.is_file())
    return hashlib.sha256("".join(path.name + file_hash(path) for path in files).encode()).hexdigest()


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a directory, with its chat template. Code that comes with a tokenizer is not run. Raises `EyasError` with
    one line where transformers cannot read it."""
    from transformers import AutoTokenizer

    if lacking := lacks(directory):
        raise EyasError(f"{directory} holds no tokenizer that can be read here: {lacking}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise EyasError(f"{directory} holds no tokenizer that transformers can read ({told(error)})") from None
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template_of(directory)
    return tokenizer


def encoded(tokenizer: Any, text: str, **settings: Any) -> Any:
    """What a tokenizer makes of a text, as transformers returns it. Raises `EyasError` where it fails: files that do not go together say so
    only once they meet a text that shows it."""
    try:
        return tokenizer(text, verbose=False, **settings)  # too long is the caller's to say
    except Exception as error:  # tokenizers raises nothing more special
        raise EyasError(f"the tokenizer cannot read this text ({told(error)}); its files may not go together: copy them again") from None


def lacks(directory: Path) -> str | None:
    """What a tokenizer's files lack to be read, where that can be told without reading them; None: nothing."""
    whole, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if whole.exists():
        held = read_json(whole) if whole.stat().st_size < CUT_SHORT else None
        return None if held is None or "model" in held else f"{whole.name} describes none; copy or download it again"
    if not any(path.name.startswith(NAMES) for path in directory.iterdir()):
        return f"{whole.name} is missing; copy it from where the model comes from"
    if settings.exists() and "AutoTokenizer" in (read_json(settings).get("auto_map") or {}):
        return f"it comes with code of its own, which is not run; a {whole.name} is needed"
    for name, package in PACKAGES.items():
        if (directory / name).exists() and importlib.util.find_spec(package) is None:
            return f"it has {name} and no {whole.name}, which takes the package {package}; install that"
    return None


def told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:1]
    known = isinstance(error, (OSError, ValueError))  # others say nothing without their name
    return lines[0] if lines and known else ": ".join([type(error).__name__, *lines])


def check_known(tokenizer: Any, ids: Iterable[int], vocab_size: int, where: str) -> None:
    """Raise `EyasError` for ids that a model of `vocab_size` tokens has no embedding for."""
    beyond = sorted({index for index in ids if index >= vocab_size})
    if beyond:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})" for index in beyond[:3])
        raise EyasError(
            f"{where} holds {named}, and the model knows ids up to {vocab_size - 1} only: its tokenizer has tokens that were never added "
            "to the model; leave them out, or use the tokenizer that belongs to it"
        )
