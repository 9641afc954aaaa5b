"""A whole round as one graph commits what the plain round commits. What CUDA captures, a CPU runs as it is."""

from __future__ import annotations

import random

import pytest
import torch

from eyas.config import Request, Sampling, TreeShape
from eyas.decode import generate
from eyas.decode.captured_growth import Draft, Levels
from eyas.decode.fixed import Drawn
from eyas.decode.fixed_filters import Filters
from eyas.decode.fixed_round import Round, ancestors, walked
from eyas.decode.generate import Decoder
from eyas.decode.plan.planner import Plan
from eyas.decode.sequence import new_sequence
from eyas.decode.tree import Tree
from eyas.decode.verify import walk
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.kernels.captured import Seats
from eyas.methods import METHODS
from eyas.model.cache import Pool, Slabs
from eyas.model.mask import ancestor_mask
from tests.tiny import tiny_draft, tiny_target
from tests.tiny_family import tiny_network

V = 8  # tokens, so that guesses of a random draft often come true
SAMPLINGS = [Sampling(), Sampling(0.6), Sampling(1.3)]
FILTERED = Sampling(1.2, top_k=5, top_p=0.9, min_p=0.05)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """So that a short text crosses several."""
    monkeypatch.setattr(captured, "WINDOW", 16)


@pytest.fixture
def rounds(monkeypatch):
    """The tokens that each round accepted which was tried as a graph; None for one that a graph cannot run."""
    found, inner = [], generate.captured_round

    def tried(*given):
        told = inner(*given)
        found.append(told and [each.tokens for each in told])
        return told

    monkeypatch.setattr(generate, "captured_round", tried)
    return found


def pair(pooled, dtype=torch.float64, eos=(), **settings):
    """A target and a drafter; with slabs from pools, over which alone graphs run."""
    target = tiny_target(dtype=dtype, prepare=False, vocab_size=V, eos_token_ids=eos)
    network, vocab = tiny_draft(target, draft_vocab_size=V - 1, **settings)
    network = network.to(dtype).prepare()
    target.prepare()
    target.pool, network.pool = (Pool(), Pool()) if pooled else (None, None)
    return target, Eagle3Drafter(network, vocab)


def run(target, drafter, shape, sampling, prompts=([1, 2, 3],), verifier="walk", seed=5, **more):
    decoder = Decoder(target, drafter, verifier)
    *_, texts = decoder.run(prompts, TreeShape.parse(shape), sampling, [seed] * len(prompts), 40, **more)
    return [(text.tokens, text.accepted_lengths, text.finish_reason) for text in texts]


@pytest.mark.parametrize("sampling", [*SAMPLINGS, FILTERED], ids=str)
@pytest.mark.parametrize("shape", ["chain:1", "chain:4", "20x4x5", "200x2x6", "64x7x4"])
def test_rounds_commit_what_the_plain_rounds_do(shape, sampling, rounds):
    """Tokens, and how many of them in how many rounds, call after call."""
    wanted, both = run(*pair(False), shape, sampling), pair(True)
    assert wanted[0][0] == run(both[0], None, "chain:1", sampling)[0][0] and not any(rounds)
    for _ in range(2):
        rounds.clear()
        assert run(*both, shape, sampling) == wanted
        assert None not in rounds[:-1]  # the last may have room for the bonus token alone


@pytest.mark.parametrize("settings", [{"norm_output": True}, {"draft_layers": 3}, {"dtype": torch.float32}], ids=str)
def test_rounds_of_other_drafts_and_in_float32_commit_the_same(settings, rounds):
    wanted = run(*pair(False, **settings), "20x4x5", Sampling(0.6))
    assert run(*pair(True, **settings), "20x4x5", Sampling(0.6)) == wanted
    assert len(list(filter(None, rounds))) > 9


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_rounds_of_an_eagle_2_draft_commit_the_same(sampling, rounds):
    def both(pooled):
        target = tiny_target(prepare=False, vocab_size=V)
        network, vocab = tiny_network("eagle1", target, size=V - 1)
        network.prepare()
        target.prepare()
        target.pool, network.pool = (Pool(), Pool()) if pooled else (None, None)
        return target, METHODS["eagle2"].decoding().drafter(network, vocab)

    assert run(*both(True), "20x4x5", sampling) == run(*both(False), "20x4x5", sampling)
    assert len(list(filter(None, rounds))) > 9


