"""Reads files that anybody may have made, without trusting them: fields of a config, tensors of safetensors or of a pickled checkpoint.

Nothing in a file is executed, and no more is allocated than the file holds. PyTorch's restricted reader reads a pickle once its archive has
been found honest, and a tensor that claims more than its storage is refused. Knows no layout.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from eyas.config import LARGEST_SIZE, EyasError, check_number, short
from eyas.files.disk import check_fetched, read_json
from eyas.files.tensors import INDEX, read_file, read_tensors, shards

LARGEST_CONFIG = 1 << 20  # bytes
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
WEIGHTS = ("model.safetensors", INDEX, PICKLED, PICKLED_INDEX)  # the first that is there is read, as in transformers
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5", "*.ckpt", "*.npz", "*.onnx")
FORMATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)


class Fields:
    """A JSON object's fields, each checked when it is read. A wrong one raises `EyasError`, which names the field and its file. Which were
    read is remembered, so that a reader can ask for those it passed over."""

    def __init__(self, raw: Mapping[str, Any], where: Path | str) -> None:
        self.raw, self.where = raw, where
        self.asked: set[str] = set()  # names of the fields that were read
        self.objects: dict[str, Fields] = {}  # the objects among them

    @classmethod
    def of(cls, directory: Path) -> Fields:
        path = directory / "config.json"
        if path.exists() and path.stat().st_size > LARGEST_CONFIG:
            raise EyasError(f"{path} has {path.stat().st_size} bytes; a draft's config is a page of text")
        try:
            return cls(read_json(path), path)
        except RecursionError:
            raise EyasError(f"{path} is nested too deep to be a config") from None

    def object(self, key: str) -> Fields:
        """The object under this key; an empty one where there is none."""
        value = self.given(key)
        if value is not None and not isinstance(value, dict):
            raise EyasError(f"{self.where}: {key} must be an object, not {short(value)}")
        return self.objects.setdefault(key, Fields(value or {}, self.where))

    def given(self, key: str) -> Any:
        """What stands under this key, unchecked; None where nothing does."""
        self.asked.add(key)
        return self.raw.get(key)

    def passed_over(self, known: Collection[str] = ()) -> list[str]:
        """The fields that hold something and were not read, but for those `known` by name; in objects that were read, as `object.field`."""
        own = [key for key, value in self.raw.items() if value is not None and key not in self.asked and key not in known]
        objects = [(key, each) for key, each in self.objects.items() if key not in known]
        return own + [f"{key}.{name}" for key, each in objects for name in each.passed_over(known)]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.given(key)
        value = default if value is None else value
        if value is None:
            raise EyasError(f"{self.where} lacks {key}")
        return self.checked(key, value, 0, LARGEST_SIZE, whole=True)

    @overload
    def number(self, key: str, default: float) -> float: ...
    @overload
    def number(self, key: str, default: None = None) -> float | None: ...
    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.given(key)
        return default if value is None else self.checked(key, value, 0, 1e12)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.given(key)
        if value is not None and not isinstance(value, bool):
            raise EyasError(f"{self.where}: {key} must be true or false, not {short(value)}")
        return default if value is None else value

    def text(self, key: str) -> str | None:
        value = self.given(key)
        if value is not None and not isinstance(value, str):
            raise EyasError(f"{self.where}: {key} must be text, not {short(value)}")
        return value

    def layers(self, key: str) -> tuple[int, ...] | None:
        """Ascending layer numbers, or None where the key is absent, null or an empty list."""
        value = self.given(key)
        if value is None or value == []:
            return None
        whole = isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 10000 for one in value)
        if not whole or sorted(set(value)) != value:
            raise EyasError(f"{self.where}: {key} must be different layer numbers in ascending order, not {short(value)}")
        return tuple(value)

    def checked(self, key: str, value: Any, least: float, most: float, whole: bool = False) -> Any:
        try:
            check_number(key, value, least, most, whole)
        except EyasError as error:
            raise EyasError(f"{self.where}: {error}") from None
        return value


def weights_of(directory: Path) -> str | None:
    """The file in `WEIGHTS` from which a directory's weights are read; None: there is none."""
    return next((name for name in WEIGHTS if (directory / name).exists()), None)


