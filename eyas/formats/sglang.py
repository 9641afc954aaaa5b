"""SGLang: plain layout, `LlamaForCausalLMEagle3`; layer ids name the layers whose *output* is read (one less than the input's layer).

Read in version 0.5.23: names it does not know are dropped and missing tensors left as they were made, both without a word, so a file is
checked here before it goes there.
"""

from __future__ import annotations

from pathlib import Path

import torch

from eyas.config import TreeShape
from eyas.files.eagle3_files import layer_ids
from eyas.formats.plain import plain_config, write_plain
from eyas.formats.portable import Draft, TargetFiles, unusual

TITLE = "SGLang 0.5.23"
WEIGHTS = ("bf16", "fp16", "fp32")


def refusal(draft: Draft) -> str | None:
    if why := unusual(draft, "SGLang"):
        return why
    if draft.config.norm_before_residual:
        return "SGLang's draft layer adds to the un-normed feature (no norm_before_residual); vLLM runs such a draft"
    if draft.config.taps[0] == 0:
        return "SGLang names a layer by its output, and the input of layer 0 is the output of none"
    return None


def write(work: Path, draft: Draft, target: TargetFiles, dtype: torch.dtype) -> None:
    """Write the draft without an embedding, since SGLang gives it the target's."""
    write_plain(work, draft, plain_config(draft.config, target.config, dtype) | layer_ids(draft.config), dtype)


def serve(draft: Path, target: str, shape: TreeShape) -> str:
    return (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 --speculative-draft-model-path {draft} "
        f"--speculative-num-steps {shape.levels} --speculative-eagle-topk {shape.top_k} --speculative-num-draft-tokens {shape.nodes}"
    )
