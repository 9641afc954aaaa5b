"""What commands share: options into an engine and a request."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from eyas.config import EyasError, Request, Sampling, TreeShape
from eyas.engine import BUNDLED, Engine, load, without_draft
from eyas.files.embedded import LAYERS, VOCABULARY
from eyas.files.target import from_hub, load_target, target_directory
from eyas.methods import method_named

if TYPE_CHECKING:
    from torch import Tensor

    from eyas.formats.portable import TargetFiles
    from eyas.measure.agreement import Evidence


def request_from(options: argparse.Namespace, method: str | None = None) -> Request:
    """Check all settings before anything heavy is loaded."""
    chosen = method or ("plain" if getattr(options, "plain", False) else getattr(options, "method", None))
    if chosen is not None:
        method_named(chosen)
    if options.tree != "auto":
        TreeShape.parse(options.tree)
    if options.max_new_tokens < 1:
        raise EyasError(f"max-new-tokens must be at least 1, not {options.max_new_tokens}")
    return Request(
        method=chosen,
        tree=options.tree,
        sampling=Sampling(options.temperature, options.top_k, options.top_p, options.min_p),
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        raw=getattr(options, "raw", False),
        verifier=options.verifier,
    )


def engine_from(options: argparse.Namespace) -> Engine:
    engine = load(options.target, options.draft, options.device, options.precision)
    if getattr(options, "draft_model", None):
        engine.use_draft_model(load_target(target_directory(options.draft_model), options.precision, options.device or "cpu"))
    return engine


def target_for(source: str | None, draft: Path) -> TargetFiles:
    """The target named, else the embedded one where the draft was trained for it."""
    from eyas.files.untrusted import Fields
    from eyas.formats.portable import TargetFiles

    if source is None:
        fields = Fields.of(draft)
        if (fields.object("eyas").size("target_layers"), fields.size("vocab_size")) != (LAYERS, VOCABULARY):
            raise EyasError(f"{draft} was not trained for the embedded target; name its own with --target")
    return TargetFiles.of(source)


def evidence_of(target: TargetFiles, new_tokens: int) -> tuple[Evidence, Tensor]:
    """Texts that the target writes to some questions, with its states; and its embedding [V, H] in float32."""
    from eyas.measure.agreement import QUESTIONS, gather

    engine = without_draft(target.directory, "fp32")
    raw = not getattr(engine.tokenizer, "chat_template", None)
    return gather(engine.target, [engine.encode(question, raw) for question in QUESTIONS], new_tokens), engine.target.embedding.detach()


def draft_path(source: str) -> Path:
    """Where a draft of any layout lies: `bundled` (the one that comes with eyas), a directory, a .gguf file or a hub name."""
    path = BUNDLED if source == "bundled" else Path(source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or source.count("/") != 1 or source.startswith((".", "~")):
        raise EyasError(f"{path} does not exist; give a directory, a .gguf file or a hub name like owner/draft")
    return from_hub(source, ["*.json", "*.safetensors", "*.bin", "*.gguf"])
