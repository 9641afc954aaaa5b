"""How an EAGLE-3 draft begins and what it learns: initialise.py's weights and unroll.py's loss.

Knows which modules make the method, and nothing of how they work.
"""

from __future__ import annotations

import torch

from eyas.config import TrainSettings
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.protocols import TargetModel
from eyas.model.vocab import DraftVocab
from eyas.train import unroll as steps
from eyas.train.initialise import initialise

SETTINGS = {"unroll_steps": 7}  # its own defaults among TrainSettings

unroll, loss = steps.unroll, steps.unrolled_loss


def new_network(target: TargetModel, taps: tuple[int, ...], vocab: DraftVocab, settings: TrainSettings) -> DraftNetwork:
    """A draft of the target's own shape that begins with weights of the target's."""
    asked = {name: getattr(settings, name) for name in ("fc_norm", "norm_output", "draft_layers")}
    shape = draft_config(target.config, len(vocab), taps, **asked)
    network = DraftNetwork(shape, target.embedding.detach())
    initialise(network, target, vocab, settings.seed, settings.top_layer_only)
    if settings.random_head:
        torch.nn.init.normal_(network.lm_head.weight, 0.0, 0.02, torch.Generator().manual_seed(settings.seed))
    return network
