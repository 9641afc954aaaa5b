"""GGUF metadata on its own: whether a file's header is honest, and the tokenizer section that llama.cpp wants in every model.

Knows the container, tokenizers and nothing of drafts. The library that reads a GGUF follows the lengths its header claims, so these are
compared with the file's size first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eyas.config import EyasError
from eyas.model.tokenizer import SPLITS
from eyas.model.weights import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a scalar, by its type number
STRING, ARRAY = 8, 9
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types


class Header:
    """Walks a GGUF header without believing it."""

    def __init__(self, path: Path) -> None:
        self.file, self.left = open(path, "rb"), path.stat().st_size  # noqa: SIM115 (closed by check_gguf)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise EyasError(f"claims {count} bytes where {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise EyasError(f"claims {count} bytes where {self.left} are left")
        self.left -= count
        self.file.seek(count, 1)

    def number(self, form: str = "<Q") -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == STRING:
            self.skip(self.number())
        elif kind == ARRAY and depth == 0:
            inner, count = self.number("<I"), self.number()
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            elif 8 * count > self.left:
                raise EyasError(f"claims a list of {count} where {self.left} bytes are left")
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise EyasError(f"has a field of type {kind}, which there is not")


def check_gguf(path: Path) -> None:
    """Raises where the file is no GGUF or its header claims more than the file holds."""
    header = Header(path)
    try:
        if header.take(4) != b"GGUF" or header.number("<I") not in (2, 3):
            raise EyasError("is not a GGUF file of version 2 or 3")
        tensors, fields = header.number(), header.number()
        if 24 * tensors + 12 * fields > header.left:
            raise EyasError(f"claims {tensors} tensors and {fields} fields")
        for _ in range(fields):
            header.skip(header.number())
            header.value(header.number("<I"))
        for _ in range(tensors):
            header.skip(header.number())
            if (dimensions := header.number("<I")) > 8:
                raise EyasError(f"has a tensor of {dimensions} dimensions")
            header.skip(8 * dimensions + 12)
    except EyasError as error:
        raise EyasError(f"{path} {error}; it is damaged, or no GGUF") from None
    finally:
        header.file.close()


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
    """The tokenizer section of another GGUF, the target's own."""
    from gguf import GGUFReader

    check_gguf(path)
    for name, entry in GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind, *of_items = entry.types
            writer.add_key_value(name, entry.contents(), kind, of_items[-1] if of_items else None)