def test_one_text_after_the_other_takes_the_same_slot(rounds):
    prompts = [[1, 2, 3], [number * number % V for number in range(70)], [5]]
    wanted = run(*pair(False), "20x4x5", Sampling(1.3), prompts, batch=1)
    assert run(*pair(True), "20x4x5", Sampling(1.3), prompts, batch=1) == wanted
    assert len(list(filter(None, rounds))) > 30


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_a_text_that_is_alone_in_any_of_several_slots_is_read_by_graphs(sampling, rounds):
    """Three texts at once, of which each goes on alone for a while as the others end, and then one more."""

    def texts(pooled):
        decoder, shape = Decoder(*pair(pooled)), TreeShape.parse("20x4x5")
        decoder.reserve(3, 90, [shape])
        lengths, found = (4, 20, 8, 45, 15), []
        for number, length in enumerate(lengths):
            request = Request(sampling=sampling, max_new_tokens=length)
            found.append(new_sequence([number, 2, 3], request, shape, number, decoder.target.config))
            decoder.admit(found[-1])
            while decoder.busy and number >= 2:
                decoder.step()
        return [(text.tokens, text.accepted_lengths) for text in found]

    wanted = texts(False)
    assert texts(True) == wanted and len(list(filter(None, rounds))) > 15


def test_rounds_of_both_kinds_may_take_turns(rounds):
    wanted, decoder = run(*pair(False), "20x4x5", Sampling(1.3)), Decoder(*pair(True))
    plans = [decoder.plan, OtherPlan()]

    def turns():
        for turn, texts in enumerate(decoder.run([[1, 2, 3]], TreeShape.parse("20x4x5"), Sampling(1.3), [5], 40)):
            decoder.plan = plans[turn % 3 == 1]
            yield texts

    *_, (text,) = turns()
    assert [(text.tokens, text.accepted_lengths, text.finish_reason)] == wanted
    assert 2 < len(list(filter(None, rounds))) < text.rounds - 2


@pytest.mark.parametrize("seed", range(5))
def test_filtered_rounds_commit_what_the_plain_rounds_do_for_any_seed(seed, rounds):
    draw = random.Random(seed)
    sampling = Sampling(draw.uniform(0.5, 1.5), draw.choice([0, 1, 2, 5, 9]), draw.choice([1.0, 0.95, 0.5]), draw.choice([0.0, 0.02, 0.3]))
    wanted, found = (run(*pair(pooled), "12x3x3", sampling, seed=seed) for pooled in (False, True))
    assert found == wanted and None not in rounds[:-1]


@pytest.mark.parametrize("sampling", [*SAMPLINGS[:2], FILTERED], ids=str)
@pytest.mark.parametrize("shape", ["chain:3", "20x4x5"])
def test_a_watcher_sees_the_plain_rounds_trees_paths_and_logits(shape, sampling, rounds):
    def watched(pooled):
        decoder, records = Decoder(*pair(pooled)), []
        decoder.watch = records.append
        request = Request(sampling=sampling, max_new_tokens=40, logprobs=2)
        sequence = new_sequence([1, 2, 3], request, TreeShape.parse(shape), 5, decoder.target.config)
        list(decoder.run_all([sequence]))
        return sequence, records

    (text, plain), (other, graphs) = watched(False), watched(True)
    assert other.tokens == text.tokens and len(list(filter(None, rounds))) > 9
    for ours, theirs in zip(other.logprobs, text.logprobs, strict=True):
        assert ours.token == theirs.token and ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
    for ours, theirs in zip(graphs, plain, strict=True):
        assert (ours.tree.tokens, ours.tree.parents, ours.tree.depths) == (theirs.tree.tokens, theirs.tree.parents, theirs.tree.depths)
        assert (ours.accepted, ours.committed) == (theirs.accepted, theirs.committed)
        assert torch.allclose(ours.logits, theirs.logits, rtol=0, atol=1e-9)


