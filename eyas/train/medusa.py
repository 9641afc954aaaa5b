"""How Medusa's heads learn (arXiv 2401.10774, 2.2.1): each learns the distribution of one token further ahead, from the same hidden state.

Head k at row j learns what the target says at row j + 1 + k: about the token two positions after j, three positions, and so on. Deeper
heads weigh less (`step_decay`), since they know less. Knows heads and batches; knows nothing of optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eyas.config import TrainSettings
from eyas.drafters.medusa import MedusaNetwork, ResBlock
from eyas.model.protocols import TargetModel
from eyas.model.vocab import DraftVocab
from eyas.train.comb import moved
from eyas.train.unroll import Batch, Step, Supervision

SETTINGS = {"unroll_steps": 5, "step_keep": 1.0, "step_decay": 0.8}  # the number of heads, and how much deeper ones weigh, as published


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> MedusaNetwork:
    """Heads that begin as the target's own: their residual blocks add nothing yet."""
    network = MedusaNetwork(target.config.hidden_size, len(vocab), settings.unroll_steps, 1, target.embedding.detach())
    with torch.no_grad():
        for head in network.heads:
            first = head[0]
            assert isinstance(first, ResBlock)
            first.linear.weight.zero_()
            first.linear.bias.zero_()
            head.last.weight.copy_(target.head_weight[vocab.ids] * target.logit_scale)
    return network


def unroll(network: MedusaNetwork, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """For each head, the hidden states it reads at the anchors whose answer is long enough."""
    hidden_MH, (anchors, counted) = batch.wanted(network.wants), batch.anchors()
    counted = counted if depths is None else torch.minimum(counted, depths)
    for step in range(min(steps, network.levels)):
        anchors, counted = anchors[counted > step], counted[counted > step]
        if len(anchors):
            there = moved(anchors, hidden_MH.device)
            yield Step(there, hidden_MH[there], there + 1 + step)


def loss(network: MedusaNetwork, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    total, means = torch.zeros(()), []
    for number, step in enumerate(unroll(network, batch, supervision.steps, supervision.depths)):
        part, mean = supervision.of([step], network.before_head(number, step.a), network.heads[number].last, first=number)
        total, means = total + part, means + mean
    return total, supervision.padded(means)
