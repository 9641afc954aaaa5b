"""A method of your own in one file: Hydra's idea (Ankner et al. 2024, arXiv 2402.05109) on eyas, the subject of docs/add-a-method.md.

Medusa's heads do not know what was drawn. Let head k read, beside the last hidden state, the embeddings of the token that was drawn and of
the k guesses that a node's path holds: guesses then depend on each other, for the price of a wider product.

    eyas train --plugin examples/hydra.py --method hydra --self-play 100000 --minutes 10 --out my-hydra
    eyas generate --plugin examples/hydra.py "Tell me about hawks." --method hydra --draft my-hydra
    eyas bench --plugin examples/hydra.py --prompts F.jsonl --methods plain,hydra@16x4x4 --draft my-hydra
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import TrainSettings
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import Level, grow
from eyas.decode.tree import Tree
from eyas.files import draft_files
from eyas.kernels.linear import Dense
from eyas.methods import Method, register
from eyas.model.protocols import TargetModel
from eyas.model.shared_weights import FrozenHead, SharedWeights
from eyas.model.vocab import DraftVocab
from eyas.train.unroll import Batch, Step, Supervision

register("hydra", Method(__name__, __name__, draft="hydra"))  # this file is both what decodes and what teaches

# ---- the network: what one guess is computed from ----


class HydraNetwork(SharedWeights, nn.Module):
    """Head k reads a row [h ; e_0 ; .. ; e_k]: the last hidden state, the drawn token's embedding, those of the k guesses behind it."""

    def __init__(self, heads: int, embedding: Tensor, head: nn.Linear) -> None:
        super().__init__()
        H = embedding.shape[1]
        linears = [nn.Linear((2 + k) * H, H) for k in range(heads)]
        self.heads, self.products = nn.ModuleList(linears), [Dense(each) for each in linears]
        self.share(embedding, head)  # the target's own: neither trained nor saved

    @property
    def levels(self) -> int:  # how deep it can guess
        return len(self.heads)

    def before_head(self, level: int, rows: Tensor) -> Tensor:
        return rows[:, : self.embedding[0].shape[1]] + F.silu(self.products[level](rows.to(self.dtype)))

    def logits_at(self, level: int, rows: Tensor) -> Tensor:
        return self.head(self.before_head(level, rows))

    def prepare(self, bits: int = 16) -> HydraNetwork:
        return self.packed(self.products, bits)


# ---- the drafter: how a tree grows from it ----


class HydraDrafter:
    def __init__(self, network: HydraNetwork, vocab: DraftVocab) -> None:
        self.network, self.vocab, self.wants = network, vocab, network.wants
        self.roots: dict[int, Tensor] = {}  # [2H] of each sequence: the last hidden state and the embedding of the token drawn from it

    def reserve(self, sequences: int, capacity: int) -> None:
        self.roots = {}

    def forget(self, sequence: int) -> None:
        self.roots.pop(sequence, None)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        assert features is not None  # it wants them
        drawn = self.network.embed(torch.tensor(tokens[-1:], device=features.device))[0]
        self.roots[sequence] = torch.cat([features[-1].to(drawn), drawn])

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        requests = [replace(request, shape=request.shape.cut(self.network.levels)) for request in requests]
        return grow(requests, self.begin, self.read, self.network.logits_at, self.vocab)

    def begin(self, sequences: Sequence[int]) -> Tensor:
        return torch.stack([self.roots[sequence] for sequence in sequences])

    def read(self, levels: list[Level]) -> Tensor:
        """A node's row is its parent's with its own token's embedding behind it."""
        tokens = torch.tensor([token for level in levels for token in level.tokens], device=self.network.device)
        return torch.cat([torch.cat([level.parents for level in levels]), self.network.embed(tokens)], -1)


drafter = HydraDrafter

# ---- teaching ----

SETTINGS = {"unroll_steps": 4, "step_keep": 1.0, "step_decay": 0.8}  # of its training: heads, all anchors, how much deeper heads weigh


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> HydraNetwork:
    network = HydraNetwork(settings.unroll_steps, target.embedding.detach(), FrozenHead.of(target, vocab))
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for product in network.products:
            (head,) = product.layers
            head.weight.normal_(0.0, 0.2 / head.weight.shape[1] ** 0.5, generator=generator)
            head.bias.zero_()
    return network


def unroll(network: HydraNetwork, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """Step i at anchor j: the row of f_j and t_{j+1} .. t_{j+1+i}, which is to say the distribution of t_{j+2+i}."""
    anchors, counted = batch.anchors()
    counted = counted if depths is None else torch.minimum(counted, depths)
    rows = batch.wanted(network.wants)[anchors]
    for step in range(min(steps, network.levels)):
        going = counted > step
        anchors, counted, rows = anchors[going], counted[going], rows[going]
        if len(anchors):
            rows = torch.cat([rows, network.embed(batch.tokens[anchors + 1 + step])], -1)
            yield Step(anchors, rows, anchors + 1 + step)


def loss(network: HydraNetwork, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    found = list(unroll(network, batch, supervision.steps, supervision.depths))
    states = torch.cat([network.before_head(number, step.a) for number, step in enumerate(found)])
    total, means = supervision.of(found, states, network.frozen[0])
    return total, supervision.padded(means)


# ---- files ----


def reads(config: dict[str, Any], directory: Path) -> bool:
    return "hydra_heads" in config


check = draft_files.check_sizes


def config_of(network: HydraNetwork, target_layers: int) -> dict[str, Any]:
    return {"hydra_heads": network.levels, "hidden_size": network.embedding[0].shape[1]}


save = draft_files.saver("hydra", config_of)


def load(directory: Path, target: TargetModel) -> tuple[HydraNetwork, DraftVocab]:
    fields, tensors, vocab = draft_files.read(directory, target.config)
    embedding = target.embedding.detach()
    with torch.device("meta"):
        network = HydraNetwork(fields.size("hydra_heads"), embedding, FrozenHead.of(target, vocab))
    return draft_files.filled(network, tensors, embedding, directory, fields), vocab
