"""A round that runs as one graph grows the shape that brings most tokens a second, and learns from all what shapes bring and cost."""

from __future__ import annotations

import random

import pytest
from rich.console import Console

from eyas.commands.plan import whole_rounds_table
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode import generate
from eyas.decode.generate import Decoder
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.plan.shapes import SHAPES, TRIALS, TRIED_AGAIN, Shapes
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.kernels import captured
from eyas.model.cache import Pool
from tests.tiny import tiny_draft, tiny_target

RISING = {1: 1.0, 4: 1.3, 8: 1.5, 16: 1.8, 32: 2.2, 60: 3.0}


def went(shape: TreeShape, right: float, draw: random.Random) -> list[int]:
    """The ranks of a path: each level's likeliest node is right with this chance, a later one with a fifth of it."""
    ranks = []
    for depth in range(1, shape.levels + 1):
        chance = draw.random()
        rank = depth if chance < right else depth + 9 if chance < 1.2 * right else 99
        if rank >= shape.nodes:
            break
        ranks.append(rank)
    return ranks


def served(shapes: Shapes, prices: dict[int, float], right: float, rounds: int, seed: int = 0) -> list[int]:
    """The nodes of the shapes of these rounds."""
    draw, found = random.Random(seed), []
    for _ in range(rounds):
        shape = shapes.choose(MAX_TREE)
        if shape.nodes > 1:
            shapes.judge(shape, went(shape, right, draw))
        shapes.record(shape, prices[shape.nodes] * draw.uniform(0.95, 1.05))
        found.append(shape.nodes)
    return found


@pytest.mark.parametrize(
    ("prices", "right", "best"),
    [
        (RISING, 0.05, {1}),
        (dict.fromkeys(RISING, 1.0), 0.8, {60}),
        (RISING, 0.75, {8, 16}),
        ({nodes: 1.0 if nodes == 1 else 20.0 for nodes in RISING}, 0.9, {1}),
    ],
    ids=["poor draft", "free nodes", "rising prices", "dear nodes"],
)
def test_the_shape_that_brings_most_a_second_is_grown(prices, right, best):
    found = served(Shapes(), prices, right, 400)
    first = len(SHAPES) * TRIALS
    assert found[:TRIALS] == [60] * TRIALS and set(found[:first]) == set(RISING), "each is timed, the largest first"
    settled = found[-200:]
    assert sum(nodes in best for nodes in settled) >= 0.9 * len(settled)
    assert settled.count(60) >= len(settled) // TRIED_AGAIN, "the largest is tried again"


def test_larger_rounds_tell_what_smaller_ones_bring():
    shapes = Shapes()
    shapes.judge(SHAPES[-1], [1, 2, 5, 30])
    assert shapes.tokens == {1: 1, 4: 3, 8: 4, 16: 4, 32: 5, 60: 5}
    shapes.judge(SHAPES[2], [1])
    assert shapes.tokens == {1: 1, 4: 2.5, 8: 3, 16: 4, 32: 5, 60: 5}
    shapes.judge(SHAPES[3], [0, 0, 0, 0, 0, 0])
    assert shapes.tokens == {1: 3, 4: 4, 8: pytest.approx(13 / 3), 16: 5.5, 32: 5, 60: 5}, "what is given comes with every shape"


def test_a_dearer_machine_and_a_better_text_change_the_choice():
    shapes = Shapes()
    served(shapes, RISING, 0.05, 300)
    assert served(shapes, RISING, 0.9, 1500)[-50:].count(1) == 0


def test_a_text_that_ends_soon_gets_lower_trees_of_the_same_shapes():
    shapes = Shapes()
    served(shapes, dict.fromkeys(RISING, 1.0), 0.8, 200)
    assert shapes.choose(MAX_TREE.cut(3)) == TreeShape(60, 2, 4)
    assert shapes.choose(PLAIN) == PLAIN and Shapes().choose(PLAIN) == PLAIN


def test_a_table_is_what_the_next_process_begins_with_and_a_damaged_one_is_nothing():
    shapes = Shapes()
    served(shapes, RISING, 0.75, 300)
    again = Shapes(shapes.table())
    assert again.tokens == shapes.tokens and again.seconds == shapes.seconds and again.choose(MAX_TREE) == shapes.choose(MAX_TREE)
    for damaged in (None, [], {"8": 3}, {"8": ["x", 1]}, {"8": [0, 1]}, {"8": [1, 999]}, {"8": [1]}):
        assert not Shapes(damaged).seconds
    assert list(Shapes({"8": [0.5, 2.0], "16": [0.7, 0.0]}).seconds) == [8]


def test_the_plan_command_shows_them():
    shapes = Shapes({"16": [0.002, 2.5], "1": [0.001, 1.0]})
    console = Console(width=80)
    with console.capture() as shown:
        console.print(whole_rounds_table(shapes))
    lines = shown.get().splitlines()
    assert any("1.0" in line and "1.00" in line for line in lines) and any(
        "16" in line and "2.0" in line and "2.50" in line for line in lines
    )


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3), Sampling(1.2, top_p=0.9)], ids=str)
def test_planned_rounds_run_as_graphs_and_the_text_is_plain_texts(sampling, monkeypatch):
    monkeypatch.setattr(captured, "WINDOW", 128)
    monkeypatch.setattr("eyas.decode.plan.clock.cores_taken", lambda: 0)
    target = tiny_target(prepare=False, vocab_size=8)
    network, vocab = tiny_draft(target, draft_vocab_size=7)
    network.prepare()
    target.prepare()
    wanted = tokens_of(Decoder(target), sampling)
    target.pool, network.pool = Pool(), Pool()
    plan = Planner(Prices({1: 1.0, 64: 2.0}), Prices({1: 0.1}), Calibration())
    asked, inner = [], generate.captured_round
    monkeypatch.setattr(generate, "captured_round", lambda *given: asked.append(given[4]) or inner(*given))
    drafter = Eagle3Drafter(network, vocab)
    assert tokens_of(Decoder(target, drafter, plan=plan), sampling, MAX_TREE) == wanted
    assert {shape.nodes for shape in asked} == set(RISING), "each was timed"
    assert set(plan.shapes.seconds) == set(RISING) and min(plan.shapes.tokens[nodes] for nodes in (4, 8, 60)) > 1 and not plan.recent.tokens


def tokens_of(decoder: Decoder, sampling: Sampling, shape: TreeShape = PLAIN) -> list[int]:
    *_, (text,) = decoder.run([[1, 2, 3]], shape, sampling, [5], 100)
    return text.tokens
