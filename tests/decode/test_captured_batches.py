"""Rounds of several sequences as one graph commit what the plain rounds commit, and touch no slot but theirs. What CUDA captures, a CPU
runs as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eyas.config import PLAIN, Request, Sampling, TreeShape
from eyas.decode import captured_round
from eyas.decode.generate import Decoder
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.plan.shapes import SHAPES, Shapes
from eyas.decode.sequence import new_sequence
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.lookup import LookupDrafter
from tests.decode.test_captured_round import FILTERED, V, pair, rounds, short_windows
from tests.decode.test_given_guesses import PROMPT, Beside

_ = rounds, short_windows  # fixtures

TREE = TreeShape.parse("12x3x3")
WARM = [Sampling(0.6), Sampling(1.3), Sampling(0.9), Sampling(1.1), Sampling(0.7)]
DRAWN = {
    "greedy": [Sampling()] * 5,
    "each at a temperature of its own": WARM,
    "greedy and not": [Sampling(), Sampling(0.9), Sampling(), Sampling(1.3), Sampling(0.6)],
    "greedy beside filters": [Sampling(1.2, top_k=6, top_p=0.9), Sampling(), Sampling(0.8, top_k=7, top_p=0.8), Sampling(), Sampling()],
    "each with filters of its own": [replace(each, top_k=5 + row % 3, top_p=0.8 + row / 50) for row, each in enumerate(WARM)],
}


def sequences(target, samplings, shape=TREE, **more):
    """Texts that differ in all that texts of a batch may differ in."""
    return [
        new_sequence(
            [(row + place) % V for place in range(2 + 5 * row)],
            Request(sampling=sampling, max_new_tokens=30 - 7 * row, **more),
            shape,
            row,
            target.config,
            number=row,
        )
        for row, sampling in enumerate(samplings)
    ]


def decoded(target, drafter, samplings, shape=TREE, plan=None, batch=None, watch=None, **more):
    decoder = Decoder(target, drafter, plan=plan)
    decoder.watch = watch
    everyone = sequences(target, samplings, shape, **more)
    list(decoder.run_all(everyone, batch))
    return everyone


def told(everyone):
    return [(text.tokens, text.accepted_lengths, text.finish_reason) for text in everyone]


def served(rounds):
    """The numbers of sequences of the rounds that were graphs."""
    return {len(each) for each in rounds if each}


@pytest.mark.parametrize(("count", "drawn"), [(2, "greedy"), (3, "greedy and not"), *((5, drawn) for drawn in DRAWN)])
def test_batches_commit_what_the_plain_rounds_do(count, drawn, rounds):
    """Tokens, and how many of them in how many rounds, while texts of other lengths end one by one."""
    samplings = DRAWN[drawn][:count]
    assert told(decoded(*pair(True), samplings)) == told(decoded(*pair(False), samplings))
    assert {1, count} <= served(rounds) <= {*range(1, count + 1)} and rounds.count(None) <= 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8), FILTERED], ids=str)
@pytest.mark.parametrize("shape", ["chain:3", "20x4x5"])
def test_a_watcher_sees_the_plain_rounds_trees_paths_and_logits(shape, sampling, rounds):
    def watched(pooled):
        records = []
        texts = decoded(*pair(pooled), [sampling] * 3, TreeShape.parse(shape), watch=records.append, logprobs=2)
        return texts, records

    (texts, plain), (others, graphs) = watched(False), watched(True)
    assert told(others) == told(texts) and served(rounds) >= {2, 3}
    for ours, theirs in zip(graphs, plain, strict=True):
        assert ours.sequence == theirs.sequence
        assert (ours.tree.tokens, ours.tree.parents, ours.tree.depths) == (theirs.tree.tokens, theirs.tree.parents, theirs.tree.depths)
        assert (ours.accepted, ours.committed) == (theirs.accepted, theirs.committed)
        assert (ours.logits - theirs.logits).abs().max() < 1e-9
    for text, other in zip(texts, others, strict=True):
        assert [each.logprob for each in other.logprobs] == pytest.approx([each.logprob for each in text.logprobs], abs=1e-9)


def test_batches_in_float32_and_of_deeper_drafts_commit_the_same(rounds):
    settings = {"dtype": torch.float32, "draft_layers": 3}
    assert told(decoded(*pair(True, **settings), WARM[:3])) == told(decoded(*pair(False, **settings), WARM[:3]))
    assert served(rounds) >= {2, 3}


def joined(decoder, slots, lengths):
    """What texts of these lengths say of which the last ones join one by one."""
    decoder.reserve(slots, 80, [TREE])
    found = []
    for row, length in enumerate(lengths):
        request = Request(sampling=WARM[row % 5], max_new_tokens=length)
        found.append(new_sequence([row, 2, 3], request, TREE, row, decoder.target.config))
        decoder.admit(found[-1])
        for _ in range(3 if row > 3 else 0):
            decoder.step()
    while decoder.busy:
        decoder.step()
    return told(found)


def test_texts_join_and_leave_in_any_slots(rounds, monkeypatch):
    """Where those that decode are not in the first slots, their keys are copied together to be read."""
    seats, inner = set(), captured_round.seats_of
    monkeypatch.setattr(captured_round, "seats_of", lambda *given: seats.add(found := inner(*given)) or found)

    lengths = (4, 30, 5, 25, 40, 9, 20)
    assert joined(Decoder(*pair(True)), 5, lengths) == joined(Decoder(*pair(False)), 5, lengths)
    assert {each.scattered for each in seats if each.count > 1} == {True, False} and {each.count for each in seats} >= {1, 2, 5}
    assert served(rounds) >= {2, 3, 4, 5}


def kept(cache, slot, rows):
    return torch.stack([cache.keys[:, slot, :, :rows], cache.values[:, slot, :, :rows]]).clone()


def beside_a_prompt(decoder, count, part, look):
    """What texts say of which all but the first decode while that one's prompt is read, so many tokens at a time. What `look` sees of the
    decoder is not changed by a round."""
    decoder.reserve(count, 80, [TREE])
    found = sequences(decoder.target, WARM[:count])
    found[0].tokens = [number * number % V for number in range(40)]
    found[0].prompt_length, found[0].limit = 40, 60
    for text in found:
        decoder.admit(text)
    decoder.seat()
    decoder.reading.rotate(-1)
    for _ in found[1:]:
        decoder.read_prompt()
    while True:
        decoder.read_prompt(part)
        if not decoder.reading:
            break
        before = look(decoder)
        decoder.decode()
        assert all(one.equal(other) for one, other in zip(before, look(decoder))) and before[0].any()
    while decoder.busy:
        decoder.step()
    return told(found)


@pytest.mark.parametrize("count", [3, 4], ids=["beside slots that are copied together", "among slots that are read in place"])
def test_a_slot_that_reads_a_prompt_meanwhile_keeps_its_rows(count, rounds):
    def look(decoder):
        return [kept(cache, 0, 40) for cache in (decoder.cache, decoder.drafter.cache)]

    wanted, found = (beside_a_prompt(Decoder(*pair(pooled)), count, 8, look) for pooled in (False, True))
    assert found == wanted and served(rounds) >= {1, 2, 3}


def test_rows_that_wait_in_a_free_slot_for_a_prompt_that_begins_alike_stay(rounds):
    def texts(pooled):
        decoder = Decoder(*pair(pooled))
        decoder.reserve(3, 90, [TREE], keep_prefixes=True)
        beginning = [number * number % V for number in range(30)]
        found = [
            new_sequence(prompt, Request(sampling=Sampling(0.8), max_new_tokens=length), TREE, seed, decoder.target.config)
            for seed, (prompt, length) in enumerate([(beginning, 3), ([1, 2], 40), ([3], 40), ([*beginning, 5], 20)])
        ]
        for text in found[:3]:
            decoder.admit(text)
        while not found[0].finish_reason:
            decoder.step()
        rows = decoder.cache.lengths[0]
        before = kept(decoder.cache, 0, rows)
        for _ in range(4):
            decoder.step()
        assert kept(decoder.cache, 0, rows).equal(before)
        decoder.admit(found[3])
        while decoder.busy:
            decoder.step()
        assert found[3].reused >= 29
        return told(found)

    assert texts(True) == texts(False) and served(rounds) >= {2, 3}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, top_p=0.8)], ids=str)
def test_copied_guesses_go_beside_the_drafts(sampling, rounds):
    def texts(pooled):
        target, draft = pair(pooled)
        decoder = Decoder(target, CopyingDrafter(draft) if pooled else Beside(draft))
        *_, found = decoder.run([PROMPT, [1, 2, 3, 4, 5, 6] * 3, [7, 6]], TreeShape.parse("20x4x5"), sampling, [1, 2, 3], 30)
        return told(found), [key[1] for key in decoder.drafter.draft.cache.slabs.graphs if key[0] == "round"]

    (wanted, _), (found, forms) = texts(False), texts(True)
    assert found == wanted and served(rounds) >= {3}
    assert {(form.guesses is not None, form.given) for form in forms} >= {(True, 10)}


def test_where_all_copies_are_sure_the_draft_is_not_run(rounds):
    target, draft = pair(True)
    decoder = Decoder(target, CopyingDrafter(draft))
    list(decoder.run([[1, 2, 3, 4, 5, 6] * 4] * 2, TreeShape.parse("20x4x5"), Sampling(), [1, 2], 30))
    forms = [key[1] for key in decoder.cache.slabs.graphs if key[0] == "round"]
    assert (None, 16) in {(form.guesses, form.given) for form in forms}


def test_look_up_alone_and_plain_decoding_are_graphs_too(rounds):
    for drafter in (LookupDrafter, lambda: None):
        wanted = told(decoded(pair(False)[0], drafter(), WARM[:3]))
        assert not any(rounds) and told(decoded(pair(True)[0], drafter(), WARM[:3])) == wanted
        assert served(rounds) >= {2, 3}
        rounds.clear()


def test_what_one_graph_cannot_serve_is_a_plain_round(rounds, monkeypatch):
    """Other kinds of draws, logits that are processed, other trees, too many rows."""

    def one_graph(one, other, shape=TREE):
        decoder = Decoder(*pair(True))
        decoder.reserve(2, 40, [TREE])
        for sampling, tree in ((one, TREE), (other, shape)):
            decoder.admit(new_sequence([1, 2], Request(sampling=sampling, max_new_tokens=9), tree, 1, decoder.target.config))
        rounds.clear()
        for _ in range(3):  # two prompts, then both decode
            decoder.step()
        return any(rounds)

    assert one_graph(Sampling(1.0), Sampling(0.5))
    for other in (Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5), Sampling(1.0, presence_penalty=0.5)):
        assert not one_graph(Sampling(1.0), other)
    assert not one_graph(Sampling(1.0), Sampling(0.5), TreeShape.parse("8x2x2"))
    monkeypatch.setattr(captured_round, "MOST_ROWS", 2 * TREE.nodes - 1)
    assert not one_graph(Sampling(1.0), Sampling(0.5))


@pytest.mark.parametrize("copy", [False, True], ids=["draft", "draft and copies"])
def test_planned_batches_are_graphs_of_shapes_that_were_timed_for_as_many(copy, monkeypatch, rounds):
    monkeypatch.setattr("eyas.decode.plan.clock.cores_taken", lambda: 0)
    monkeypatch.setattr("eyas.kernels.captured.WINDOW", 128)

    def texts(target, drafter, plan=None):
        *_, found = Decoder(target, drafter, plan=plan).run(
            [PROMPT, [2, 3], [5]], MAX_TREE if plan else PLAIN, Sampling(1.3), [1, 2, 3], 90
        )
        return [text.tokens for text in found]

    wanted, (target, draft) = texts(pair(False)[0], None), pair(True)
    plan = Planner(Prices({1: 1.0, 64: 2.0}), Prices({1: 0.1}), Calibration())
    rounds.clear()
    assert texts(target, CopyingDrafter(draft) if copy else draft, plan) == wanted
    assert [len(each or []) for each in rounds[:20]] == [3] * 20
    three = plan.shapes.of(3)
    assert three.sequences == 4 and set(three.seconds) == {shape.nodes for shape in SHAPES} and three.tokens[60] > 1
    again = Shapes(plan.shapes.table())
    assert again.of(4).seconds == three.seconds and again.seconds == plan.shapes.seconds


def test_large_batches_are_planned_within_the_rows_of_a_graph():
    assert [Shapes(sequences=count).choose(MAX_TREE).nodes for count in (1, 8, 16, 32)] == [60, 60, 32, 16]
    told_of_one = {"8": [0.5, 2.0]}
    assert Shapes(told_of_one).table() == told_of_one and not Shapes(told_of_one).of(2).seconds
    assert not Shapes({"batches": {"2": 3, "4": {"8": [0, 1]}}}).of(4).seconds and not Shapes({"batches": []}).of(2).seconds
