"""The same code on a CUDA device: run where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eyas.config import PLAIN, Request, Sampling, TrainSettings, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.philox import uniforms_on, wrapped
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.sampling import uniforms
from eyas.decode.score import top
from eyas.decode.sequence import new_sequence
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.engine import load
from eyas.files.target import load_target
from eyas.kernels import captured, fused
from eyas.kernels.captured import Graph
from eyas.kernels.linear import Dense
from eyas.methods import METHODS, trained
from eyas.model.cache import Slabs
from eyas.train import features
from eyas.train.build import Setup, build
from eyas.train.features import Example, kept_states
from eyas.train.fixed_writer import FixedWriter, SlotAttention
from eyas.train.trainer import Budget
from eyas.train.unroll import Supervision, unrolled_loss
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_draft, tiny_target
from tests.tiny_family import tiny_network
from tests.train.test_fixed_writer import KINDS, said_by_any_rows, told
from tests.train.test_selfplay import talkative
from tests.train.test_unroll import documents, packed, random_features
from tests.train.training import make_trainer, silent
from tests.train.writing import QUESTIONS, template


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
@pytest.mark.parametrize("shape", ["8x2x3", "static:3.2.0.1"])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].draft])
def test_every_method_with_a_draft_decodes_plain_text_on_cuda(method, shape):
    target = tiny_target(prepare=False).to("cuda")
    network, vocab = tiny_network(METHODS[method].draft, target)
    drafter = METHODS[method].decoding().drafter(network.to("cuda").prepare(), vocab)
    target.prepare()

    def tokens(drafter, shape):
        *_, texts = Decoder(target, drafter).run([[1, 2, 3], [4, 5], [6]], shape, Sampling(1.0), [1, 2, 3], 24)
        return [text.tokens for text in texts]

    assert tokens(drafter, TreeShape.parse(shape)) == tokens(None, PLAIN)


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
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=str)
@pytest.mark.parametrize("shape", ["chain:4", "20x4x5", "60x7x10"])
def test_trees_grown_by_one_graph_are_the_plain_growths_on_cuda(shape, sampling):
    target = tiny_target(prepare=False).to("cuda")
    network, vocab = tiny_draft(target)
    drafter = Eagle3Drafter(network.to("cuda").prepare(), vocab)
    target.prepare().pool = None  # else the whole round is one graph

    def grown():
        decoder, trees = Decoder(target, drafter), []
        decoder.watch = lambda record: trees.append(record.tree)
        list(decoder.run([[1, 2, 3]], TreeShape.parse(shape), sampling, [5], 40))
        return [(tree.tokens, tree.parents, tree.depths) for tree in trees]

    captured = [grown(), grown()]
    graphs = [graph for key, graph in drafter.cache.slabs.graphs.items() if key[0] == "growth"]
    network.pool = None
    assert captured == [grown()] * 2
    assert len(graphs) == 1 and graphs[0].graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(1.3, top_p=0.9), Sampling(1.2, top_k=5, min_p=0.05)], ids=str)
@pytest.mark.parametrize("shape", ["chain:4", "20x4x5", "64x7x6"])
def test_rounds_that_are_one_graph_commit_what_plain_rounds_do_on_cuda(shape, sampling):
    """Few tokens, so that guesses of a random draft often come true."""
    target = tiny_target(prepare=False, vocab_size=8).to("cuda")
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    drafter = Eagle3Drafter(network.to("cuda").prepare(), vocab)
    target.prepare()

    def committed():
        *_, texts = Decoder(target, drafter).run([[1, 2, 3]], TreeShape.parse(shape), sampling, [5], 60)
        return texts[0].tokens, texts[0].accepted_lengths

    captured = [committed(), committed()]
    graphs = [graph for key, graph in drafter.cache.slabs.graphs.items() if key[0] == "round"]
    network.pool = target.pool = None
    assert captured == [committed()] * 2
    assert len(graphs) == 1 and graphs[0].graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.6), Sampling(1.2, top_p=0.9)], ids=str)
@pytest.mark.parametrize("planned", [False, True], ids=["named", "planned"])
def test_rounds_with_copying_and_planned_ones_are_graphs_with_plain_text_on_cuda(planned, sampling):
    target = tiny_target(prepare=False, vocab_size=8).to("cuda")
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    drafter = CopyingDrafter(Eagle3Drafter(network.to("cuda").prepare(), vocab))
    target.prepare()
    plan = Planner(Prices({1: 1.0, 64: 2.0}), Prices({1: 0.1}), Calibration()) if planned else None

    def tokens(drafter, shape, plan=None):
        *_, texts = Decoder(target, drafter, plan=plan).run([[1, 2, 3, 4, 5, 1, 2, 3]], shape, sampling, [5], 100)
        return texts[0].tokens

    assert tokens(drafter, MAX_TREE if planned else TreeShape.parse("20x4x5"), plan) == tokens(None, PLAIN)
    held = [drafter.draft.cache.slabs, *target.pool.idle]
    graphs = {key[1]: graph for slabs in held for key, graph in slabs.graphs.items() if key[0] == "round"}
    assert all(graph and graph.graph for graph in graphs.values()) and {form.given > 0 for form in graphs} >= {True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_text_that_is_left_of_several_goes_on_in_graphs_on_cuda():
    target = tiny_target(prepare=False, vocab_size=8).to("cuda")
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    drafter, prompts = Eagle3Drafter(network.to("cuda").prepare(), vocab), [[1, 2], [3, 4], [5] * 30]
    target.prepare()

    def tokens(drafter, shape):
        decoder, found = Decoder(target, drafter), []
        decoder.reserve(3, 120, [shape])
        for length in (70, 8, 20):
            request = Request(sampling=Sampling(1.3), max_new_tokens=length)
            found.append(new_sequence(prompts[len(found)], request, shape, len(found), target.config))
            decoder.admit(found[-1])
        while decoder.busy:
            decoder.step()
        return [text.tokens for text in found]

    assert tokens(drafter, TreeShape.parse("20x4x5")) == tokens(None, PLAIN)
    graphs = [graph for view in drafter.cache.slabs.views.values() for key, graph in view.graphs.items() if key[0] == "round"]
    assert graphs and all(graph.graph for graph in graphs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(1.2, top_p=0.9)], ids=str)
@pytest.mark.parametrize("shape", ["20x4x5", "1x0x1"])
def test_rounds_of_several_texts_are_one_graph_with_what_plain_rounds_commit_on_cuda(shape, sampling):
    """Five texts of lengths of their own in six slots; with trees and as plain decoding."""
    target = tiny_target(prepare=False, vocab_size=8).to("cuda")
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    drafter = Eagle3Drafter(network.to("cuda").prepare(), vocab) if shape != "1x0x1" else None
    target.prepare()

    def committed():
        decoder, found = Decoder(target, drafter), []
        decoder.reserve(6, 120, [TreeShape.parse(shape)])
        for row, length in enumerate((50, 9, 30, 20, 40)):
            request = Request(sampling=sampling, max_new_tokens=length)
            found.append(new_sequence([row, 2, 3], request, TreeShape.parse(shape), row, target.config))
            decoder.admit(found[-1])
        while decoder.busy:
            decoder.step()
        cache = drafter.cache if drafter else decoder.cache
        return [(text.tokens, text.accepted_lengths) for text in found], dict(cache.slabs.graphs)

    captured, graphs = committed()
    target.pool = None
    if drafter:
        network.pool = None
    assert committed() == (captured, {})
    assert {key[1].seats.count for key in graphs} >= {2, 4, 6} and all(graph.graph for graph in graphs.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_cuda_cannot_capture_is_launched_one_by_one(capsys):
    """To ask the host for a number in a graph is an error, after which the stream serves on."""
    slabs = Slabs((1, 1, 1, 64, 8), torch.float32, torch.device("cuda"), pooled=True)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        assert captured.fixed_call(lambda x: (x + int(x.sum()),), ("form",), slabs, torch.ones(3)) is None
    assert torch.cuda.current_stream() == stream and (torch.ones(3, device="cuda") + 1).sum() == 6
    assert capsys.readouterr().err.count("CUDA cannot capture") <= 1
    (found,) = captured.fixed_call(lambda x: (x + 1,), ("another",), slabs, torch.ones(3))
    assert found.tolist() == [2, 2, 2]


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
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, top_p=0.9), Sampling(0.8, presence_penalty=0.5)], ids=str)
def test_a_seed_means_the_same_text_on_cuda_whose_noise_is_made_there(sampling):
    def tokens(device, draft, copy=False):
        target = tiny_target(prepare=False).to(device)
        network, vocab = tiny_draft(target)
        drafter = Eagle3Drafter(network.to(device).prepare(), vocab)
        decoder = Decoder(target.prepare(), CopyingDrafter(drafter) if copy else drafter if draft else None)
        *_, texts = decoder.run([[1, 2, 3], [4, 5]], TreeShape.parse("8x2x3" if draft else "1x0x1"), sampling, [1, 2], 40)
        return [text.tokens for text in texts]

    wanted = tokens("cpu", False)
    assert [tokens("cuda", False), tokens("cuda", True), tokens("cuda", True, True)] == [wanted] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ours", [True, False], ids=["kernel", "operations"])
def test_random_words_computed_on_cuda_are_numpys_to_the_last_bit(ours, monkeypatch):
    """Captured as a graph, and replayed with other keys."""
    monkeypatch.setattr(fused, "available", fused.available if ours else lambda: False)
    first, second = ([1, 2**63, 2**64 - 1], [0, 5, 2**40]), ([7, 8, 9], [1, 2, 3])
    held = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2)]
    graph = Graph(lambda *keys: (uniforms_on(*keys, 49152, 3, 2),), held)
    for keys in (first, second):
        for to, numbers in zip(held, keys):
            to.copy_(torch.tensor([wrapped(number) for number in numbers]))
        (found,) = graph()
        for row, seed, position in zip(found.cpu(), *keys):
            assert (row.numpy() == uniforms(seed, position, 49152, 3, 2)).all()


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("settings", [{}, {"draft_layers": 2, "sliding_window": 6}], ids=str)
def test_a_step_waits_for_nothing_on_cuda_and_is_the_step_of_a_cpu(settings):
    """Forward and backward; what was first used is made before."""
    target = tiny_target()
    network, vocab = tiny_draft(target, **settings)
    docs = documents(target.config.vocab_size)
    batch = packed(docs, random_features(docs))
    taught, place = batch.taught()
    even = torch.full((len(taught), len(vocab)), 1 / len(vocab)).double()
    within = torch.ones(len(batch.tokens)) > 0

    def gradients(device):
        network.to(device).embedding[0] = network.embedding[0].to(device)
        here = replace(batch, tokens=batch.tokens.to(device), features=batch.features.to(device))
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        supervision = Supervision(even.to(device), place.to(device), within.to(device), 4, 0.8)
        for mode in ("default", "error") if device == "cuda" else ("default",):
            if device == "cuda":
                torch.cuda.set_sync_debug_mode(mode)
            try:
                with torch.device(device):
                    found = torch.autograd.grad(unrolled_loss(network, here, supervision)[0], parameters)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return [gradient.cpu() for gradient in found]

    for ours, theirs in zip(gradients("cuda"), gradients("cpu")):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("room", [1, 0], ids=["kept", "read again"])
def test_text_without_states_trains_on_cuda(tmp_path, monkeypatch, room):
    """With an induction head, as a long run begins; the target reads in bfloat16 on the card."""
    directory = save_tiny_target(tmp_path / "target")
    draw = torch.Generator().manual_seed(0)
    examples = [Example(torch.randint(0, 250, (40,), generator=draw).tolist(), [-1] * 8 + [0] * 32, True) for _ in range(24)]
    settings = TrainSettings(draft_vocab_size=200, unroll_steps=3, tokens_per_batch=400, induction=True)
    monkeypatch.setitem(features.KEPT_SHARE, "cuda", 0.1 * room)
    source = kept_states(load_target(directory, "bf16", "cuda").prepare(), (1, 2, 4), examples)
    trainer = build(Setup(load_target(directory, "fp32", "cuda"), (1, 2, 4), examples, source, settings, tmp_path / "draft"))
    trainer.run(Budget(steps=5), silent)
    assert trainer.progress.steps == 5 and trainer.settings.products == "bf16" and (tmp_path / "draft" / "config.json").exists()
    assert (source.used > 0) == bool(room) and source.states(examples[:2]).features.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_each_slot_sees_its_own_keys_whatever_kernel_reads_them():
    draw = torch.Generator("cuda").manual_seed(0)
    keys, values = (torch.randn(1, 6, 200, 3, 64, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(6, 9, 64, generator=draw, device="cuda", dtype=torch.bfloat16)
    attention = SlotAttention(keys, values, torch.tensor([0, 1, 63, 64, 150, 199], device="cuda"))
    found, wanted = (by(q, keys[0], values[0]) for by in (attention.flash, attention.plain))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    values[:, 2, 64:] = 1e4  # beyond what slot 2 has read
    assert attention.flash(q, keys[0], values[0])[2].equal(found[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_text_written_in_captured_steps_is_the_text_of_a_cpu():
    writer = FixedWriter(talkative().to("cuda").prepare(), template(), KINDS, QUESTIONS, 16)
    found = {index: row and told(row) for index, row in writer.write(iter(range(30)))}
    assert all(lane.graph.graph for lane in writer.lanes)
    assert found == said_by_any_rows(KINDS, 30, lambda: talkative().prepare())
