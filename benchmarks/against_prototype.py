"""Held-out tau after equal time: eyas' trainer against a bare research trainer of EAGLE-3 (a study script), the same conversations.

    python benchmarks/against_prototype.py --prototype DIR --shards DIR [--minutes 30] [--out DIR] [-- its own options]

`--prototype` holds `train.py` and what it imports: a single-file trainer with five unroll steps, batches of 4,096 tokens, AdamW at 1e-3, a
soft cross-entropy over 8,192 tokens with the head's gradient taken in the forward pass, and a target pass whose features stay in memory. It
runs as it is, as a child, with `--dtype fp32` where the processor does not multiply bfloat16 fast; what follows `--` is handed on to it.

Both train from scratch at the same time, one core each, on conversations of one question and one answer (it knows no others), for as many
minutes; then both drafts, ours and theirs as converted weights, are measured by the same simulation on the same held-out conversations.
Not alike: ours reads the features that the shards hold, theirs runs the target once over each conversation in its own time.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from claims import answer_tokens, from_scratch, hold_out_greedy, measured
from safetensors.torch import save_file

from eyas.config import DraftConfig, TrainSettings
from eyas.files.target import load_target, target_config, target_directory
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.vocab import DraftVocab
from eyas.train.features import Example, ShardStates, shard_examples
from eyas.train.shards import PATTERN
from eyas.train.trainer import Budget

SHORTEST = 12  # answer tokens a conversation needs to be read by the prototype


def main() -> None:
    options, theirs = arguments()
    torch.set_num_threads(1)
    directory = target_directory(None)
    config = target_config(directory)
    paths = [path for folder in options.shards for path in sorted(folder.glob(PATTERN))]
    examples = [example for example in shard_examples(paths, TrainSettings.max_length) if readable(example)]
    held_out, kept = hold_out_greedy(examples)
    target = load_target(directory, "fp32")
    options.out.mkdir(parents=True, exist_ok=True)
    write_for_prototype(kept, target.state_dict(), options.out)
    trainer = from_scratch(target, config, kept, TrainSettings(), options.out, workers=1)

    first, second = sorted(os.sched_getaffinity(0))[:2]
    child = start_prototype(options, theirs, second)
    os.sched_setaffinity(0, {first})
    try:
        trainer.run(Budget(minutes=options.minutes), lambda *_: None)
        if child.wait() != 0:
            sys.exit(f"the prototype failed; see {options.out / 'prototype.log'}")
    finally:
        child.kill()

    other, vocab = their_draft(options.out / "draft.pt", draft_config(config, 1), target.embedding.detach())
    found: dict[str, Any] = {
        "minutes_on_one_core_each": options.minutes,
        "conversations": len(kept),
        "answer_tokens": answer_tokens(kept),
        "held_out": len(held_out),
        "prototype_options": theirs,
    }
    found["eyas"] = measured(trainer.network, trainer.vocab, held_out, ShardStates()) | {"slots": trainer.progress.slots}
    found["prototype"] = measured(other, vocab, held_out, ShardStates()) | {"last_line": last_step(options.out / "prototype.log")}
    found["difference"] = round(found["eyas"]["tau"] - found["prototype"]["tau"], 3)
    print(json.dumps(found, indent=1))


def arguments() -> tuple[argparse.Namespace, list[str]]:
    own, theirs = sys.argv[1:], []
    if "--" in own:
        own, theirs = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--prototype", type=Path, required=True)
    parser.add_argument("--shards", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "against_prototype")
    return parser.parse_args(own), theirs or ["--dtype", "fp32"]


def readable(example: Example) -> bool:
    """One question, one answer that ends the conversation and is long enough for both."""
    start = first_answer_token(example)
    return max(example.answers) == 0 and min(example.answers[start:]) == 0 and len(example.tokens) - start >= SHORTEST


def first_answer_token(example: Example) -> int:
    return example.answers.index(0)


def write_for_prototype(examples: list[Example], weights: dict[str, torch.Tensor], out: Path) -> None:
    """Conversations and the target in the files its trainer reads."""
    numpy.savez(
        out / "data.npz",
        ids=numpy.concatenate([numpy.array(example.tokens, dtype=numpy.int32) for example in examples]),
        lens=numpy.array([len(example.tokens) for example in examples]),
        a0=numpy.array([first_answer_token(example) for example in examples]),
        kind=numpy.zeros(len(examples), dtype=numpy.int64),
        temp=numpy.array([0.0 if example.greedy else 1.0 for example in examples]),
    )
    save_file({name: tensor.contiguous() for name, tensor in weights.items() if name != "lm_head.weight"}, out / "target_bf16.safetensors")


def start_prototype(options: argparse.Namespace, theirs: list[str], core: int) -> subprocess.Popen[bytes]:
    """Its trainer on one core, with what it says in a log; its options as they are by default but for `theirs`."""
    told = ["--data", "data.npz", "--secs", str(60 * options.minutes), "--out", "draft.pt", *theirs]
    with open(options.out / "prototype.log", "wb") as log:
        return subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, str(options.prototype.resolve() / "train.py"), *told],
            cwd=options.out,
            env={**os.environ, "NT": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def their_draft(path: Path, shape: DraftConfig, embedding: torch.Tensor) -> tuple[DraftNetwork, DraftVocab]:
    """Its weights in our network: q, k and v lie in one matrix there, of the embedding's half and of the feature's."""
    saved = torch.load(path, weights_only=True)
    own, ids = saved["p"], saved["keep"]
    shape = replace(shape, draft_vocab_size=len(ids))
    widths = [shape.num_attention_heads * shape.head_dim, *[shape.num_key_value_heads * shape.head_dim] * 2]
    q, k, v = torch.cat([own["qe"], own["qh"]], 1).split(widths)
    gate, up = own["gu"].chunk(2)
    layer = {
        "input_layernorm": own["n_in"],
        "hidden_norm": own["n_h"],
        "post_attention_layernorm": own["n_p"],
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": own["o"],
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": own["d"],
    }
    weights = {f"midlayer.{name}.weight": tensor for name, tensor in layer.items()}
    weights |= {"fc.weight": own["fc"], "norm.weight": own["n_f"], "lm_head.weight": own["head"]}
    network = DraftNetwork(shape, embedding)
    network.load_state_dict(weights)
    return network, DraftVocab(ids, embedding.shape[0])


def last_step(log: Path) -> str:
    return [line for line in log.read_text().splitlines() if line.startswith("step")][-1]


if __name__ == "__main__":
    main()
