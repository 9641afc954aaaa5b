"""How an EAGLE-1 draft learns (arXiv 2401.15077, 3.2): from true features it guesses the next one.

It learns one step. The loss is smooth L1 between the guessed feature and the true one, plus a tenth of the cross-entropy between what the
target's head says of both. Noise on the given features prepares it for the errors of its own guesses, which it never sees here. EAGLE-3
drops the first term, since a draft that need not hit features has more to learn from data, and replaces the noise by the errors themselves.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.config import TrainSettings
from eyas.drafters.eagle1 import Eagle1Network
from eyas.files.draft_files import one_layer
from eyas.model.protocols import TargetModel
from eyas.model.shared_weights import FrozenHead
from eyas.model.vocab import DraftVocab
from eyas.train.initialise import begin_as_feature
from eyas.train.unroll import Batch, Supervision, unroll

SETTINGS = {"unroll_steps": 1, "step_keep": 1.0}  # its own defaults among TrainSettings
OF_HEAD = 0.1  # weight of the cross-entropy beside the features' loss
NOISE = 0.1  # half the width of the uniform noise, as a share of the features' mean size; published: a width of a fifth for size one


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> Eagle1Network:
    """A draft that begins by passing on the feature it is given, which predicts the token already drawn."""
    shape, head = one_layer(target.config), FrozenHead.of(target, vocab, torch.float32)
    network = Eagle1Network(shape, target.embedding.detach(), head, True, settings.token_left_out)
    (block,) = network.blocks
    begin_as_feature(block, network.fc, settings.seed)
    torch.nn.init.zeros_(network.fc.bias)
    return network


def loss(network: Eagle1Network, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    """The sum of both terms' means over anchors; and the second's mean, to show."""
    generator = torch.Generator().manual_seed(supervision.seed)
    true_MH = batch.wanted(network.wants)
    noise_MH = (torch.rand(true_MH.shape, generator=generator, device="cpu") - 0.5).to(true_MH) * 2 * NOISE * true_MH.abs().mean()
    found = list(unroll(network, replace(batch, hidden=true_MH + noise_MH), supervision.steps, supervision.depths))
    guessed = torch.cat([step.a for step in found])
    total, means = supervision.of(found, guessed, network.frozen[0])
    counts = supervision.counts or [len(step.anchors) for step in found]
    total = OF_HEAD * total
    for i, step in enumerate(found):
        distance = F.smooth_l1_loss(step.a, true_MH[step.teacher_rows], reduction="none").mean(-1).sum() / max(counts[i], 1)
        total = total + supervision.decay**i * distance
    return total, supervision.padded(means)
