"""The same code on a CUDA device: run where there is one."""

from __future__ import annotations

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.score import top
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import load
from eyas.kernels.linear import Dense
from eyas.methods import METHODS, trained
from eyas.train.trainer import Budget
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_draft, tiny_target
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
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=str)
def test_one_sequence_is_read_by_captured_passes_call_after_call(sampling):
    target = tiny_target(prepare=False).to("cuda")
    network, vocab = tiny_draft(target)
    drafter = Eagle3Drafter(network.to("cuda").prepare(), vocab)
    target.prepare()

    def tokens(drafter, shape):
        *_, texts = Decoder(target, drafter).run([[1, 2, 3]], shape, sampling, [1], 60)
        return texts[0].tokens

    wanted, shapes = tokens(None, PLAIN), map(TreeShape.parse, ("8x2x3", "60x7x10", "8x2x3", "chain:4"))
    assert [tokens(drafter, shape) for shape in shapes] == [wanted] * 4
    (slabs,) = target.pool.idle
    assert slabs.graphs and all(graph.graph for graph in slabs.graphs.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_planned_trees_give_plain_text_on_cuda(tmp_path):
    target = save_tiny_target(tmp_path / "target")
    engine = load(target, draft=save_tiny_draft(tmp_path / "draft", target), precision="fp32", device="cuda")
    texts = [engine.generate("a hawk", method=method, max_new_tokens=50).text for method in ("plain", "eagle3", "eagle3+copy")]
    assert texts == texts[:1] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_logits_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16, device="cuda")
    dense, x = Dense(layer), torch.randn(5, 64, dtype=torch.bfloat16, device="cuda")
    wanted = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    dense.pack(torch.float32)
    assert dense(x).dtype == torch.float32 and torch.allclose(dense(x).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [1, 2, 11])
def test_the_best_of_long_rows_are_found_by_parts(count):
    scores = torch.randn(3, 4000, device="cuda")
    for found, wanted in zip(top(scores, count), scores.topk(count, -1)):
        assert found.equal(wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", trained())
def test_every_method_trains_on_cuda(method, tmp_path):
    trainer = make_trainer(tmp_path / "draft", dtype=torch.float32, method=method)
    trainer.network.to("cuda")
    teacher, borrowed = trainer.teacher, getattr(trainer.network, "frozen", [None])[0]
    teacher.head_DH, teacher.member_V = teacher.head_DH.to("cuda"), teacher.member_V.to("cuda")
    if borrowed is not None:
        borrowed.to("cuda", torch.float32)
    trainer.network.embedding[0] = trainer.network.embedding[0].to("cuda")
    trainer.run(Budget(steps=3), silent)
    assert trainer.progress.steps == 3 and trainer.progress.curve
