"""`eyas export`: a draft in the layout of an engine, read back and compared before it is called done."""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas.commands.common import target_for
from eyas.commands.output import terminal
from eyas.config import EyasError, TreeShape
from eyas.engine import draft_directory
from eyas.formats.export import Check, export
from eyas.formats.layouts import layout_of
from eyas.formats.portable import own_draft


def run(options: argparse.Namespace) -> int:
    console = terminal()
    if options.out is None:
        raise EyasError("name a directory to write to")
    if options.chain < 1:
        raise EyasError(f"chain must be at least 1, not {options.chain}")
    layout, out = layout_of(options.to), Path(options.out).expanduser()
    source = draft_directory(options.draft, Path())
    assert source is not None  # the command line asks for one
    draft = own_draft(source)
    target = target_for(options.target, source)
    extra = {}
    if options.target_gguf:
        if options.to != "llama_cpp":
            raise EyasError(f"--target-gguf brings llama.cpp's tokenizer; {layout.title} has no use for it")
        extra["target_gguf"] = Path(options.target_gguf).expanduser()
    if options.python:
        if options.to != "openvino":
            raise EyasError(f"--python names the environment of OpenVINO's exporter; {layout.title} needs none")
        extra["python"] = Path(options.python).expanduser()
    check = export(draft, source, options.to, out, target, options.weights, options.force, **extra)
    console.print(f"{out}: written for {layout.title}; {words(check)}", markup=False)
    console.print("serve it with:", layout.serve(out.resolve(), target.name, TreeShape.chain(options.chain)), sep="\n", markup=False)
    return 0


def words(check: Check) -> str:
    taps = f"taps (inputs of layers) {', '.join(map(str, check.taps))}"
    if check.difference is None:
        return taps
    if check.exact:
        return f"read back, logits equal ours ({check.difference:g} apart at most); {taps}"
    return f"read back, logits {check.difference:.2g} apart at most beside a spread of {check.spread:.2g} (weights are rounded); {taps}"
