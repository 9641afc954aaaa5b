"""Finds a target's directory and loads the target: into our own blocks where they compute its family, else into transformers'.

Knows directories, hub names, GGUF files and number formats; knows nothing of tokens or drafts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from eyas.config import PRECISIONS, EyasError, TargetConfig, cache_dir, short
from eyas.files.adaptable import adapted_config
from eyas.files.adapted import load_adapted
from eyas.files.disk import file_hash, read_json
from eyas.files.embedded import embedded_target
from eyas.files.gguf import convert_gguf
from eyas.files.hf_config import foreign_part, has_own_blocks, is_supported, own_config
from eyas.files.lora import is_adapter, merged_adapter
from eyas.files.notes import note
from eyas.files.target_weights import EMBEDDING, HEAD, target_tensors
from eyas.files.tensors import load_strictly
from eyas.files.tokenizer import tokenizer_hash
from eyas.model.protocols import TargetModel
from eyas.model.target import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "q4": torch.bfloat16}  # of all but products' weights
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "README.md")
BITS = {"int8": 8, "q4": 4}  # bits of products' weights, where these have fewer than their number format


def target_directory(source: str | Path | None) -> Path:
    """The Hugging Face directory of a target. `source`: None (the embedded target), a directory (of a LoRA adapter too), a GGUF file, or a
    hub name. Raises `EyasError` for anything else, and where it cannot be fetched, converted or merged."""
    if not isinstance(source, str | Path | None):  # pyright: ignore[reportUnnecessaryIsInstance]  (a program may say anything)
        raise EyasError(f"a target is a directory, a .gguf file or a hub name, not {short(source)}")
    if source is None or str(source) == "embedded":
        return embedded_target()
    path = Path(source).expanduser()
    if path.is_dir():
        return merged_adapter(path, target_directory) if is_adapter(path) else path
    if path.suffix == ".gguf":
        if not path.exists():
            raise EyasError(f"{path} does not exist")
        final = cache_dir() / "targets" / f"gguf-{file_hash(path)[:16]}"
        if not (final / "config.json").exists():
            convert_gguf(path, final)
        return final
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise EyasError(f"target {source} is neither a directory, a .gguf file nor a hub name like owner/model")
    directory = from_hub(str(source), HUB_FILES)
    if not any(directory.glob("*.safetensors")):
        directory = from_hub(str(source), [*HUB_FILES, "pytorch_model*.bin"])
    return merged_adapter(directory, target_directory) if is_adapter(directory) else directory


def target_config(directory: Path) -> TargetConfig:
    """The target's shape from a Hugging Face config.json. Raises `EyasError`, with one line that says why, for a model that cannot be a
    target."""
    return own_config(directory) if has_own_blocks(directory) else adapted_config(directory)


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The directory of a hub repository's files, fetched once."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise EyasError(f"could not fetch {name} from the hub ({str(error).splitlines()[0]}); give a local directory or .gguf") from None


def load_target(directory: Path, precision: str = PRECISIONS[0], device: str | torch.device = "cpu") -> TargetModel:
    """Load a target. It is not yet prepared for inference, so its matrices can still be read.

    Families that our own blocks do not compute run through transformers. Raises `EyasError` for an unknown precision, for int8 and q4 of
    such families, and for weights that do not fit.
    """
    if precision not in PRECISIONS:
        raise EyasError(f"precision {precision!r} is unknown; choose {', '.join(PRECISIONS)}")
    config = target_config(directory)
    if precision != "fp32" and stored_format(directory) == "float16":
        note(f"{directory}: its weights are float16, of whose 11 bits {precision} keeps fewer; --precision fp32 keeps them all")
    if not has_own_blocks(directory):
        why = foreign_part(directory) if is_supported(directory) else None
        if precision in BITS:
            has = f" ({why})" if why else ""
            raise EyasError(f"{precision} is for Llama-shaped targets; {directory.name}{has} runs through transformers: use bf16 or fp32")
        if why:
            note(f"{directory}: eyas's own blocks do not compute {why}; it runs through transformers, which is slower")
        return load_adapted(directory, DTYPES[precision], device)
    tensors = target_tensors(directory, DTYPES[precision])
    config = replace(config, tie_word_embeddings=config.tie_word_embeddings and are_tied(tensors, directory))
    with torch.device("meta"):
        target = Target(config)
    target = target.to(DTYPES[precision]).to_empty(device=device)
    if config.tie_word_embeddings:
        target.lm_head.weight = target.model.embed_tokens.weight
    load_strictly(target, tensors, f"target {directory}")
    return target


def reading_hash(directory: Path) -> str:
    """sha256 of what decides, beside its weights, what a target computes and says: its config, as it is understood here (whole, where
    transformers runs the target), and the files of its tokenizer and its chat template."""
    understood = asdict(own_config(directory)) if has_own_blocks(directory) else read_json(directory / "config.json")
    config = json.dumps(understood, sort_keys=True, default=str)
    return hashlib.sha256((config + tokenizer_hash(directory)).encode()).hexdigest()


def stored_format(directory: Path) -> str | None:
    """The number format of a target's weights, as its config.json says it."""
    raw = read_json(directory / "config.json")
    inner = raw.get("text_config")
    places = [raw, inner if isinstance(inner, dict) else {}]
    found = next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), None)
    return str(found).removeprefix("torch.") if found else None


def are_tied(tensors: Mapping[str, Tensor], directory: Path) -> bool:
    """Whether a model whose config ties head and embedding has one matrix for both. As in transformers, two that differ are two."""
    if HEAD not in tensors or EMBEDDING not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        return True
    note(f"{directory}: the config ties head and embedding, but two different ones are stored; both are taken, as in transformers")
    return False


def prepared(model: TargetModel, precision: str) -> TargetModel:
    return model.prepare(BITS.get(precision, 16))


def check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise EyasError(f"device {device!r} is unknown; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EyasError(f"device {device} was asked for, but this PyTorch sees no CUDA device; use --device cpu")
