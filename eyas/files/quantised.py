"""Quantised checkpoints: weights of 8 bits times their scales become plain numbers, and every kind that is not read is refused by name.

Knows how FP8 and int8 weights and their scales are named and laid out; knows no model. What was rounded stays rounded, but activations are
not: an engine that rounds those too may draw other tokens at near ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import EyasError, short

# quant_method -> the formats (or algorithms) of it that are read here; None: all there are
WIDENED: dict[str, tuple[str, ...] | None] = {
    "fp8": None,
    "fbgemm_fp8": None,
    "modelopt": ("FP8",),
    "compressed-tensors": ("float-quantized", "naive-quantized", "int-quantized", "dense"),
}
BY_TRANSFORMERS = ("mxfp4",)  # transformers widens them at loading; only for models that run through it
ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "activation_scale")  # scales of what is not a weight
PACKED = ("qweight", "weight_packed", "SCB", "absmax", "weight_zero_point", "qzeros")  # tensors that only other kinds have
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8)


def quantisation(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of quantised weights; None: nothing."""
    inner = raw.get("text_config")
    places = [raw, inner if isinstance(inner, dict) else {}]
    found = (place.get(key) for place in places for key in ("quantization_config", "compression_config", "quantization"))
    return next((each for each in found if isinstance(each, dict) and each), None)


def kind_of(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """A quantisation's method, and which format or algorithm of it, where it says so."""
    method = settings.get("quant_method") or ("mlx" if "group_size" in settings else "an unnamed method")
    return str(method), settings.get("format") or settings.get("quant_algo")


def check_quantised(raw: Mapping[str, Any], path: Path) -> None:
    """Raise `EyasError` where the config.json at `path` says that weights are quantised in a way that is not read."""
    settings = quantisation(raw)
    if settings is None:
        return
    method, form = kind_of(settings)
    formats = WIDENED.get(method, ())
    if method not in BY_TRANSFORMERS and formats is not None and form not in formats:
        bits = f", {settings['bits']} bits" if settings.get("bits") else ""
        raise refused(f"{path} says that the weights are quantised with {method}{f' ({form})' if form else ''}{bits}")


def refused(what: str) -> EyasError:
    way_out = "give the model that it was made from, or a GGUF of it; --precision int8 and q4 make weights small"
    return EyasError(f"{what}, which eyas does not read; {way_out}")


def widened(tensors: Mapping[str, Tensor], raw: Mapping[str, Any], dtype: torch.dtype, where: Path) -> dict[str, Tensor]:
    """The tensors with every weight of 8 bits multiplied by its scales, in this number format. Raises `EyasError` for weights that are
    packed in another way, and for scales that do not fit."""
    settings = quantisation(raw) or {}
    if packed := next((name for name in tensors if name.rpartition(".")[2] in PACKED), None):
        raise refused(f"{where} holds {packed}, as quantised weights of fewer bits are stored")
    plain = {}
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if last in ("weight_scale", "weight_scale_inv") or (settings and last in ACTIVATIONS):
            continue
        scale = next((tensors[f"{name}{kind}"] for kind in ("_scale_inv", "_scale") if f"{name}{kind}" in tensors), None)
        if scale is not None:
            tensor = (tensor.float() * expanded(scale, tensor.shape, settings.get("weight_block_size"), name)).to(dtype)
        elif tensor.dtype in EIGHT_BITS:
            raise refused(f"{where} holds {name} in 8 bits without a scale")
        plain[name] = tensor
    return plain


def expanded(scale: Tensor, shape: torch.Size, block: Any, name: str) -> Tensor:
    """Scales of a whole weight, of its rows or of its blocks, so that they multiply the weight. Scales in 8 bits are exponents of 2."""
    scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    found = tuple(scale.shape)
    for dim in (-2, -1):
        count, size = scale.shape[dim], shape[dim]
        of_block = block[dim] if isinstance(block, list) and len(block) == 2 and isinstance(block[dim], int) else 0
        step = of_block if of_block > 0 and count == -(-size // of_block) else size // count if count and size % count == 0 else 0
        if not step:
            raise EyasError(f"{name} is {tuple(shape)} and its scales {found} (blocks {short(block)}), which do not go together")
        scale = scale.repeat_interleave(step, dim).narrow(dim, 0, size)
    return scale
