"""speculators' own model class on our export: logits along texts whose features it is handed. Imports nothing of eyas.

Reads job.json (`draft`, `cases`: a safetensors file with features and tokens, `texts`: how many) and writes logits by attention.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ATTENTIONS = ("eager", "sdpa")


def main() -> None:
    from importlib.metadata import version

    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    job = json.loads(Path(sys.argv[1]).read_text())
    cases, logits, caught = load_file(job["cases"]), {}, []
    for attention in ATTENTIONS:
        config = Eagle3SpeculatorConfig.from_pretrained(job["draft"])
        config.transformer_layer_config._attn_implementation = attention
        model = Eagle3DraftModel.from_pretrained(job["draft"], config=config).float().eval()
        model.lm_head.register_forward_hook(lambda module, given, result: caught.append(result))
        for number in range(job["texts"]):
            features, tokens = cases[f"features.{number}"][None, :-1], cases[f"tokens.{number}"][None, 1:]
            caught.clear()
            with torch.no_grad():
                model(features.float(), tokens, torch.zeros_like(tokens), ttt_steps=1)
            logits[f"{attention}.{number}"] = caught[0][0].float().contiguous()
    save_file(logits, sys.argv[2] + ".safetensors")
    Path(sys.argv[2]).write_text(json.dumps({"engine": f"speculators {version('speculators')}"}))


if __name__ == "__main__":
    main()
