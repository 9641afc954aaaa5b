"""A target's tensors as plain numbers, from whatever its directory stores them in, without the layers that plain decoding does not run.

Knows safetensors and torch.save, quantised weights and layers that predict further tokens; knows nothing of what the tensors compute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.files.disk import read_json
from eyas.files.notes import note
from eyas.files.quantised import EIGHT_BITS, WIDENED, kind_of, quantisation, widened
from eyas.files.untrusted import FORMATS, tensors_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FURTHER = re.compile(r"(?:^|\.)mtp(?:_layers|_block|_head)?\.")


def is_widened(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights have 8 bits, in a way that eyas makes plain numbers of."""
    settings = quantisation(raw)
    return settings is not None and kind_of(settings)[0] in WIDENED


def stored_tensors(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of a directory under their stored names. Quantised weights come in `dtype`, others as they are."""
    raw = read_json(directory / "config.json")
    tensors = tensors_of(directory, formats=(*FORMATS, *EIGHT_BITS, torch.float8_e8m0fnu))
    if is_widened(raw):
        note(f"{directory}: weights of 8 bits ({kind_of(quantisation(raw) or {})[0]}) are widened at loading; activations are not rounded")
    return widened(tensors, raw, dtype, directory)


def target_tensors(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a target that our own blocks compute, under the names that they have with a head on top."""
    raw, tensors = read_json(directory / "config.json"), stored_tensors(directory, dtype)
    if "embed_tokens.weight" in tensors:  # saved without its head
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in tensors.items()}
    if raw.get("tie_word_embeddings") and EMBEDDING not in tensors and HEAD in tensors:  # one matrix for both, stored as the head
        tensors[EMBEDDING] = tensors.pop(HEAD)
    surplus = further_layers(tensors, raw, directory)
    return {name: tensor for name, tensor in tensors.items() if name not in surplus}


def further_layers(names: Mapping[str, Any] | list[str], raw: Mapping[str, Any], where: Path) -> set[str]:
    """Names of tensors of layers that predict the tokens after the next one (multi-token prediction), which plain decoding does not run."""
    inner = raw.get("text_config")
    places = [raw, inner if isinstance(inner, dict) else {}]
    layers = next((place["num_hidden_layers"] for place in places if isinstance(place.get("num_hidden_layers"), int)), None)
    more = next((place["num_nextn_predict_layers"] for place in places if isinstance(place.get("num_nextn_predict_layers"), int)), 0)
    found = {name for name in names if FURTHER.search(name)}
    if layers is not None and more > 0:
        numbered = ((name, LAYER.search(name)) for name in names)
        found |= {name for name, match in numbered if match and layers <= int(match[1]) < layers + more}
    if found:
        note(f"{where}: layers that predict further tokens are left out ({len(found)} tensors); plain decoding does not run them")
    return found
