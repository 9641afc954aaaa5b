"""The teacher says what the target's own head says, cut to the draft vocabulary and renormalised there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eyas.model.vocab import DraftVocab
from eyas.train.teacher import Teacher

V, H, IDS = 17, 6, [1, 4, 5, 9, 16]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_targets_distribution_among_the_drafts_tokens(biased, scale, softcap):
    draw = torch.Generator().manual_seed(3)
    weight, bias, hidden = (2 * torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((V, H), (V,), (8, H)))
    target = SimpleNamespace(head_weight=weight, head_bias=bias if biased else None, logit_scale=scale, logit_softcap=softcap)
    logits = scale * (hidden @ weight.T + (bias if biased else 0))
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    whole = logits.softmax(-1)[:, IDS]
    teacher = Teacher.of(target, DraftVocab(IDS, V), torch.float64)
    torch.testing.assert_close(teacher.distribution(hidden), whole / whole.sum(-1, keepdim=True))
    assert teacher.within(torch.arange(V)).nonzero()[:, 0].tolist() == IDS
