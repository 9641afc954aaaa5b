"""The tokenizer section that llama.cpp wants in every GGUF model. Knows tokenizers and nothing of drafts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyas.config import EyasError
from eyas.files.disk import read_json
from eyas.files.gguf_check import check_gguf
from eyas.files.gguf_tokenizer import SPLITS

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types


def write_tokenizer(writer: GGUFWriter, directory: Path) -> None:
    """The tokenizer of a Hugging Face directory (byte-level BPE), as llama.cpp's own converter would put it."""
    held = read_json(directory / "tokenizer.json")
    model = held.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps([held.get("pre_tokenizer"), held.get("decoder")]):
        raise EyasError(f"the tokenizer of {directory} is not byte-level BPE; take it from the target's own GGUF (--target-gguf T.gguf)")
    texts: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in held.get("added_tokens", ()):
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    size = max(read_json(directory / "config.json").get("vocab_size", 0), len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(held, directory))
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, UNUSED) for number in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids = {text: number for number, text in texts.items()}
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").exists() else {}
    first = None
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if text in ids:
            add(ids[text])
            first = text if name == "bos" else first
    adds = settings.get("add_bos_token")  # else what the tokenizer does itself says
    adds = json.dumps(first) in json.dumps(held.get("post_processor")) if adds is None and first else bool(adds)
    writer.add_add_bos_token(adds)


def pre_tokenizer_name(held: Mapping[str, Any], directory: Path) -> str:
    """llama.cpp's name of the rule that cuts text before the merges."""
    told = json.dumps(held.get("pre_tokenizer"), ensure_ascii=False)
    for name, rule in SPLITS.items():
        if rule not in ("digits", "gpt2") and json.dumps(rule, ensure_ascii=False)[1:-1] in told:
            return name
    if '"Digits"' in told:
        return "smollm"
    if '"Split"' not in told:
        return "gpt-2"
    raise EyasError(f"how {directory} cuts text has no name in llama.cpp that eyas knows; take it from the target's GGUF (--target-gguf)")


def copy_tokenizer(writer: GGUFWriter, path: Path) -> None:
    """Copy the tokenizer section of another GGUF, the target's own."""
    from gguf import GGUFReader

    check_gguf(path)
    for name, entry in GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind, *of_items = entry.types
            writer.add_key_value(name, entry.contents(), kind, of_items[-1] if of_items else None)
