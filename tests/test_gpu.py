"""The same code on a CUDA device: run where there is one."""

from __future__ import annotations

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from tests.tiny import tiny_draft, tiny_target


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)], ids=str)
def test_tree_output_is_plain_output_on_cuda(sampling):
    target = tiny_target(prepare=False).to("cuda")
    network, vocab = tiny_draft(target)
    drafter = Eagle3Drafter(network.to("cuda").prepare(), vocab)
    target.prepare()
    prompts, seeds = [[1, 2, 3], [4, 5], [6]], [1, 2, 3]

    def tokens(drafter, shape):
        *_, texts = Decoder(target, drafter).run(prompts, shape, sampling, seeds, 24)
        return [text.tokens for text in texts]

    assert tokens(drafter, TreeShape.parse("8x2x3")) == tokens(None, PLAIN)
