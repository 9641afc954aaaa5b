"""The directory of a LoRA adapter as a target: peft merges it onto its base once, and the merged model is kept in the cache.

Knows how peft stores an adapter; what an adapter computes is peft's to know.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eyas.config import EyasError, cache_dir
from eyas.files.disk import atomic_directory, directory_hash, file_hash, read_json
from eyas.files.hf_config import first_line
from eyas.files.notes import note
from eyas.files.tokenizer import tokenizer_hash

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter. Raises `EyasError` where a whole model lies beside it, since one of both would be left out."""
    if not (directory / ADAPTER).exists():
        return False
    whole = [path.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in directory.glob(pattern)]
    if whole:
        raise EyasError(f"{directory} holds an adapter ({ADAPTER}) beside a whole model ({whole[0]}); give a directory with one of both")
    return True


def merged_adapter(directory: Path, find: Callable[[str], Path]) -> Path:
    """The directory of the adapter's base with the adapter merged into its weights, made on first use. `find`: the directory of a base by
    name. Raises `EyasError` where the base cannot be had, peft is not installed, or it cannot merge."""
    settings = read_json(directory / ADAPTER)
    name = settings.get("base_model_name_or_path")
    by_hand = "or merge it yourself: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(OUT)"
    what = f"{directory} is a {settings.get('peft_type', 'peft')} adapter of {name}, not a whole model"
    if not isinstance(name, str) or not name:
        raise EyasError(f"{directory / ADAPTER} names no base_model_name_or_path to merge it onto; write it there, {by_hand}")
    if not (directory / WEIGHTS).exists():
        raise EyasError(f"{what}, and holds no {WEIGHTS}")
    if importlib.util.find_spec("peft") is None:
        raise EyasError(f"{what}; pip install 'eyas[lora]' to have it merged at loading, {by_hand}")
    try:
        base = find(name)
    except EyasError as error:
        raise EyasError(f"{what}; its base cannot be had: {error}") from None
    parts = [file_hash(directory / ADAPTER), file_hash(directory / WEIGHTS), directory_hash(base), file_hash(base / "config.json")]
    parts += [tokenizer_hash(directory), tokenizer_hash(base)]
    final = cache_dir() / "targets" / f"lora-{hashlib.sha256(''.join(parts).encode()).hexdigest()[:16]}"
    if not (final / "config.json").exists():
        note(f"merging {directory} onto {base} (once; kept in {final})")
        with atomic_directory(final) as work:
            merge(directory, base, work)
    return final


def merge(adapter: Path, base: Path, out: Path) -> None:
    """Write the merged model and its tokenizer into `out`; the adapter's own tokenizer goes before its base's."""
    from transformers import AutoModelForCausalLM

    peft: Any = importlib.import_module("peft")  # an extra, which a type checker need not have
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
        merged: Any = peft.PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    except Exception as error:  # transformers and peft raise many kinds
        raise EyasError(f"peft cannot merge {adapter} onto {base} ({first_line(error)})") from None
    merged.save_pretrained(out)
    source = adapter if any((adapter / name).exists() for name in OF_TOKENIZERS[:3]) else base
    for name in OF_TOKENIZERS:
        if (source / name).exists():
            shutil.copy(source / name, out / name)
