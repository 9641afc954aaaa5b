"""Trees grown in fixed shapes are those that the plain growth grows. What CUDA captures, a CPU runs as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.captured_growth import ALONE, CapturedGrowth, Draft, Levels
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import Drawn, grows_fixed
from eyas.decode.fixed_filters import Filters
from eyas.decode.generate import Decoder
from eyas.decode.sampling import Noise
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.model.cache import Pool, Slabs
from tests.tiny import tiny_draft, tiny_target

V = 53
SHAPES = ["chain:1", "chain:4", "static:3.2.0.1.1", "2x3x3", "8x2x3", "20x4x5", "60x7x10", "500x2x4", "6x7x2"]
SAMPLINGS = [Sampling(), Sampling(0.7), Sampling(1.6), Sampling(1.2, top_k=4), Sampling(1.2, top_k=20, top_p=0.7, min_p=0.02)]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """So that a short text crosses several."""
    monkeypatch.setattr(captured, "WINDOW", 16)


def drafters(dtype=torch.float64, room=400, **settings):
    """The same draft twice: without and with slabs from a pool, over which alone growth takes fixed shapes."""
    target = tiny_target(prepare=False)
    found = []
    for pool in (None, Pool()):
        network, vocab = tiny_draft(target, **settings)
        network.embedding = [network.embedding[0].to(dtype)]
        network = network.to(dtype).prepare()
        network.pool = pool
        found.append(Eagle3Drafter(network, vocab))
        found[-1].reserve(1, room)
    return found


def text_of(seed, length, width=96, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    tokens, features = torch.randint(0, V, (length,), generator=draw), torch.randn(length, width, generator=draw, dtype=torch.float64)
    return tokens.tolist(), features.to(dtype)


def request(tokens, shape, sampling, seed=5, shared=True):
    noise = Noise(seed, V).at if shared and not sampling.greedy else None
    return TreeRequest(0, tokens[-1], len(tokens) - 1, TreeShape.parse(shape), sampling, noise, seed=seed if noise else None)


def rounds(drafter, tokens, features, asked, prompt=4):
    """The trees that a drafter grows along a text, of which each round commits three tokens."""
    trees = []
    for end in range(prompt, len(tokens), 3):
        start = 0 if end == prompt else end - 2
        drafter.observe(0, tokens[start : end + 1], features[max(start - 1, 0) : end])
        trees += drafter.propose([asked(tokens[: end + 1])])
    return trees


def assert_same(ours, theirs, off=1e-9):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.tokens, one.parents, one.depths) == (other.tokens, other.parents, other.depths)
        assert one.scores == pytest.approx(other.scores, abs=off)


@pytest.fixture
def grown(monkeypatch):
    """How many trees were grown in fixed shapes."""
    count, found = [], CapturedGrowth.grow
    monkeypatch.setattr(CapturedGrowth, "grow", lambda *given: count.append(1) or found(*given))
    return count


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_are_the_plain_growths_round_after_round(shape, sampling, grown):
    text = text_of(1, 40)
    plain, fixed = (rounds(drafter, *text, lambda tokens: request(tokens, shape, sampling)) for drafter in drafters())
    assert_same(fixed, plain)
    assert len(grown) == len(fixed) == 12


@pytest.mark.parametrize("settings", [{"norm_output": True}, {"fc_norm": True}, {"draft_layers": 3}, {"draft_vocab_size": 5}], ids=str)
def test_trees_of_any_draft_are_the_plain_growths(settings, grown):
    text = text_of(2, 24)
    plain, fixed = (rounds(drafter, *text, lambda tokens: request(tokens, "20x4x5", Sampling(0.7))) for drafter in drafters(**settings))
    assert_same(fixed, plain)
    assert len(grown) == len(fixed)


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_trees_in_float32_are_the_plain_growths(sampling):
    text = text_of(3, 40, dtype=torch.float32)
    plain, fixed = (rounds(each, *text, lambda tokens: request(tokens, "20x4x5", sampling)) for each in drafters(torch.float32))
    assert_same(fixed, plain, 1e-4)


@pytest.mark.parametrize("seed", [0, 2**53 - 1, 2**63 + 5, 2**64 - 1])
def test_noise_is_that_of_any_seed(seed):
    text = text_of(4, 12)
    plain, fixed = (rounds(each, *text, lambda tokens: request(tokens, "8x2x3", Sampling(1.0), seed)) for each in drafters())
    assert_same(fixed, plain)


def test_a_verifier_that_shares_no_noise_gets_the_likeliest_guesses(grown):
    text = text_of(5, 12)
    plain, fixed = (rounds(each, *text, lambda tokens: request(tokens, "8x2x3", Sampling(0.7), shared=False)) for each in drafters())
    assert_same(fixed, plain)
    assert grown


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_one_graph_serves_the_lower_trees_at_a_texts_end(sampling, grown):
    text, cuts = text_of(6, 22), [4, 4, 3, 2, 1, 4]

    def asked(tokens):
        whole = request(tokens, "20x4x5", sampling)
        return replace(whole, shape=whole.shape.cut(cuts[(len(tokens) - 5) // 3]), uncut=whole.shape)

    both = drafters()
    plain, fixed = (rounds(drafter, *text, asked) for drafter in both)
    assert_same(fixed, plain)
    forms = [key[1] for key in both[1].cache.slabs.graphs if key[0] == "growth"]
    assert {form.shape for form in forms} == {TreeShape(20, 4, 5)} and len(grown) == len(fixed)


def test_a_full_cache_holds_the_rows_of_the_levels_there_is_room_for(monkeypatch):
    """Those of deeper levels, which the graph has all the same, go to a row that nobody reads."""
    monkeypatch.setattr(captured, "WINDOW", 8)
    text, both = text_of(7, 24), drafters(room=31)

    def asked(tokens):
        whole = request(tokens, "20x4x5", Sampling(0.7))
        return replace(whole, shape=whole.shape.cut(1 + (31 - whole.position) // 5))

    plain, fixed = (rounds(drafter, *text, asked) for drafter in both)
    assert_same(fixed, plain)
    assert both[1].cache.capacity == 31 and {tree.depths[-1] for tree in fixed} == {2, 3, 4, 5}


class Told(list):
    """The trees of a call's rounds."""

    def decoded(self, drafter, target, shape, sampling, prompts=([1, 2, 3],), **more):
        decoder = Decoder(target, drafter, **more)
        decoder.watch = lambda record: self.append(record.tree)
        *_, texts = decoder.run(prompts, shape, sampling, [5] * len(prompts), 40)
        return [text.tokens for text in texts]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8)], ids=str)
