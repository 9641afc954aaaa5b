"""SGLang's own EAGLE-3 draft class, with everything that it reads and gives written down, and the trees that are verified.

Into the directory $EAGLE3_RECORD go `passes.npy` (for each pass of the draft, one after another: ids [R], positions [R],
features [R, 3H] or its own earlier outputs [R, H], logits [rows asked for, D]) and `rounds.jsonl` (a line for each verification: the tree
and the number of accepted tokens). Changes nothing of what SGLang computes. Knows nothing of prompts or of other engines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3 as Original


class LlamaForCausalLMEagle3(Original):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place = Path(os.environ["EAGLE3_RECORD"])
        self.passes = open(place / "passes.npy", "wb")  # noqa: SIM115
        record_rounds(open(place / "rounds.jsonl", "w"))  # noqa: SIM115

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.note(input_ids, positions, forward_batch.spec_info.hidden_states)  # before the pass, which may write into them
        output = super().forward(input_ids, positions, forward_batch, *args, **kwargs)
        self.note(output.next_token_logits)
        self.passes.flush()
        return output

    def note(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            plain = tensor.float() if tensor.is_floating_point() else tensor
            numpy.save(self.passes, plain.numpy(), allow_pickle=False)


def record_rounds(out: TextIO) -> None:
    """Have every greedy verification of this process written down, after it was made."""
    from sglang.srt.speculative import eagle_utils  # imports the registry of models, which is what loads this module

    verify = eagle_utils.verify_tree_greedy_func

    def recorded(**given: Any) -> Any:
        result = verify(**given)
        told = zip(given["candidates"], given["retrieve_next_token"], given["retrieve_next_sibling"], given["accept_token_num"])
        for one in told:
            keys = ("tokens", "first_child", "next_sibling", "accepted")
            out.write(json.dumps(dict(zip(keys, (tensor.tolist() for tensor in one)))) + "\n")
        out.flush()
        return result

    eagle_utils.verify_tree_greedy_func = recorded


EntryClass = [LlamaForCausalLMEagle3]
