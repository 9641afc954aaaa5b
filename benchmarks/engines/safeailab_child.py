"""SafeAILab's own draft code on features it is handed: logits along each text, and the tree it grows at some places.

Runs in an environment with an older transformers; imports `cnets` from a checkout of SafeAILab/EAGLE and nothing of eyas. Reads job.json
(`checkout`, `draft`, `target`, `cases`: a safetensors file with features and tokens of each text, `roots`: places where a tree is grown,
`tree`) and writes logits (a safetensors file) and trees.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, str(Path(job["checkout"]) / "eagle" / "model"))
    import transformers

    model, odd = load(job)
    cases, logits, trees = load_file(job["cases"]), {}, []
    with torch.no_grad():
        for number, roots in enumerate(job["roots"]):
            features, tokens = cases[f"features.{number}"][None], cases[f"tokens.{number}"][None]
            model.reset_kv()
            model.tree_mask = None
            hidden, _ = model(features[:, :-1], input_ids=tokens[:, 1:], use_cache=True)
            logits[f"logits.{number}"] = model.lm_head(model.norm(hidden))[0]
            trees.append([tree(model, features[:, :root], tokens[:, : root + 1]) for root in roots])
    save_file(logits, sys.argv[2] + ".safetensors")
    told = {"engine": f"SafeAILab/EAGLE cnets.py, transformers {transformers.__version__}", "trees": trees, "odd": odd}
    Path(sys.argv[2]).write_text(json.dumps(told))


def load(job: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Its model as its EaModel makes it, and which names did not fit (it loads without being strict)."""
    from cnets import Model
    from configs import EConfig

    folder = Path(job["draft"])
    config = EConfig.from_pretrained(folder / "config.json")
    nodes, depth, top_k = job["tree"]
    model = Model(config, load_emb=True, path=job["target"], total_tokens=nodes, depth=depth, top_k=top_k).eval()
    pickled = folder / "pytorch_model.bin"
    weights = torch.load(pickled) if pickled.exists() else load_file(folder / "model.safetensors")
    found = model.load_state_dict(weights, strict=False)
    model.float().init_tree()
    return model, {"missing": list(found.missing_keys), "unexpected": list(found.unexpected_keys)}


def tree(model: Any, features: torch.Tensor, tokens: torch.Tensor) -> list[list[int]]:
    """Paths of tokens from the root down to each drafted node, sorted."""
    model.reset_kv()
    drafted, _, mask, _ = model.topK_genrate(features, tokens, None, None)
    rows = mask[0, 0].bool()
    return sorted(drafted[0][rows[node]].tolist()[1:] for node in range(1, drafted.shape[1]))


if __name__ == "__main__":
    main()
