"""OpenVINO GenAI: an intermediate representation that optimum-intel exports, with its list of tapped layers put right.

The exporter and eyas need different versions of transformers, so the exporter runs as a child in an environment of its own
(openvino_convert.py). The child also runs the converted model on seeded input, and the logits are compared with ours here. Layer ids name
the layers whose *output* is read.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import EyasError, TreeShape, short
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.formats.plain import plain_config, write_plain
from eyas.formats.portable import Draft, TargetFiles, unusual
from eyas.model.rows import Segment

TITLE = "OpenVINO GenAI 2026.4"
WEIGHTS = ("fp32", "fp16", "int8")
CONVERT = Path(__file__).with_name("openvino_convert.py")
PINS = "openvino-genai==2026.4.1.0 optimum-intel==2.2.0 transformers==5.5.4 torch==2.13.0 nncf"
SPARE = "torchvision"  # comes along, in a build that may not fit this torch and then breaks the import
FILES = (
    *("openvino_model.xml", "openvino_model.bin", "openvino_config.json", "config.json", "generation_config.json"),
    *("openvino_tokenizer.*", "openvino_detokenizer.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "vocab*", "merges*"),
)  # what the exporter writes, the target's tokenizer included
CLOSE = 1e-3  # largest difference of logits allowed in float32: other kernels, other order of sums
MINUTES = 20


def refusal(draft: Draft) -> str | None:
    if why := unusual(draft, "OpenVINO"):
        return why
    config = draft.config
    wrong = [name for name in ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual") if getattr(config, name)]
    if wrong:
        return (
            f"its pipeline moves fc behind the target and feeds back the bare state, so {', '.join(wrong)} cannot be; SGLang and vLLM can"
        )
    if draft.config.taps[0] == 0:
        return "OpenVINO names a layer by its output, and the input of layer 0 is the output of none"
    return None


def write(work: Path, draft: Draft, target: TargetFiles, weights: str, python: Path | None = None) -> None:
    """Write `openvino_model.xml` and what belongs to it. `python`: that of an environment that has optimum-intel."""
    if python is None or not python.exists():
        named = f"{python} does not exist" if python else "OpenVINO's exporter needs an environment of its own"
        make = f"python -m venv ov && ov/bin/pip install {PINS} && ov/bin/pip uninstall -y {SPARE}"
        raise EyasError(f"{named}; make one with `{make}` and pass --python ov/bin/python")
    with tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        plain, result = Path(folder) / "plain", Path(folder) / "outputs.npz"
        plain.mkdir()
        write_plain(plain, draft, plain_config(draft, target.config, torch.float32), torch.float32)
        for file in target.directory.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
                shutil.copy(file, plain)
        taps = ",".join(str(tap - 1) for tap in draft.config.taps)
        command = [str(python), str(CONVERT), str(plain), str(work), "--taps", taps, "--weights", weights, "--check", str(result)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60 * MINUTES)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EyasError(f"the exporter did not run ({short(str(error))})") from None
        if done.returncode or not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise EyasError(f"the exporter failed ({lines[-1] if lines else 'no output'})")
        compare(draft, result, exact=weights == "fp32")


@torch.no_grad()
def compare(draft: Draft, result: Path, exact: bool) -> None:
    """Compare the converted model's logits with ours on the same input. Raises `EyasError` where they differ."""
    import numpy

    held: Mapping[str, Any] = numpy.load(result)
    if held["hidden_layers_list"].tolist() != [tap - 1 for tap in draft.config.taps]:
        raise EyasError(f"the exported model taps outputs of layers {held['hidden_layers_list'].tolist()}, not what was asked; not kept")
    if not numpy.array_equal(held["d2t"], draft.vocab.as_tensors()["d2t"].numpy()):
        raise EyasError("the exported model has another draft vocabulary; not kept")
    theirs = torch.from_numpy(held["logits"])
    ours = logits_on(draft, torch.from_numpy(held["embeddings"]), torch.from_numpy(held["features"]))
    difference = float((ours - theirs).abs().max())
    if not difference <= (CLOSE if exact else float(ours.std())):
        raise EyasError(f"the exported model computes other logits ({difference:g} apart); not kept")


def logits_on(draft: Draft, embeddings_NH: Tensor, features_N3H: Tensor) -> Tensor:
    """Logits [N, D] of rows at positions 0 .. N-1, row i reading embedding i and feature i."""
    network = draft.network(embeddings_NH)
    drafter, rows = Eagle3Drafter(network, draft.vocab), len(embeddings_NH)
    drafter.reserve(1, rows)
    return network.logits(drafter.read(list(range(rows)), network.fuse(features_N3H), list(range(rows)), [Segment(0, rows)]))


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    """From Python; the target as OpenVINO's own, by `optimum-cli export openvino`."""
    settings = f"num_assistant_tokens={shape.nodes - 1}"
    if shape.top_k > 1:
        settings += f", tree_depth={shape.levels}, branching_factor={shape.top_k}"
    made = "pipe = ov.LLMPipeline(sys.argv[1], 'CPU', draft_model=ov.draft_model(sys.argv[2], 'CPU'))"
    asked = f"print(pipe.generate('Why is the sky blue?', max_new_tokens=200, {settings}))"
    return f'python -c "import sys, openvino_genai as ov; {made}; {asked}" TARGET_AS_OPENVINO {shlex.quote(str(draft))}'


def serve_alone(target: str) -> str:
    made = "pipe = ov.LLMPipeline(sys.argv[1], 'CPU')"
    asked = "print(pipe.generate('Why is the sky blue?', max_new_tokens=200))"
    return f'python -c "import sys, openvino_genai as ov; {made}; {asked}" TARGET_AS_OPENVINO'
