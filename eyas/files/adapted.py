"""Loads a target that runs through transformers, and compares it with transformers' own forward.

Knows how transformers loads a model and says what did not fit; model/adapter.py runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError
from eyas.files.adaptable import adapted_config
from eyas.files.hf_config import first_line, stored_config
from eyas.files.untrusted import pickled, tensors_of
from eyas.model.adapter import NAME, AdaptedTarget, attention, compare, mask


def load_adapted(directory: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> AdaptedTarget:
    """Load a target through transformers and compare it with transformers' own forward; it is not yet prepared for inference."""
    config = adapted_config(directory)
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    stored = stored_config(directory)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stored)]
    settings = {"dtype": dtype, "attn_implementation": NAME, "use_safetensors": True, "local_files_only": True}
    source: Path | None = directory
    if pickled(directory):  # read by the reader that trusts nobody
        source, settings = None, {**settings, "config": stored, "state_dict": tensors_of(directory)}
    try:
        with no_progress_bars():
            loaded: Any = kind.from_pretrained(source, output_loading_info=True, **settings)
            network, report = loaded
    except Exception as error:  # transformers raises many kinds: no weights, damaged ones, a missing package
        raise EyasError(f"transformers cannot load {directory} ({first_line(error)})") from None
    ignored = ("rotary_emb.inv_freq", "attn.masked_bias")  # old checkpoints hold them; the config says them
    problems = [f"missing {name}" for name in sorted(report["missing_keys"])]
    problems += [f"unknown {name}" for name in sorted(report["unexpected_keys"]) if not name.endswith(ignored)]
    problems += [f"{name} has another shape" for name in sorted(str(key) for key in report["mismatched_keys"])]
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise EyasError(f"target {directory} does not fit: {'; '.join(problems[:8])}{rest}")
    try:
        target = AdaptedTarget(network.to(device).eval().requires_grad_(False), config)
        compare(target)
    except Exception as error:
        what = first_line(error) if isinstance(error, EyasError) else f"{type(error).__name__}: {first_line(error)}"
        raise EyasError(f"{directory} ({network.config.model_type}) cannot be a target: {what}") from error
    return target


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws a bar over the tensors it loads; eyas says itself what takes long."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
