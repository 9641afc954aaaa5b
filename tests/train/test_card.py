"""A card says no figure that its questions cannot give, and names no picture that was not drawn."""

from __future__ import annotations

from eyas.bench import speed
from eyas.bench.figures import Generation, Round
from eyas.bench.prompts import PromptItem
from eyas.bench.speed import parse_methods, run_bench
from eyas.config import Request
from eyas.train.card import FEWEST, card, shown

TOLD = {
    "target": "tiny",
    "date": "2026-11-27",
    "target_sha256": "0" * 64,
    "hours": 0.05,
    "machine": "one",
    "slots": 1000,
    "steps": 10,
    "settings": {"unroll_steps": 3},
    "data": {"answer_tokens": 1000, "conversations": 10},
    "curve": [{"tau": 1.04, "slots": 1000, "accept_1": 0.1}],
}
FIGURES = {"tree": "60x7x10", "tau": 1.04, "tau_interval": [1.0, 1.1], "speedup": 3.11, "speedup_interval": [3.0, 3.2]}


def told(count: int, pictured: bool = True, **changes) -> str:
    conditions = {"prompt_count": count, "max_new_tokens": 100, "temperature": 0.0, "precision": "bf16", "threads": 1}
    return card(TOLD, {"conditions": conditions, "methods": {"eagle3": FIGURES | changes}}, "eyas new-draft", "eyas generate", pictured)


def test_a_figure_needs_questions_and_stands_beside_its_tree():
    few, enough = told(FEWEST - 1), told(FEWEST)
    assert "3.11" not in few and "Too few to say: 7 questions could be asked" in few
    assert "| eagle3 | 60x7x10 | 1.04 [1.00, 1.10] | 3.11 [3.00, 3.20] |" in enough
    assert shown(FIGURES, "tau", 1) == "too few to say"
    assert "Too few to say: 1 question could" in told(1)


def test_a_disturbed_timing_is_marked():
    assert "3.11 [3.00, 3.20] (disturbed) |" in told(20, disturbed=True)


def test_no_picture_is_named_that_was_not_drawn():
    assert "curve.png" in told(20) and "curve.png" not in told(20, pictured=False)


class Clock:
    """A bench whose first run of plain decoding was held up; `always`: every run."""

    def __init__(self, always: bool) -> None:
        self.always, self.runs = always, 0

    def rows(self, engine, prompts, plans, report, deadline=0.0) -> tuple[list, bool]:
        self.runs += 1
        slow = 3.0 if self.always or self.runs == 1 else 1.0
        plain = Generation(list(range(10)), slow, [Round(1, 0, 0)] * 9)
        return [{"plain": plain, "lookup": Generation(list(range(10)), 1.0, [Round(1, 1, 0)] * 9)} for _ in prompts], True


def test_a_speed_up_that_cannot_be_is_timed_again_and_else_marked(monkeypatch):
    class Silent:
        plans = None

        def generate(self, *words, **settings) -> None:
            return None

    monkeypatch.setattr(speed, "conditions_of", lambda *words: {})
    prompts = [PromptItem(number, "hi") for number in range(4)]
    for always in (False, True):
        clock = Clock(always)
        monkeypatch.setattr(speed, "timed_rows", clock.rows)
        found = run_bench(Silent(), prompts, parse_methods("plain,lookup"), Request(seed=1))["methods"]["lookup"]
        assert clock.runs == 2 and found.get("disturbed", False) is always
        assert round(found["speedup"], 6) == (3.0 if always else 1.0)