def test_a_text_that_ends_in_a_round_ends_there(rounds):
    plain, graphs = (run(*pair(pooled, eos=(4,)), "20x4x5", Sampling(1.3)) for pooled in (False, True))
    assert graphs == plain and plain[0][2] == "stop" and any(rounds)


class OtherPlan(Plan):
    """Not a fixed one: it may want to see trees."""


def test_what_a_graph_does_not_know_is_a_plain_round(rounds):
    run(*pair(True), "8x2x3", Sampling(1.0, presence_penalty=0.5))
    run(*pair(True), "chain:3", Sampling(1.0), verifier="block")
    run(pair(True)[0], pair(False)[1], "8x2x3", Sampling())
    run(pair(False)[0], pair(True)[1], "8x2x3", Sampling())
    run(pair(True)[0], None, "8x2x3", Sampling())
    list(Decoder(*pair(True), plan=OtherPlan()).run([[1, 2]], TreeShape.parse("8x2x3"), Sampling(), [5], 9))
    assert not any(rounds)


def random_tree(draw, nodes):
    tree = [(0, -1, 0)]
    children = [list(range(V)) for _ in range(nodes)]
    for row in range(1, nodes):
        parent = draw.randrange(max(0, row - 4), row)
        token = children[parent].pop(draw.randrange(len(children[parent])))
        tree.append((token, parent, tree[parent][2] + 1))
    return Tree(*map(list, zip(*tree)), [0.0] * nodes)


@pytest.mark.parametrize("seed", range(40))
def test_the_path_is_the_walks(seed):
    draw = random.Random(seed)
    tree = random_tree(draw, 24)
    draws = [draw.choice([*children] * 3 + [draw.randrange(V)]) if children else draw.randrange(V) for children in tree.children]
    parents = torch.tensor([[0, *tree.parents[1:]]])
    seen = ancestors(parents, max(tree.depths))
    assert seen[0].equal(ancestor_mask(tree.parents))
    given = torch.tensor([tree.tokens]), parents
    (path,) = walked(*given, torch.ones(1, 24) > 0, seen, torch.tensor([draws]))
    accepted = walk(tree, lambda row: draws[row])
    assert path.nonzero()[:, 0].tolist() == accepted.path
    (short,) = walked(*given, torch.tensor([tree.depths]) <= 2, seen, torch.tensor([draws]))
    assert short.nonzero()[:, 0].tolist() == accepted.path[:3]


@pytest.mark.parametrize("seats", [Seats(1, False), Seats(4, False), Seats(4, True)], ids=str)
@pytest.mark.parametrize("drawn", [Drawn(False, False), Drawn(True, True), Drawn(True, True, Filters(8, True, True))])
def test_a_round_asks_the_host_for_no_number(drawn, seats):
    """On the device "meta" there are no numbers: to ask for one is an error."""
    target = tiny_target(prepare=False)
    network, _ = tiny_draft(target)
    target.to("meta")
    network.to("meta").embedding = [target.embedding]
    slots, count = 1 if seats.count == 1 else 6, seats.count

    def slabs(layers):
        return Slabs((layers, slots, target.config.num_key_value_heads, 64, target.config.head_dim), torch.float64, torch.device("meta"))

    form = Round(Levels(TreeShape(20, 4, 5), 64, drawn), 7, 8, drawn, 64, (1, 2, 4), seats)
    given = [torch.zeros(count, 5).long(), torch.ones(count, 4).double(), torch.zeros(count, 8).long(), torch.zeros(count, 8, 96).double()]
    given += [torch.zeros(count, 4, 7).long(), torch.arange(29)]
    told, features, logits, nodes = form.run(target, slabs(5), Draft(network, slabs(1), 2, seats), *(each.to("meta") for each in given))
    assert told.shape == (count, 3, 8) and told.dtype == torch.int64 and features.shape == (count, 8, 96)
    assert logits.shape == (count, 27, 53) and nodes.shape == (count, 4, 26)
