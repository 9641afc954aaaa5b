"""A draft's step as one native call guesses what its parts guess one after the other, and a tree is to the last bit the tree it would be
alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from eyas.config import Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.sampling import Noise
from eyas.decode.score import log_scores, ranked
from eyas.decode.tree import Tree
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import native
from eyas.kernels.attention import NativeAttention
from eyas.kernels.layer import NativeLayers
from eyas.kernels.step import Ranking
from eyas.model import transformer
from eyas.model.draft import DraftNetwork
from eyas.model.rows import Segment
from eyas.model.vocab import DraftVocab
from tests.tiny import tiny_draft, tiny_target

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler: the parts are all there is")
V, H = 53, 32
GREEDY, SAMPLED, COOL, FILTERED = Sampling(), Sampling(1.0), Sampling(0.6), Sampling(0.8, top_k=5)
WEIGHTS = [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 8), (torch.bfloat16, 4)]
SHAPES = [TreeShape.parse(each) for each in ("chain:1", "chain:3", "20x4x5", "static:3.2.1.1")]


def drafter(dtype: torch.dtype = torch.float32, bits: int = 16, parts: bool = False, room: int = 400, **settings) -> Eagle3Drafter:
    """A drafter of a tiny draft whose weights bfloat16 can hold; with `parts` its steps are not one call."""
    target = tiny_target(prepare=False, dtype=torch.float32, intermediate_size=64).to(torch.bfloat16).to(dtype)
    network, vocab = tiny_draft(target, **settings)
    network.embedding = [target.model.embed_tokens.weight.detach()]
    network = network.to(torch.bfloat16).to(dtype).prepare(bits)
    assert network.one_call is not None
    if parts:
        network.one_call = None
    made = Eagle3Drafter(network, vocab)
    made.reserve(3, room)
    return made


def network_of(made: Eagle3Drafter) -> DraftNetwork:
    assert isinstance(made.network, DraftNetwork)
    return made.network


def texts(prompts: tuple[int, ...], dtype: torch.dtype) -> list[tuple[list[int], Tensor]]:
    """Random tokens, and features of all but the last."""
    draw = torch.Generator().manual_seed(len(prompts))
    return [
        (torch.randint(0, V, (count + 1,), generator=draw).tolist(), torch.randn(count, 3 * H, generator=draw).to(dtype))
        for count in prompts
    ]


def grown(made: Eagle3Drafter, prompts: tuple[int, ...], shape: TreeShape, sampling: Sampling, alone: int | None = None) -> list[Tree]:
    """The trees of two rounds for each text; with `alone` those of that text, grown by themselves."""
    requests, dtype = [], made.network.dtype
    for slot, (tokens, features) in enumerate(texts(prompts, dtype)):
        if alone in (None, slot):
            made.forget(slot)
            made.observe(slot, tokens, features)
            noise = None if sampling.greedy else Noise(slot, V).at
            requests.append(TreeRequest(slot, tokens[-1], len(tokens) - 1, shape, sampling, noise))
    with torch.inference_mode():
        return made.propose(requests)


def assert_near(ours: Tree, theirs: Tree, within: float) -> None:
    assert (ours.tokens, ours.parents, ours.depths) == (theirs.tokens, theirs.parents, theirs.depths)
    assert ours.scores == pytest.approx(theirs.scores, abs=within)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, COOL, FILTERED], ids=str)
@pytest.mark.parametrize(("dtype", "bits"), WEIGHTS, ids=str)
def test_trees_are_those_of_the_parts(dtype, bits, sampling):
    """The layer, the head and their order of sums are the same; the log of a softmax is rounded otherwise."""
    one_call, parts = drafter(dtype, bits), drafter(dtype, bits, parts=True)
    for shape in SHAPES:
        for ours, theirs in zip(*(grown(each, (1, 30, 7), shape, sampling) for each in (one_call, parts))):
            assert len(ours) > 1
            assert_near(ours, theirs, 2e-5)


def test_a_level_is_one_call_of_the_kernel(monkeypatch):
    """The rest are what fuses the features of the text that the draft catches up on, for three sequences at once."""
    made, calls, call, product = drafter(), [], NativeLayers.__call__, native.product

    def layers(self, x, *more, **named):
        calls.append(len(x))
        return call(self, x, *more, **named)

    def alone(x, weights):
        calls.append("product")
        return product(x, weights)

    monkeypatch.setattr(NativeLayers, "__call__", layers)
    monkeypatch.setattr(native, "product", alone)
    grown(made, (4, 5, 6), SHAPES[2], GREEDY)
    assert calls == ["product", 15, 15, 15, 15, 15], "the rows that wait, then four levels of five nodes of each tree"


@pytest.mark.parametrize("settings", [{"norm_output": True}, {"attention_bias": True, "qk_norm": True}, {"fc_norm": True}], ids=str)
def test_other_shapes_of_drafts_are_those_of_the_parts(settings):
    one_call, parts = (drafter(parts=parts, **settings) for parts in (False, True))
    for ours, theirs in zip(*(grown(each, (5, 1), SHAPES[2], GREEDY) for each in (one_call, parts))):
        assert_near(ours, theirs, 2e-5)


def test_positions_beyond_the_table_of_angles_are_turned_too(monkeypatch):
    monkeypatch.setattr(transformer, "TABLE", 8)
    for ours, theirs in zip(*(grown(drafter(parts=parts), (6, 20), SHAPES[2], COOL) for parts in (False, True))):
        assert_near(ours, theirs, 2e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "bits"), WEIGHTS, ids=str)
def test_a_tree_is_to_the_last_bit_the_tree_alone(dtype, bits, threads, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: threads)
    made, prompts = drafter(dtype, bits), (3, 70, 11)
    for sampling in (GREEDY, SAMPLED):
        together = grown(made, prompts, SHAPES[2], sampling)
        assert together == [grown(made, prompts, SHAPES[2], sampling, alone=slot)[0] for slot in range(3)]


def step(made: Eagle3Drafter, rankings: list[Ranking], best: int):
    """One call over as many first rows of text, all asked, and the logits of what it put out."""
    count, network = len(rankings), network_of(made)
    assert network.one_call is not None
    made.forget(0)
    g = torch.randn(count, H, generator=torch.Generator().manual_seed(0))
    attention, rows = NativeAttention(made.cache, [Segment(0, count)]), range(count)
    with torch.inference_mode():
        a, found = network.one_call([1] * count, rows, (g, rows), attention, rows, rankings, best)
        return network.logits(a), found


def test_of_equals_the_lower_id_comes_first_and_ids_that_fill_a_block_up_are_never_named():
    """29 tokens in blocks of 16: three outputs are no tokens, and their logit, 0, may be the largest."""
    made = drafter()
    logits, found = step(made, [Ranking()] * 6, 29)
    assert sorted(found.ids[0]) == list(range(29))
    assert torch.equal(found.numbers, logits)
    torch.testing.assert_close(torch.tensor(found.scores), logits.log_softmax(-1).sort(-1, descending=True).values)
    head = network_of(made).head.weight
    assert isinstance(head, native.Packed)
    head.blocks.zero_()
    _, found = step(made, [Ranking(), Ranking(0.5)], 7)
    assert found.ids == [list(range(7))] * 2
    torch.testing.assert_close(torch.tensor(found.scores), torch.full((2, 7), 1 / 29).log())


def test_each_row_is_ranked_by_its_own_temperature_and_noise():
    made, noise = drafter(), torch.randn(2, 29, generator=torch.Generator().manual_seed(3))
    logits, found = step(made, [Ranking(0.7, noise[0]), Ranking(), Ranking(2.0, noise[1]), Ranking(1.3)], 5)
    for row, (sampling, own) in enumerate([(Sampling(0.7), noise[0]), (GREEDY, None), (Sampling(2.0), noise[1]), (Sampling(1.3), None)]):
        scores, plain = log_scores(logits[row : row + 1], sampling, own)[0], ranked(logits[row : row + 1], sampling, own, 5)
        assert found.ids[row] == scores.topk(5).indices.tolist() == plain.ids[0]
        mine = found.of(slice(row, row + 1))
        torch.testing.assert_close(mine.numbers, plain.numbers, rtol=1e-5, atol=1e-5)
        assert mine.whole == pytest.approx(plain.whole, abs=1e-5) and mine.scores[0] == pytest.approx(plain.scores[0], abs=1e-5)
        torch.testing.assert_close(found.numbers[row] - found.whole[row], scores, rtol=1e-5, atol=1e-5)


def test_processed_and_filtered_logits_are_as_the_head_gave_them():
    """A request that the kernel cannot rank shares a pass with one that it can."""
    made = drafter()
    seen: list[Tensor] = []

    def process(paths, logits_RD, columns_V):
        seen.append(logits_RD.clone())
        return logits_RD.flip(-1)

    trees = []
    for each in (made, drafter(parts=True)):
        requests = []
        for slot, (tokens, features) in enumerate(texts((5, 8), torch.float32)):
            each.forget(slot)
            each.observe(slot, tokens, features)
            processed = process if slot else None
            requests.append(TreeRequest(slot, tokens[-1], len(tokens) - 1, SHAPES[2], SAMPLED, Noise(1, V).at, processed=processed))
        with torch.inference_mode():
            trees.append(each.propose(requests))
    assert len(seen) > 2
    for ours, theirs in zip(seen, seen[len(seen) // 2 :]):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(*trees):
        assert_near(ours, theirs, 2e-5)


def test_what_the_kernel_cannot_run_in_one_call_is_left_to_the_parts():
    def network(dtype: torch.dtype = torch.float32, **settings) -> DraftNetwork:
        target = tiny_target(prepare=False, dtype=torch.float32, intermediate_size=64).to(torch.bfloat16).to(dtype)
        made = tiny_draft(target, **settings)[0]
        made.embedding = [target.model.embed_tokens.weight.detach()]
        return made.to(torch.bfloat16).to(dtype).prepare()

    assert network().one_call is not None
    assert network(draft_layers=2).one_call is None
    assert network(norm_before_residual=True).one_call is None
    assert network(torch.float64).one_call is None
    other = copy.deepcopy(tiny_draft(tiny_target(prepare=False))[0]).to(torch.bfloat16)
    assert other.embedding[0].dtype == torch.float64 and other.prepare().one_call is None


def test_a_table_of_its_own_is_read():
    made = drafter(own_embedding=True)
    network = network_of(made)
    assert network.one_call is not None and network.one_call.table.data_ptr() == network.embed_tokens.weight.data_ptr()
    for ours, theirs in zip(*(grown(each, (4, 9), SHAPES[1], GREEDY) for each in (made, drafter(parts=True, own_embedding=True)))):
        assert_near(ours, theirs, 2e-5)


def test_trees_with_a_vocabulary_of_all_tokens():
    made = drafter(draft_vocab_size=V)
    assert isinstance(made.vocab, DraftVocab) and len(made.vocab) == V
    for ours, theirs in zip(*(grown(each, (4, 9), SHAPES[2], SAMPLED) for each in (made, drafter(parts=True, draft_vocab_size=V)))):
        assert_near(ours, theirs, 2e-5)
