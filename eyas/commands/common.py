"""What commands share: options into an engine and a request."""

from __future__ import annotations

import argparse

from eyas.config import METHODS, EyasError, Request, Sampling, TreeShape
from eyas.engine import Engine, load, load_target, target_directory


def request_from(options: argparse.Namespace, method: str | None = None) -> Request:
    """Check all settings before anything heavy is loaded."""
    chosen = method or ("plain" if getattr(options, "plain", False) else getattr(options, "method", None))
    if chosen is not None and chosen not in METHODS:
        raise EyasError(f"method {chosen!r} is unknown; choose {', '.join(METHODS)}")
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
