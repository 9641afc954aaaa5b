"""Medusa-1 as a drafter (Cai et al. 2024, arXiv 2401.10774): a few heads beside the target's own, each guessing one token further ahead.

All heads read the same last hidden state, so drafting is one product for each head and costs next to nothing. But no head knows what the
others guessed, nor which token the target really drew: the guesses of a level are the same whatever comes before them. The tree that
combines them has a shape fixed beforehand, by how often each head's best, second best, ... guess is right. EAGLE added that drawn tokens
are fed back. The published rule of acceptance ("typical") changes the text's distribution; here the walk verifies Medusa's trees like any
others, and `--verifier typical-lossy` is there to compare.

The network's tensors have the published names. Knows heads and hidden states; keeps no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import EyasError, TreeShape
from eyas.decode.captured_heads import CapturedHeads
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import Level, grow
from eyas.decode.plan.static_tree import tree_for
from eyas.decode.tree import Tree
from eyas.decode.unread import Unread
from eyas.files import draft_files
from eyas.kernels.linear import Dense
from eyas.model.protocols import TargetModel
from eyas.model.shared_weights import SharedWeights
from eyas.model.transformer import pack
from eyas.model.vocab import DraftVocab

PUBLISHED = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # files that hold a published draft's weights
USUAL_TREE = "static:4.2.1.1.0.2.1.0.0.1"  # the tree where the heads' accuracies are not known


class ResBlock(nn.Module):
    """x + silu(W x + b)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.product = Dense(self.linear)

    def forward(self, x_NH: Tensor) -> Tensor:
        return x_NH + F.silu(self.product(x_NH))


class MedusaHead(nn.Sequential):
    """Residual blocks, then a product."""

    @property
    def last(self) -> nn.Linear:
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last


class MedusaNetwork(SharedWeights, nn.ModuleList):
    """The heads. Head k, counted from 0, is residual blocks and a product: the logits of the token k + 2 positions after the last one read.
    The target's own head says the token one position after."""

    def __init__(self, width: int, draft_vocab_size: int, heads: int, blocks: int, embedding: Tensor) -> None:
        parts = [[ResBlock(width) for _ in range(blocks)] + [nn.Linear(width, draft_vocab_size, bias=False)] for _ in range(heads)]
        super().__init__(MedusaHead(*each) for each in parts)
        self.share(embedding)  # heads do not read it; it tells their width
        self.outputs = [Dense(head.last) for head in self.heads]

    @property
    def heads(self) -> list[MedusaHead]:
        return [head for head in self if isinstance(head, MedusaHead)]

    @property
    def levels(self) -> int:
        return len(self)

    def before_head(self, level: int, x_NH: Tensor) -> Tensor:
        """The states [N, H] of head `level` before its last product, from last hidden states."""
        head = self[level]
        assert isinstance(head, MedusaHead)
        return head[:-1](x_NH.to(self.dtype))

    def logits_at(self, level: int, x_NH: Tensor) -> Tensor:
        """The logits [N, D] of the children of nodes at depth `level`, from the last hidden states before the roots."""
        return self.outputs[level](self.before_head(level, x_NH))

    def static_tree(self, nodes: int | None = None) -> TreeShape:
        return tree_for(self.accuracies, USUAL_TREE, nodes).cut(self.levels)

    def prepare(self, bits: int = 16) -> MedusaNetwork:
        """Pack weights for inference."""
        for head, output in zip(self.heads, self.outputs, strict=True):
            pack(head, bits)
            self.pack_wide(output, bits)
            head.last.register_parameter("weight", None)
        return self.packed([], bits)


class MedusaDrafter:
    cache = None  # it keeps no rows

    def __init__(self, network: MedusaNetwork, vocab: DraftVocab) -> None:
        self.network, self.vocab, self.wants = network, vocab, network.wants
        self.captured = CapturedHeads(network, vocab)
        self.last: dict[int, Unread] = {}  # by slot, the last token, and the hidden state [1, H] before it

    def reserve(self, sequences: int, capacity: int) -> None:
        self.last = {}

    def forget(self, sequence: int) -> None:
        self.last.pop(sequence, None)

    def share(self, source: int, sequence: int, tokens: Sequence[int]) -> int:
        self.forget(sequence)
        return len(tokens) - 1

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        assert features is not None
        self.last[sequence] = Unread(list(tokens[-1:]), features[-1:])

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        requests = [replace(request, shape=request.shape.cut(self.network.levels)) for request in requests]
        return grow(requests, self.roots, self.read_level, self.network.logits_at, self.vocab)

    def roots(self, sequences: Sequence[int]) -> Tensor:
        return torch.cat([self.last[sequence].features for sequence in sequences])

    def unread(self, sequence: int, most: int) -> Unread:
        return self.last[sequence]

    def was_read(self, sequence: int, count: int) -> None:
        """The last one serves again."""

    def read_level(self, levels: list[Level]) -> Tensor:
        """Hand on the parents' states: nothing is read, since all heads see the same hidden state."""
        return torch.cat([level.parents for level in levels])


drafter = MedusaDrafter


# ---- files ----


def reads(config: dict[str, Any], directory: Path) -> bool:
    return "medusa_num_heads" in config


check = draft_files.check_sizes


def config_of(network: MedusaNetwork, target_layers: int) -> dict[str, Any]:
    width = network.embedding[0].shape[1]
    return {"medusa_num_heads": len(network), "medusa_num_layers": len(network.heads[0]) - 1, "hidden_size": width}


save = draft_files.saver("medusa", config_of)


def load(directory: Path, target: TargetModel) -> tuple[MedusaNetwork, DraftVocab]:
    fields, tensors, vocab = draft_files.read(directory, target.config, *PUBLISHED)
    heads = len({name.split(".")[0] for name in tensors})  # published configs say fewer than there are
    blocks = fields.size("medusa_num_layers", 1)
    if not 1 <= heads <= 16 or not 1 <= blocks <= 16:
        raise EyasError(f"{fields.where}: {heads} heads of {blocks} blocks are not what a Medusa draft has (1 to 16 of each)")
    embedding = target.embedding.detach()
    with torch.device("meta"):
        network = MedusaNetwork(target.config.hidden_size, len(vocab), heads, blocks, embedding)
    return draft_files.filled(network, tensors, embedding, directory, fields), vocab
