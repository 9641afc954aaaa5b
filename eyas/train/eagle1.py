"""How an EAGLE-1 draft learns (arXiv 2401.15077, 3.2): guess the next feature, from true ones, and what the target's head makes of it.

One step, fed with true features: smooth L1 between the guessed feature and the true one, and a tenth of the cross-entropy between what the
target's head says of both. Noise on the features it is given makes it bear the errors of its own guesses, which it never sees here. EAGLE-3
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

SETTINGS = {"unroll_steps": 1, "step_keep": 1.0}  # of its training, where nobody says otherwise
OF_HEAD = 0.1  # weight of the cross-entropy beside the features' loss
NOISE = 0.1  # of the features' mean size: the published uniform noise has the spread of a fifth of features of size one


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> Eagle1Network:
    """It begins as the feature it is given, which says the token already drawn."""
    shape, head = one_layer(target.config), FrozenHead.of(target, vocab)
    network = Eagle1Network(shape, target.embedding.detach(), head, True, settings.token_left_out)
    (block,) = network.blocks
    begin_as_feature(block, network.fc, settings.seed)
    torch.nn.init.zeros_(network.fc.bias)
    return network


def loss(network: Eagle1Network, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    """Mean over anchors of both terms; the second's mean is what is shown."""
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
