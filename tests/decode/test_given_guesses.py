"""Guesses that copying makes on the host go into a round that is one graph, beside the draft's: it commits what the plain round with both
trees commits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.captured_round import DEEP, MOST_GIVEN, runs
from eyas.decode.generate import Decoder
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.tree import Tree, merge
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.lookup import LookupDrafter
from tests.decode.test_captured_round import pair, rounds, run, short_windows

_ = rounds, short_windows  # fixtures

SAMPLINGS = [Sampling(), Sampling(0.5), Sampling(1.2, top_p=0.8)]
PROMPT = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 7, 1, 2, 3]


class Beside(CopyingDrafter):
    """The plain twin: the draft's own trees and copying's, merged without weighing one by the other."""

    def propose(self, requests):
        found = [self.given(request, min(DEEP, request.deepest or request.shape.levels)) for request in requests]
        sure, most, rows = all(its for _, its in found), max(request.shape.nodes for request in requests), 0
        if any(len(given) > 1 for given, _ in found):
            rows = min(MOST_GIVEN, most - 1 if sure else max(most // 2, 1))
        drafted = [Tree.root(request.root) for request in requests]
        if not (sure or most - rows < 2):
            cut = [replace(request.shape, nodes=min(request.shape.nodes, most - rows)) for request in requests]
            drafted = self.draft.propose([replace(request, shape=shape) for request, shape in zip(requests, cut)])
        return [merge([tree, given.best(rows + 1)]) for tree, (given, _) in zip(drafted, found)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("shape", ["chain:1", "chain:4", "20x4x5"])
def test_rounds_commit_what_the_plain_rounds_with_both_trees_do(shape, sampling, rounds):
    (target, draft), both = pair(False), pair(True)
    wanted = run(target, Beside(draft), shape, sampling, (PROMPT,))
    assert run(both[0], CopyingDrafter(both[1]), shape, sampling, (PROMPT,)) == wanted
    assert None not in rounds[:-1] and len(rounds) > 5
    forms = [key[1] for slabs in (both[1].cache.slabs, *both[0].pool.idle) for key in slabs.graphs if key[0] == "round"]
    assert {bool(form.given) for form in forms} >= {True}, "copying found something"


def test_rounds_with_the_draft_alone_with_both_and_with_copying_alone_take_turns(rounds):
    target, draft = pair(True)
    run(target, CopyingDrafter(draft), "20x4x5", Sampling(1.2), (PROMPT,))
    forms = {key[1] for slabs in (draft.cache.slabs, *target.pool.idle) for key in slabs.graphs if key[0] == "round"}
    assert {(form.guesses is not None, form.given) for form in forms} >= {(True, 0), (True, 10)}
    run(target, CopyingDrafter(draft), "20x4x5", Sampling(), ([1, 2, 3, 4, 5, 6] * 4,))
    forms = {key[1] for slabs in (draft.cache.slabs, *target.pool.idle) for key in slabs.graphs if key[0] == "round"}
    assert (False, 16) in {(form.guesses is not None, form.given) for form in forms}


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_a_watcher_sees_both_trees_as_one(sampling, rounds):
    def watched(pooled):
        target, draft = pair(pooled)
        decoder, records = Decoder(target, CopyingDrafter(draft) if pooled else Beside(draft)), []
        decoder.watch = records.append
        list(decoder.run([PROMPT], TreeShape.parse("20x4x5"), sampling, [5], 40))
        return records

    plain, graphs = watched(False), watched(True)
    assert len(list(filter(None, rounds))) > 5
    for ours, theirs in zip(graphs, plain, strict=True):
        assert (ours.tree.tokens, ours.tree.parents, ours.tree.depths) == (theirs.tree.tokens, theirs.tree.parents, theirs.tree.depths)
        assert (ours.accepted, ours.committed) == (theirs.accepted, theirs.committed)
        assert (ours.logits - theirs.logits).abs().max() < 1e-9


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("shape", ["chain:3", "16x4x3"])
def test_look_up_alone_is_its_plain_round(shape, sampling, rounds):
    wanted = run(pair(False)[0], LookupDrafter(), shape, sampling, (PROMPT,))
    assert run(pair(True)[0], LookupDrafter(), shape, sampling, (PROMPT,)) == wanted
    assert len(list(filter(None, rounds))) > 3


def test_beside_a_drafter_whose_part_no_graph_runs_the_round_is_plain(rounds):
    wanted, (target, _) = run(pair(False)[0], None, "chain:1", Sampling(0.5), (PROMPT,))[0][0], pair(True)
    for draft in (LookupDrafter(), pair(False)[1]):
        assert not runs(target, target.new_cache(1, 60), CopyingDrafter(draft), 1)
        assert run(target, CopyingDrafter(draft), "8x2x3", Sampling(0.5), (PROMPT,))[0][0] == wanted
    assert not any(rounds)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_planned_rounds_with_copying_are_graphs_and_the_text_is_plain_texts(sampling, monkeypatch, rounds):
    monkeypatch.setattr("eyas.decode.plan.clock.cores_taken", lambda: 0)

    def text(target, drafter, plan=None):
        *_, (found,) = Decoder(target, drafter, plan=plan).run([PROMPT], MAX_TREE if plan else PLAIN, sampling, [5], 100)
        return found.tokens

    wanted, (target, draft) = text(pair(False)[0], None), pair(True)
    plan = Planner(Prices({1: 1.0, 64: 2.0}), Prices({1: 0.1}), Calibration())
    assert text(target, CopyingDrafter(draft), plan) == wanted
    assert len(list(filter(None, rounds))) > 10