def weights_instead(directory: Path) -> str:
    """What a directory has in place of weights that are read, and what to do; "" where it has nothing of the kind."""
    there = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    if not there:
        return ""
    if gone := [name for name in there if not (directory / name).exists()]:
        return f": {gone[0]} is a link to a file that is gone; fetch it again"
    if re.search(r"-\d+-of-\d+\.safetensors$", there[0]):
        return f": {there[0]} is one of several, and {INDEX}, which lists them, is missing; copy or download it"
    if there[0].startswith("consolidated"):
        return f", but {there[0]}, in a layout of its makers' own; fetch the files in transformers' layout"
    ways = {".safetensors": "rename it, if it is the whole model", ".gguf": "give that file instead of the directory"}
    return f", but {there[0]}; {ways.get(Path(there[0]).suffix, 'eyas reads safetensors: convert it, or fetch the model in that form')}"


def pickled(directory: Path) -> bool:
    """Whether a directory's weights are what torch.save wrote, with no safetensors beside them."""
    return weights_of(directory) in (PICKLED, PICKLED_INDEX)


def tensors_of(directory: Path, *others: str, formats: Sequence[torch.dtype] = FORMATS) -> dict[str, Tensor]:
    """All tensors of a directory, from the first file in `WEIGHTS` that is there, else from the first of other files that is there."""
    name = weights_of(directory) or next((other for other in others if (directory / other).exists()), None)
    if name is None:
        raise EyasError(f"{directory} holds neither model.safetensors nor {' nor '.join((PICKLED, *others))}{weights_instead(directory)}")
    path = directory / name
    if name in (WEIGHTS[0], INDEX):
        return checked_tensors(read_tensors(directory), directory, formats)
    if name == PICKLED_INDEX:
        return pickled_shards(directory, formats)
    return checked_tensors(read_file(path) if path.suffix == ".safetensors" else unpickled(path), path, formats)


def pickled_shards(directory: Path, formats: Sequence[torch.dtype]) -> dict[str, Tensor]:
    """All tensors of the shards that pytorch_model.bin.index.json lists."""
    tensors: dict[str, Tensor] = {}
    for path in shards(directory / PICKLED_INDEX):
        if not path.exists():
            raise EyasError(f"{directory} holds no {path.name}, which its index lists; copy or download it again")
        tensors |= checked_tensors(unpickled(path), path, formats)
    return tensors


def unpickled(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint that torch.save wrote. Code in it is not run: the file is refused."""
    damaged = f"{path} is damaged or cut short; copy or download it again"
    if not zipfile.is_zipfile(path):
        check_fetched(path)
        raise EyasError(f"{path} is not an archive as torch.save writes it; load it where it was made and save it as safetensors")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise EyasError(f"{path} is compressed inside, which torch.save never does; it is not read")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise EyasError(f"{path} claims more bytes than it has; it is not read")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0].replace("\n", " ")
        raise EyasError(f"{path} holds more than tensors, and code in a file is not run ({short(reason)}); ask for safetensors") from None
    except EyasError:
        raise
    except Exception as error:  # a damaged archive may raise almost anything
        raise EyasError(f"{damaged} ({short(str(error).splitlines()[0] if str(error) else type(error).__name__)})") from None


def checked_tensors(tensors: Any, where: Path, formats: Sequence[torch.dtype] = FORMATS) -> dict[str, Tensor]:
    """The tensors, once all are dense, of plain number formats, and no larger than the bytes behind them."""
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise EyasError(f"{where} holds no table of tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise EyasError(f"{where}: {short(name)} is a {type(tensor).__name__}, not a tensor; it is another kind of checkpoint")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in formats or tensor.device.type != "cpu":
            raise EyasError(f"{where}: {short(name)} is in a number format ({tensor.dtype}) that eyas does not read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise EyasError(f"{where}: {short(name)} claims {tensor.numel()} numbers, more than the file holds")
    return tensors
