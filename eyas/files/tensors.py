"""Reads and saves safetensors, and loads them into modules strictly.

A missing, surplus or misshapen tensor is an error with a list, since a model with a silently missing tensor still runs and accepts nothing.
Knows file formats; knows nothing of what the tensors compute.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eyas.config import EyasError
from eyas.files.disk import check_fetched, read_json

INDEX = "model.safetensors.index.json"
WRAPPERS = {  # what names begin with where a wrapper of a model was saved -> what to do
    "_orig_mod.": "as torch.compile names them; save the model that was compiled (its _orig_mod)",
    "module.": "as DistributedDataParallel names them; save the model inside (its module)",
    "base_model.model.": "as peft names them; merge the adapter (merge_and_unload) and save what that returns",
}


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory: model.safetensors, else the shards that its index lists (the order in which transformers looks)."""
    alone = directory / "model.safetensors"
    files = shards(directory / INDEX) if (directory / INDEX).exists() and not alone.exists() else [alone]
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.exists():
            raise EyasError(f"{directory} holds no {path.name}; give a directory with config.json and safetensors weights")
        tensors |= read_file(path)
    return tensors


def shards(index: Path) -> list[Path]:
    """The files that an index of weights lists, which lie beside it."""
    where = read_json(index).get("weight_map")
    names = sorted(set(where.values())) if isinstance(where, dict) and all(isinstance(name, str) for name in where.values()) else []
    if not names or any(Path(name).name != name for name in names):
        raise EyasError(f"{index} has no weight_map of files beside it; copy or download it again")
    return [index.parent / name for name in names]


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        check_fetched(path)
        raise EyasError(f"{path} is damaged or cut short ({error}); copy or download it again") from None


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into the module's parameters by name; every name and shape must fit."""
    own = check_tensors(module, tensors, what)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def wrapper_of(names: Collection[str]) -> str | None:
    """What to say of a model that was saved together with what it was wrapped in; None: it was not."""
    prefix = next((prefix for prefix in WRAPPERS if names and all(name.startswith(prefix) for name in names)), None)
    return None if prefix is None else f"all its tensors' names begin with {prefix}, {WRAPPERS[prefix]}"


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The module's parameters by name. Raises `EyasError` with a list where tensors are missing, misshapen or left over."""
    derived = "rotary_emb.inv_freq"  # old checkpoints hold it, though the config implies it
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(derived)}
    own = dict(module.named_parameters()) | dict(module.named_buffers())  # a tied tensor appears once, under its first name
    first = {id(parameter): name for name, parameter in own.items()}
    every = module.named_parameters(remove_duplicate=False)
    again = {name: first[id(parameter)] for name, parameter in every if name in tensors and name not in own}  # stored twice: Qwen3-0.6B
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own and name not in again]
    unequal = [(name, twin) for name, twin in again.items() if twin in tensors and not torch.equal(tensors[name], tensors[twin])]
    problems += [f"{name} differs from {twin}, to which it is tied" for name, twin in unequal]
    shapes = [(name, tuple(tensors[name].shape), tuple(own[name].shape)) for name in own if name in tensors]
    problems += [f"{name} is {found}, expected {wanted}" for name, found, wanted in shapes if found != wanted]
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        if wrapper := wrapper_of(tensors):
            raise EyasError(f"{what} does not fit: {wrapper}")
        raise EyasError(f"{what} does not fit: {'; '.join(problems[:8])}{rest}")
    return own


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], largest_file: int | None = None) -> None:
    """model.safetensors, or numbered shards with an index where one file would pass `largest_file` bytes."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        if largest_file is None or size <= largest_file:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            return
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > largest_file:
                shards.append({})
            shards[-1][name] = tensor
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, directory / name, metadata={"format": "pt"})
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1))
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from None
