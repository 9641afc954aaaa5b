"""The same code on a CUDA device: run where there is one."""

from __future__ import annotations

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.methods import METHODS, trained
from eyas.train.trainer import Budget
from tests.tiny import tiny_draft, tiny_target
from tests.tiny_family import tiny_network
from tests.train.training import make_trainer, silent


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].draft])
def test_every_method_with_a_draft_decodes_plain_text_on_cuda(method):
    target = tiny_target(prepare=False).to("cuda")
    network, vocab = tiny_network(METHODS[method].draft, target)
    drafter = METHODS[method].decoding().drafter(network.to("cuda").prepare(), vocab)
    target.prepare()

    def tokens(drafter, shape):
        *_, texts = Decoder(target, drafter).run([[1, 2, 3], [4, 5], [6]], shape, Sampling(1.0), [1, 2, 3], 24)
        return [text.tokens for text in texts]

    assert tokens(drafter, TreeShape.parse("8x2x3")) == tokens(None, PLAIN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", trained())
def test_every_method_trains_on_cuda(method, tmp_path):
    trainer = make_trainer(tmp_path / "draft", dtype=torch.float32, method=method)
    trainer.network.to("cuda")
    teacher, borrowed = trainer.teacher, getattr(trainer.network, "frozen", [None])[0]
    teacher.head_DH, teacher.member_V = teacher.head_DH.to("cuda"), teacher.member_V.to("cuda")
    if borrowed is not None:
        borrowed.to("cuda")
    trainer.network.embedding[0] = trainer.network.embedding[0].to("cuda")
    trainer.run(Budget(steps=3), silent)
    assert trainer.progress.steps == 3 and trainer.progress.curve