@pytest.mark.parametrize("shape", ["chain:3", "20x4x5"])
def test_rounds_grow_the_same_trees_and_write_the_same_text_call_after_call(shape, sampling, grown):
    target, shape = tiny_target(), TreeShape.parse(shape)
    plain, fixed = drafters()
    wanted = Told()
    text = wanted.decoded(plain, target, shape, sampling)
    assert text == Told().decoded(None, target, PLAIN, sampling) and not grown
    for _ in range(2):
        found = Told()
        assert found.decoded(fixed, target, shape, sampling) == text
        assert_same(found, wanted)
    assert len(grown) == 2 * sum(len(tree) > 1 for tree in wanted)


def test_what_fixed_shapes_do_not_know_grows_plainly(grown):
    """Penalties, a verifier that draws, noise of unknown make."""
    target, (_, fixed) = tiny_target(), drafters()
    shape = TreeShape.parse("8x2x3")
    Told().decoded(fixed, target, shape, Sampling(1.0, presence_penalty=0.5))
    Told().decoded(fixed, target, TreeShape.parse("chain:3"), Sampling(1.0), verifier="block")
    asked = request([1, 2, 3], "8x2x3", Sampling(1.0))
    assert not grown and grows_fixed(asked, 29) and not grows_fixed(replace(asked, seed=None), 29) and not grows_fixed(asked, 2)


@pytest.mark.parametrize("drawn", [Drawn(False, False), Drawn(True, True), Drawn(True, True, Filters(8, True, True))])
def test_growth_asks_the_host_for_no_number(drawn):
    """On the device "meta" there are no numbers: to ask for one is an error."""
    network, _ = tiny_draft(tiny_target(prepare=False))
    network.to("meta").embedding = [network.embedding[0].to("meta")]
    shape = (1, 1, network.midlayer.self_attn.kv_heads, 64, network.midlayer.self_attn.head_dim)
    slabs = Slabs(shape, torch.float64, torch.device("meta"))
    form = Levels(TreeShape(20, 4, 5), 64, drawn)
    given = torch.zeros(1, 5).long(), torch.ones(1, 4).double(), torch.zeros(1, 1, 32).double(), torch.arange(29)
    (found,) = form.grow(Draft(network, slabs, 2, ALONE), V, *(each.to("meta") for each in given))
    assert found.shape == (1, 4, 19) and found.dtype == torch.int64
