"""SGLang: plain layout, `LlamaForCausalLMEagle3`; layer ids name the layers whose *output* is read (one less than the input's layer).

Read in version 0.5.23: names it does not know are dropped and missing tensors left as they were made, both without a word, so a file is
checked here before it goes there. In layers behind the first it names the norm before attention hidden_norm, where vLLM reads
input_layernorm; both are written.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import torch

from eyas.config import TreeShape
from eyas.files.eagle3_files import layer_ids
from eyas.formats.plain import plain_config, write_plain
from eyas.formats.portable import MORE_LAYERS, OTHER_WIDTH, Draft, TargetFiles, unusual

TITLE = "SGLang 0.5.23"
VARIABLES = "--default-chat-template-kwargs"  # of the chat template, for requests that set none
WEIGHTS = ("bf16", "fp16", "fp32")


def refusal(draft: Draft) -> str | None:
    if why := unusual(draft, "SGLang", (MORE_LAYERS, OTHER_WIDTH)):
        return why
    if draft.config.norm_before_residual:
        return "SGLang's draft layer adds to the un-normed feature (no norm_before_residual); vLLM runs such a draft"
    if draft.config.taps[0] == 0:
        return "SGLang names a layer by its output, and the input of layer 0 is the output of none"
    return None


def write(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    """Write the draft; without an embedding where it is as wide as its target, since SGLang then gives it the target's."""
    norms = [f"layers.{number}.{{}}.weight" for number in range(1, draft.config.draft_layers)]
    twins = {name.format("hidden_norm"): draft.weights[name.format("input_layernorm")].clone() for name in norms}
    config = plain_config(draft, target.config, dtype) | layer_ids(draft.config)
    write_plain(work, replace(draft, weights=draft.weights | twins), config, dtype)


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    drafted = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
    counts = {"num-steps": shape.levels, "eagle-topk": shape.top_k, "num-draft-tokens": shape.nodes}
    sizes = [word for name, count in counts.items() for word in (f"--speculative-{name}", str(count))]
    return f"{serve_alone(target)} {shlex.join([*drafted, *sizes])}"


def serve_alone(target: str) -> str:
    return shlex.join(["python", "-m", "sglang.launch_server", "--model-path", target])
