"""How multi-token prediction's modules learn (DeepSeek-V3, arXiv 2412.19437, 2.2): here after the target was trained, which stays frozen.

Module k reads what module k - 1 made of every position of a document, so nothing is unrolled: it sees in training what it will see in use.
Its loss is the cross-entropy against the target's distribution of the token k + 1 positions after; the modules' losses are added. Knows
modules and batches; knows nothing of optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from eyas.config import TrainSettings
from eyas.drafters.mtp import MtpNetwork
from eyas.files.draft_files import one_layer
from eyas.model.protocols import TargetModel
from eyas.model.shared_weights import FrozenHead
from eyas.model.target import Target
from eyas.model.transformer import RMSNorm
from eyas.model.vocab import DraftVocab
from eyas.train.comb import comb_over, moved
from eyas.train.initialise import begin_as_feature
from eyas.train.unroll import Batch, Step, Supervision

SETTINGS = {"unroll_steps": 4, "step_keep": 1.0, "step_decay": 1.0}  # the number of modules, which all weigh the same, as published


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> MtpNetwork:
    """Modules that begin by passing on the state they are given."""
    shape, head = one_layer(target.config), FrozenHead.of(target, vocab, torch.float32)
    network = MtpNetwork(shape, settings.unroll_steps, target.embedding.detach(), head)
    for number, module in enumerate(network.stack):
        begin_as_feature(module, module.eh_proj, settings.seed + number)
        if isinstance(target, Target):
            gain = target.model.norm.weight.detach()  # the given state has passed the final norm already
            torch.nn.init.constant_(cast("RMSNorm", module.shared_head["norm"]).weight, float(gain.square().mean().sqrt()))
    return network


def unroll(network: MtpNetwork, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """For each module, its states at the anchors whose answer is long enough. It reads all positions of a document, as in use."""
    (anchors, whole), place = batch.anchors(), torch.cat([torch.arange(length) for length in batch.lengths])
    counted = whole if depths is None else torch.minimum(whole, depths)
    following = torch.cat([batch.tokens, batch.tokens.new_zeros(steps)])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return comb_over(k, v, batch.lengths)(q, (), torch.arange(len(q), device="cpu"))

    h_MH = batch.wanted(network.wants)
    for step in range(min(steps, network.levels)):
        x_MH = network.join(step, following[1 + step : len(h_MH) + 1 + step], h_MH)
        h_MH = network.layers[step](x_MH, network.rotary(place, network.dtype), attend)
        anchors, counted = anchors[counted > step], counted[counted > step]
        if len(anchors):
            there = moved(anchors, h_MH.device)
            yield Step(there, h_MH[there], there + 1 + step)


def loss(network: MtpNetwork, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    found = list(unroll(network, batch, supervision.steps, supervision.depths))
    normed = torch.cat([network.normed(number, step.a) for number, step in enumerate(found)])
    total, means = supervision.of(found, normed, network.frozen[0])
    return total, supervision.padded(means)
