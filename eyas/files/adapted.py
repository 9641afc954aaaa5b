"""Loads a target that runs through transformers, and compares it with transformers' own forward.

Knows how transformers loads a model and says what did not fit; model/adapter.py runs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError
from eyas.files.adaptable import adapted_config, model_class
from eyas.files.disk import read_json
from eyas.files.hf_config import first_line, stored_config
from eyas.files.quantised import BY_TRANSFORMERS, kind_of, quantisation
from eyas.files.target_weights import further_layers, is_widened, stored_tensors
from eyas.files.untrusted import pickled
from eyas.model.adapter import NAME, AdaptedTarget, attention, compare, mask

OTHER_PARTS = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|multi_modal|mm_)\w*\.")  # of a model that reads images or sound too


def load_adapted(directory: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> AdaptedTarget:
    """Load a target through transformers and compare it with transformers' own forward; it is not yet prepared for inference."""
    config, raw = adapted_config(directory), read_json(directory / "config.json")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    stored = stored_config(directory)
    kind = model_class(stored)
    alone = kind.config_class is type(stored.get_text_config()) is not type(stored)  # the text model can be had alone
    if alone:
        stored = stored.get_text_config()
    settings = {"dtype": dtype, "attn_implementation": NAME, "use_safetensors": True, "local_files_only": True, "config": stored}
    source: Path | None = directory
    if pickled(directory) or is_widened(raw):  # files that transformers would trust, weights that it would keep in 8 bits
        source, settings["state_dict"] = None, stored_tensors(directory, dtype)
        for part in (stored, stored.get_text_config()):
            vars(part).pop("quantization_config", None)
    elif quantisation(raw):
        settings["quantization_config"] = widening(raw)
    try:
        with quietly():
            loaded: Any = kind.from_pretrained(source, output_loading_info=True, **settings)
            network, report = loaded
    except Exception as error:  # transformers raises many kinds: no weights, damaged ones, a missing package
        raise EyasError(f"transformers cannot load {directory} ({first_line(error)})") from None
    ignored = ("rotary_emb.inv_freq", "attn.masked_bias")  # old checkpoints hold them; the config says them
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    unexpected = [
        name for name in sorted(report["unexpected_keys"]) if not (name.endswith(ignored) or (alone and OTHER_PARTS.search(name)))
    ]
    surplus = further_layers(unexpected, raw, directory)
    problems += [f"unknown {name}" for name in unexpected if name not in surplus]
    problems += [f"{name} has another shape" for name in sorted(str(key) for key in report["mismatched_keys"])]
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise EyasError(f"target {directory} does not fit: {'; '.join(problems[:8])}{rest}")
    try:
        target = AdaptedTarget(network.to(device).eval().requires_grad_(False), config)
        compare(target)
        target.drop_what_reads_no_text()
    except Exception as error:
        what = first_line(error) if isinstance(error, EyasError) else f"{type(error).__name__}: {first_line(error)}"
        raise EyasError(f"{directory} ({network.config.model_type}) cannot be a target: {what}") from error
    return target


def widening(raw: Mapping[str, Any]) -> Any:
    """transformers' setting that makes plain numbers of quantised weights at loading."""
    from transformers.utils.quantization_config import Mxfp4Config

    assert kind_of(quantisation(raw) or {})[0] in BY_TRANSFORMERS, "other kinds are refused or widened here"
    return Mxfp4Config(dequantize=True)


@contextmanager
def quietly() -> Iterator[None]:
    """transformers draws a bar over the tensors it loads and a table of those that do not fit; eyas says both itself."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
