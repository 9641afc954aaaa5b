"""A planned round takes the nodes that are worth their time and no others, learns prices and chances, and never changes the text."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from eyas.config import Sampling
from eyas.decode.drafter import TreeRequest
from eyas.decode.generate import Decoder
from eyas.decode.plan.calibration import RECENT_NODES, Calibration
from eyas.decode.plan.pauses import LONGEST_PAUSE, SHORTEST_PAUSE, Pauses
from eyas.decode.plan.planner import MAX_TREE, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.tree import Growth, Tree
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.drafters.lookup import LookupDrafter
from eyas.model.rows import chain_rows
from tests.tiny import tiny_draft, tiny_target


def planner(passes: dict[int, float], step: float = 0.1, batch: int = 1, rate: float = 1.0) -> Planner:
    made = Planner(Prices(passes), Prices({1: step}), Calibration(frozen=True))
    made.begin(batch)
    made.rate, made.recent.rows = rate, float(batch)
    return made


def random_tree(rng: random.Random, nodes: int) -> Tree:
    parents, depths, scores = [-1], [0], [0.0]
    for _ in range(nodes - 1):
        parent = rng.randrange(len(parents))
        parents.append(parent)
        depths.append(depths[parent] + 1)
        scores.append(scores[parent] + math.log(rng.uniform(0.05, 0.9)))
    return Tree(list(range(nodes)), parents, depths, scores)


# ---- which nodes ----


@pytest.mark.parametrize("seed", range(25))
def test_the_cut_is_the_best_of_all_cuts(seed):
    rng = random.Random(seed)
    trees = [random_tree(rng, rng.randint(1, 6)) for _ in range(2)]
    prices = {rows: 1 + rng.random() * rows for rows in range(1, 14)}  # neither rising nor convex
    made = planner(prices, batch=2, rate=rng.uniform(0.05, 0.8))
    chances = [made.chances(tree) for tree in trees]

    def closed(tree: Tree, rows: tuple[int, ...]) -> bool:
        return all(tree.parents[row] in (0, *rows) for row in rows)

    def subsets(tree: Tree):
        for count in range(len(tree)):
            yield from (rows for rows in itertools.combinations(range(1, len(tree)), count) if closed(tree, rows))

    def value(chosen) -> float:
        tokens = sum(chances[place][row] for place, rows in enumerate(chosen) for row in rows)
        return tokens - made.rate * made.passes.of(len(trees) + sum(map(len, chosen)))

    best = max(value(chosen) for chosen in itertools.product(*(list(subsets(tree)) for tree in trees)))
    rows_of = [[tree.tokens.index(token) for token in cut.tokens[1:]] for tree, cut in zip(trees, made.cut(trees))]
    assert value(rows_of) == pytest.approx(best)


def test_sequences_share_a_pass_by_worth():
    sure, vague = Tree.chain(1, [2, 3, 4], [-0.05, -0.1, -0.15]), Tree.chain(1, [2, 3, 4], [-3.0, -6.0, -9.0])
    cut = planner({1: 1.0, 2: 1.0, 10: 4.0}, batch=2).cut([vague, sure])
    assert [len(tree) for tree in cut] == [1, 4]


def test_where_rows_are_free_all_stay_and_where_they_are_dear_none_does():
    tree = Tree.chain(1, [2, 3], [-0.5, -1.5])
    assert planner({1: 1.0, 64: 1.0}).cut([tree]) == [tree]
    assert len(planner({1: 1.0, 2: 9.0, 64: 600.0}).cut([tree])[0]) == 1


def test_siblings_are_never_likelier_than_their_parent_together():
    both = Tree([1, 2, 3, 4], [-1, 0, 0, 1], [0, 1, 1, 2], [0.0, -0.1, -0.2, -0.3])  # what two drafters are sure of
    chances = planner({1: 1.0}).chances(both)
    assert chances[1] + chances[2] == pytest.approx(1.0)
    assert chances[3] <= chances[1]


def test_nothing_is_drafted_where_it_cannot_pay_but_now_and_then_one_sequence_tries():
    dear = planner({1: 1.0, 64: 64.0}, step=5.0, batch=3)
    asked = [dear.worth_drafting([0.0] * 3) for _ in range(3 * SHORTEST_PAUSE)]
    assert [sum(each) for each in asked].count(1) == 2 and sum(map(sum, asked)) == 2
    assert asked[SHORTEST_PAUSE - 1] == asked[-1] == [True, False, False], "the second time after twice as many rounds"
    assert planner({1: 1.0, 64: 1.1}, step=0.01).worth_drafting([0.0]) == [True]


def test_rounds_are_counted_from_the_last_in_which_the_draft_was_asked():
    made = planner({1: 1.0, 64: 2.0}, step=0.2)
    middle, asked = SHORTEST_PAUSE // 2, []
    for number in range(3 * SHORTEST_PAUSE // 2):
        asked += made.worth_drafting([0.0 if number == middle else 0.95])
    assert [place for place, each in enumerate(asked) if each] == [middle], "asked once, so not tried until as many rounds later"


def test_trials_get_rarer_from_call_to_call_until_the_draft_pays():
    shared, asked = {}, 0
    for _ in range(100):  # calls of 100 rounds
        call = Planner(Prices({1: 1.0, 64: 64.0}), Prices({1: 5.0}), Calibration(frozen=True), Pauses(shared))
        for _ in range(100):
            call.begin(1)
            asked += sum(call.worth_drafting([0.0]))
    assert 100 * 100 // LONGEST_PAUSE <= asked <= 5 + 100 * 100 // LONGEST_PAUSE
    cheap = Planner(Prices({1: 1.0, 64: 1.1}), Prices({1: 0.01}), Calibration(frozen=True), Pauses(shared))
    cheap.begin(1)
    assert cheap.worth_drafting([0.0]) == [True] and shared[1].patience == SHORTEST_PAUSE


def test_a_first_level_is_worth_what_the_second_will_bring_too():
    """Where rows are free the first brings some 0.58 tokens, the second some 0.26 more."""
    assert planner({1: 1.0, 64: 1.0}, step=0.7).worth_drafting([0.0]) == [True]
    assert planner({1: 1.0, 64: 1.0}, step=0.9).worth_drafting([0.0]) == [False]


def test_sequences_share_the_price_of_a_first_level():
    free = {1: 1.0, 64: 1.0}
    assert planner(free, step=1.2).worth_drafting([0.0]) == [False]
    assert planner(free, step=1.2, batch=2).worth_drafting([0.0, 0.0]) == [True, True]


def test_a_sure_guess_of_another_drafter_leaves_the_draft_unasked():
    made = planner({1: 1.0, 64: 2.0}, step=0.2)
    assert made.worth_drafting([0.0]) == [True]
    assert made.worth_drafting([0.95]) == [False]


def test_a_level_is_drafted_only_where_its_children_are_worth_the_step():
    growth = Tree([1, 2, 3], [-1, 0, 0], [0, 1, 1], [0.0, math.log(0.7), math.log(0.02)])
    assert planner({1: 1.0, 64: 3.0}, step=0.05).frontiers([growth], [[1, 2]]) == [[1]]
    assert planner({1: 1.0, 64: 3.0}, step=1.0).frontiers([growth], [[1, 2]]) == [[]]


def test_nodes_of_one_level_pay_for_its_step_together():
    growth = Tree([1, 2, 3], [-1, 0, 0], [0, 1, 1], [0.0, math.log(0.5), math.log(0.5)])
    made = planner({1: 1.0, 64: 1.0}, step=0.4)
    assert made.frontiers([growth], [[1]]) == [[]]
    assert made.frontiers([growth], [[1, 2]]) == [[1, 2]]


def test_the_first_rounds_expect_a_little_more_than_plain_decoding_and_later_ones_what_the_last_brought():
    """Six tokens a round are believed only after some rounds; less than plain decoding is never expected."""
    made = Planner(Prices({1: 1.0, 64: 1.0}), Prices({1: 0.1}), Calibration(frozen=True))
    made.begin(2)
    plain = 2.0
    assert plain < made.rate < 1.5 * plain
    rates = []
    for _ in range(200):
        made.record(2, 1.0, 12, 1.0)
        made.begin(2)
        rates.append(made.rate)
    assert rates == sorted(rates) and rates[0] < 2.5 * plain, "one good round is not yet a rule"
    assert 10 < rates[-1] < 12, "the first belief weighs little beside many rounds"
    for _ in range(200):
        made.record(2, 1.0, 1, 1.0)
        made.begin(2)
    assert made.rate == pytest.approx(plain), "a round without guesses would bring as much"


def test_a_row_more_is_priced_where_the_last_passes_were():
    """Rows are dear from the tenth on: one more costs little behind short passes and much behind long ones."""
    prices = {1: 1.0, 10: 1.0, 64: 55.0}
    made = planner(prices, rate=1.0)
    assert made.row() == pytest.approx(0)
    made.recent.rows = 20.4
    assert made.row() == pytest.approx(1.0)
    many = planner(prices, batch=30, rate=2.0)
    many.recent.rows = 3.0
    assert many.row() == pytest.approx(2.0), "a pass of thirty sequences has thirty rows at least"


# ---- what is learned ----


def test_every_level_that_is_drafted_moves_the_price_of_a_step():
    heard = []

    class Listening(Planner):
        def record_step(self, rows, seconds):
            assert seconds > 0
            heard.append(rows)

    cheap = Listening(Prices({1: 1.0, 64: 1.001}), Prices({1: 1e-6}), Calibration(frozen=True))
    drafter, request = eagle3_with_a_text([[1, 2, 3], [4, 5]])
    trees = drafter.propose([replace(each, planner=cheap) for each in request])
    levels = max(max(tree.depths) for tree in trees)
    assert levels > 1 and len(heard) == levels, "the roots' level and each one below it"
    assert heard[0] == 2 and all(2 <= rows <= 2 * MAX_TREE.top_k for rows in heard[1:])


def test_what_a_level_and_a_walk_say_is_learned_at_the_depth_of_the_guesses():
    counts = Calibration()
    made = Planner(Prices({1: 1.0}), Prices({1: 0.1}), counts)
    tree = Tree.chain(1, [2, 3], [math.log(0.5), math.log(0.5 * 0.9)])
    before = [counts.worth(depth, 1.0, 0.0) for depth in (1, 2, 3)]
    made.record_level(tree, [1], 2)  # the first guess got the second as its child
    after = [counts.worth(depth, 1.0, 0.0) for depth in (1, 2, 3)]
    assert [now > then for now, then in zip(after, before, strict=True)] == [False, True, False]
    made.judge(tree, [0, 1])  # the first came true, the second did not
    assert [sum(counts.tried[depth]) for depth in range(3)] == [1, 1, 0]
    assert [sum(counts.right[depth]) for depth in range(3)] == [1, 0, 0]


def test_a_round_moves_the_price_of_its_pass_by_the_seconds_of_the_pass_alone():
    made = planner({1: 1.0, 8: 2.0})
    made.record(8, 3.0, 4, 300.0)
    assert 2.0 < made.passes.of(8) < 2.1 and made.recent.rows > 1.0
    made.record_step(1, 0.15)
    assert 0.1 < made.steps.of(1) < 0.11


def test_prices_lie_on_lines_between_what_was_timed_and_go_on_beyond():
    prices = Prices({1: 10.0, 4: 13.0, 8: 21.0})
    assert [prices.of(rows) for rows in (0, 1, 2, 4, 6, 8, 12)] == [0, 10, 11, 13, 17, 21, 29]
    assert Prices({2: 5.0}).of(7) == 5.0
    assert Prices({1: 10.0, 4: 4.0}).of(12) == 4.0, "a line that falls is not followed below what was seen"


def test_an_assumed_price_is_soon_the_mean_of_what_passes_took_and_then_moves_like_a_timed_one():
    assumed, timed = Prices({1: 15.0, 16: 25.0}, assumed=True), Prices({1: 15.0, 16: 25.0})
    for prices in (assumed, timed):
        for seconds in [4.0, 5.0] * 5:
            prices.record(1, seconds)
    assert 3.9 < assumed.of(1) < 5.1 < 10 < timed.of(1)
    for _ in range(20):
        assumed.record(1, 4.5)
    before = assumed.of(1)
    assumed.record(1, 1000.0)
    assert assumed.of(1) == pytest.approx(before * 1.5**0.05)


def test_served_passes_move_prices_and_a_stalled_one_hardly():
    prices = Prices({1: 10.0, 8: 20.0})
    prices.record(8, 20000.0)
    assert 20 < prices.of(8) < 20.8 and 10 < prices.of(1) < 10.4
    for _ in range(400):
        prices.record(8, 40.0)
        prices.record(1, 10.0)
    assert prices.of(8) == pytest.approx(40, rel=0.05) and prices.of(1) == pytest.approx(10, rel=0.05)


def test_calibration_learns_what_guesses_are_worth_and_frozen_it_does_not():
    rng, learned, frozen = random.Random(0), Calibration(), Calibration(frozen=True)
    for _ in range(3000):
        drawn = 0 if rng.random() < 0.2 else None
        for each in (learned, frozen):
            each.judge(1, [0.5], drawn)
    assert learned.chance(1, 0.5) == pytest.approx(0.2, abs=0.03)
    assert learned.chance(2, 0.5) == frozen.chance(1, 0.5) == 0.5
    once = Calibration()
    once.judge(1, [0.5], None)
    assert 0.4 < once.chance(1, 0.5) < 0.5, "a single guess says little"
    again = Calibration(learned.as_dict())
    assert again.chance(1, 0.5) == learned.chance(1, 0.5)


@pytest.mark.parametrize("counts", [{}, {"guessed": []}, {"guessed": 3, "right": None}, {**Calibration.nothing(), "children": [[1.0]]}])
def test_damaged_counts_are_left_out(counts):
    assert Calibration(counts).as_dict() == Calibration().as_dict()


# ---- and the text ----

TARGET = tiny_target()


def eagle3_with_a_text(texts: list[list[int]]) -> tuple[Eagle3Drafter, list[TreeRequest]]:
    """A drafter that has read these texts, and the request for a tree behind each."""
    drafter = Eagle3Drafter(*tiny_draft(TARGET))
    drafter.reserve(len(texts), 64)
    for sequence, text in enumerate(texts):
        rows = chain_rows(0, text[:-1], 0)
        drafter.observe(sequence, text, TARGET(rows, TARGET.new_cache(1, len(text)), drafter.wants).features)
    return drafter, [TreeRequest(i, text[-1], len(text) - 1, MAX_TREE, Sampling(), None) for i, text in enumerate(texts)]


DRAFTERS = {
    "eagle3": lambda: Eagle3Drafter(*tiny_draft(TARGET)),
    "lookup": LookupDrafter,
    "merged": lambda: CopyingDrafter(Eagle3Drafter(*tiny_draft(TARGET))),
    "itself": lambda: ModelDrafter(TARGET, TARGET.config.vocab_size),
}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_planned_rounds_write_the_text_of_plain_decoding(name, sampling):
    prompts = [[1, 2, 3, 1, 2, 3, 1], [5], [9, 8, 7, 6, 9, 8]]
    settings = (MAX_TREE, sampling, [3, 4, 5], 40)

    accepted: list[int] = []

    def tokens(*made) -> list[list[int]]:
        *_, texts = Decoder(TARGET, *made).run(prompts, *settings)
        accepted.append(max(length for text in texts for length in text.accepted_lengths))
        return [text.tokens for text in texts]

    cheap = Planner(Prices({1: 1.0, 64: 1.5}), Prices({1: 1e-3}), Calibration())
    dear = Planner(Prices({1: 1.0, 64: 64.0}), Prices({1: 1.0}), Calibration())
    plain = tokens()
    assert tokens(DRAFTERS[name](), "walk", cheap) == plain
    assert tokens(DRAFTERS[name](), "walk", dear) == plain
    assert name != "itself" or accepted[1] > 1, "with cheap rows, guesses that are right were made and taken"


def test_a_draft_that_is_always_right_is_used_deeply_and_one_that_never_is_is_left():
    """Prices are pinned: the clock of a test says nothing."""

    class Pinned(Prices):
        def record(self, rows, seconds):
            pass

    def rounds(drafter) -> float:
        plan = Planner(Pinned({1: 1.0, 64: 1.5}), Pinned({1: 0.05}), Calibration())
        plan.record = lambda rows, pass_seconds, tokens, seconds: Planner.record(plan, rows, 1.0, tokens, 1.3)
        *_, texts = Decoder(TARGET, drafter, "walk", plan).run([[1, 2, 3]], MAX_TREE, Sampling(), [0], 60)
        return texts[0].rounds

    assert rounds(ModelDrafter(TARGET, TARGET.config.vocab_size)) < 20
    assert rounds(Eagle3Drafter(*tiny_draft(TARGET))) > 45


def test_what_children_are_worth_is_the_mean_over_the_latest_nodes_of_what_pays():
    rng, counts = random.Random(5), Calibration()
    latest = [[0.4, 0.1, 0.05, 0.03] for _ in range(RECENT_NODES)]  # what is usual
    for _ in range(3 * RECENT_NODES):
        chances = [rng.random() * 0.5 for _ in range(rng.randint(0, 6))]
        counts.expanded(2, chances)
        latest = [*latest[1:], (sorted(chances, reverse=True) + [0.0] * 4)[:4]]
        parent, row = rng.random(), rng.random() * 0.2
        want = sum(max(0.0, parent * chance - row) for each in latest for chance in each) / RECENT_NODES
        assert counts.worth(2, parent, row) == pytest.approx(want)
    assert counts.worth(2, 0.0, 0.1) == 0


def test_chances_that_grow_with_a_tree_are_those_of_the_whole_tree():
    """What is noted level by level is what one look at all nodes says; a growth that was not followed from its root is looked at anew."""
    rng = random.Random(5)
    made = planner({1: 1.0, 8: 2.0})
    for followed in (True, False):
        made.begin(1)
        growth = Growth(0, 3)
        for level in range(4):
            frontier, before = growth.frontier(), len(growth.tokens)
            scores = [sorted((-rng.expovariate(0.4) for _ in range(3)), reverse=True) for _ in frontier]
            growth.expand(frontier, [[1, 2, 3]] * len(frontier), scores)
            if followed or level > 1:
                made.record_level(growth, frontier, before)
            _, noted = made.grown.get(id(growth), (growth, []))
            assert noted == pytest.approx(made.chances(growth)) if followed else len(noted) < len(growth.tokens)
            made.frontiers([growth], [growth.frontier()])
