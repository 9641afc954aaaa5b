"""Every layout by name: how a draft is written in it and read from it, what it cannot hold, which command serves it.

Knows all engines, as no other module does; each engine's facts are in its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError, TreeShape
from eyas.files.untrusted import PICKLED, Fields
from eyas.formats import llama_cpp, openvino, safeailab, sglang, vllm
from eyas.formats.plain import read_plain
from eyas.formats.portable import FILES, Draft, Found, TargetFiles, own_draft

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Write = Callable[[Path, Draft, TargetFiles, Any], None]


@dataclass(frozen=True)
class Layout:
    title: str  # engine and the version that was run
    files: tuple[str, ...]  # names of all that is written, or patterns of them: only a folder of these may be replaced
    weights: tuple[str, ...]  # number formats it can be written in; the first is the default
    refusal: Callable[[Draft], str | None]  # why the engine cannot run this draft
    write: Write  # into an existing directory; the last argument is a name of `weights`
    read: Callable[[Path], Found] | None
    serve: Callable[[Path, str, TreeShape], str]  # the command line, quoted for a shell, for a draft's path, a target and a tree
    serve_alone: Callable[[str], str] | None  # the same for a target without a draft; None: the engine has none
    variables: str | None = None  # the option of that command line for variables of the chat template, as JSON; None: it has none


def in_torch(write: Callable[[Path, Draft, TargetFiles, torch.dtype], None]) -> Write:
    return lambda work, draft, target, weights: write(work, draft, target, DTYPES[weights])


LAYOUTS = {
    "sglang": Layout(
        sglang.TITLE,
        FILES,
        sglang.WEIGHTS,
        sglang.refusal,
        in_torch(sglang.write),
        read_plain,
        sglang.serve,
        sglang.serve_alone,
        sglang.VARIABLES,
    ),
    "vllm": Layout(
        vllm.TITLE, FILES, vllm.WEIGHTS, vllm.refusal, in_torch(vllm.write), read_plain, vllm.serve, vllm.serve_alone, vllm.VARIABLES
    ),
    "speculators": Layout(
        f"{vllm.TITLE}, speculators 0.9.0",
        FILES,
        vllm.WEIGHTS,
        vllm.refusal,
        in_torch(vllm.write_speculators),
        vllm.read_speculators,
        vllm.serve_speculators,
        vllm.serve_alone,
        vllm.VARIABLES,
    ),
    "safeailab": Layout(
        safeailab.TITLE,
        FILES,
        safeailab.WEIGHTS,
        safeailab.refusal,
        in_torch(safeailab.write),
        read_plain,
        safeailab.serve,
        None,
    ),
    "safeailab-bin": Layout(
        f"{safeailab.TITLE}, as pytorch_model.bin",
        ("config.json", PICKLED),
        safeailab.WEIGHTS,
        safeailab.refusal,
        in_torch(safeailab.write_pickled),
        read_plain,
        safeailab.serve,
        None,
    ),
    "llama_cpp": Layout(
        llama_cpp.TITLE,
        (llama_cpp.FILE,),
        llama_cpp.WEIGHTS,
        llama_cpp.refusal,
        llama_cpp.write,
        llama_cpp.read,
        llama_cpp.serve,
        llama_cpp.serve_alone,
        llama_cpp.VARIABLES,
    ),
    "openvino": Layout(
        openvino.TITLE, openvino.FILES, openvino.WEIGHTS, openvino.refusal, openvino.write, None, openvino.serve, openvino.serve_alone
    ),
}


def layout_of(name: str) -> Layout:
    if name not in LAYOUTS:
        raise EyasError(f"layout {name!r} is unknown; choose {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def find(path: Path) -> Found:
    """Read a draft in any known layout, eyas's own included."""
    if path.is_file() and path.suffix == ".gguf":
        return llama_cpp.read(path)
    if not path.is_dir():
        raise EyasError(f"{path} is neither a directory nor a .gguf file")
    if (path / "openvino_model.xml").exists():
        raise EyasError(f"{path} is an OpenVINO model: compiled, its weights no longer bear names; import what it was made from")
    if vllm.is_speculators(path):
        return vllm.read_speculators(path)
    if (path / "config.json").exists():
        return own(path) if "eyas" in Fields.of(path).raw else read_plain(path)
    models = sorted(path.glob("*.gguf"))
    if len(models) == 1:
        return llama_cpp.read(models[0])
    raise EyasError(f"{path} holds no draft: neither config.json with weights nor one .gguf file")


def own(path: Path) -> Found:
    draft = own_draft(path)
    shape = {name: value for name, value in vars(draft.config).items() if name != "taps"}
    return Found("eyas", shape, draft.weights, draft.vocab, draft.config.taps, target_layers=draft.target_layers, facts=draft.facts)
