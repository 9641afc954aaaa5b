"""Figures from timed generations: acceptance, speed against plain decoding and sameness of text, each with its interval or count.

Knows generations as tokens, seconds and rounds; knows no engine. A number over prompts is a pooled ratio (tau: all tokens committed in
rounds / all rounds), and its interval is the same formula over prompts drawn again with replacement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

GRAM = 16  # a text that repeats so many tokens has begun to loop
RESAMPLES = 1000
COVERAGE = (2.5, 97.5)  # percentiles: 95% lies between

# P prompts, B resamples of them
Statistic = Callable[[np.ndarray], np.ndarray]  # prompt indices [B, P] -> values [B]


class Round(NamedTuple):
    committed: int
    tried: int  # levels of guesses in the tree
    right: int  # levels of guesses that became text


@dataclass(frozen=True)
class Generation:
    """What one method did on one prompt."""

    tokens: list[int]
    seconds: float  # from prompt to last token, reading the prompt included
    rounds: list[Round]

    @property
    def committed(self) -> int:
        return sum(each.committed for each in self.rounds)

    @cached_property
    def loop_start(self) -> int:
        return first_repeat(self.tokens)

    @property
    def rounds_before_loop(self) -> list[Round]:
        ends = 1 + np.cumsum([each.committed for each in self.rounds])  # the first token was prefill's
        return [each for each, end in zip(self.rounds, ends, strict=True) if end <= self.loop_start]


Row = dict[str, Generation]  # one prompt: method as written -> what it did


def figures_of(method: str, rows: Sequence[Row], comparable: bool) -> dict[str, Any]:
    """Everything measured of one method. Against "plain" where rows have it; texts only where they are `comparable`."""
    own = [row[method] for row in rows]
    plain = [row["plain"] for row in rows] if rows and "plain" in rows[0] else None
    places = [first_difference(base.tokens, mine.tokens) for base, mine in zip(plain, own, strict=True)] if plain and comparable else None
    tokens, seconds = sum(len(each.tokens) for each in own), sum(each.seconds for each in own)
    return {
        **acceptance(own),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        **speedup(own, plain),
        **sameness(own, places),
        "prompts": [prompt_line(each, places[index] if places else None, bool(places)) for index, each in enumerate(own)],
    }


def prompt_line(generation: Generation, difference: int | None, compared: bool) -> dict[str, Any]:
    return {
        "tokens": len(generation.tokens),
        "rounds": len(generation.rounds),
        "committed": generation.committed,
        "seconds": generation.seconds,
        "same_as_plain": difference is None if compared else None,
        "first_difference": difference,
    }


# ---- acceptance ----


def acceptance(own: Sequence[Generation]) -> dict[str, Any]:
    rounds = [each for generation in own for each in generation.rounds]
    fresh = [[each.committed for each in generation.rounds_before_loop] for generation in own]
    early, early_interval = estimate(ratio(list(map(sum, fresh)), list(map(len, fresh))), len(own)) if any(fresh) else (None, None)
    point, interval = estimate(ratio([each.committed for each in own], [len(each.rounds) for each in own]), len(own))
    tokens = sum(len(each.tokens) for each in own)
    return {
        "tau": point,
        "tau_interval": interval,
        "tau_before_loop": early,
        "tau_before_loop_interval": early_interval,
        "looped_share": sum(len(each.tokens) - each.loop_start for each in own) / tokens,
        "accepted_lengths": {str(length): count for length, count in sorted(Counter(each.committed for each in rounds).items())},
        "acceptance_by_step": acceptance_by_step(rounds),
    }


def acceptance_by_step(rounds: Sequence[Round]) -> list[float]:
    """P(step k right | the steps before were right), k = 1, 2, ..: among rounds that guessed at step k and had come so far."""
    shares = []
    for step in range(1, 1 + max((each.tried for each in rounds), default=0)):
        reached = [each for each in rounds if each.tried >= step and each.right >= step - 1]
        if not reached:
            break
        shares.append(sum(each.right >= step for each in reached) / len(reached))
    return shares


def first_repeat(tokens: Sequence[int], gram: int = GRAM) -> int:
    """Where the text first repeats `gram` tokens in a row that it had before (overlap counts); its length if it never does."""
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - gram + 1):
        here = tuple(tokens[start : start + gram])
        if here in seen:
            return start
        seen.add(here)
    return len(tokens)


# ---- against plain ----


def speedup(own: Sequence[Generation], plain: Sequence[Generation] | None) -> dict[str, Any]:
    """Plain's seconds per token over this method's; the interval draws prompts in pairs."""
    if plain is None:
        return {"speedup": None, "speedup_interval": None}
    base, mine = (ratio([each.seconds for each in run], [len(each.tokens) for each in run]) for run in (plain, own))
    point, interval = estimate(lambda picks: base(picks) / mine(picks), len(own))
    return {"speedup": point, "speedup_interval": interval}


def sameness(own: Sequence[Generation], places: Sequence[int | None] | None) -> dict[str, Any]:
    """How many texts are plain's; a text is compared up to its first difference, that token included."""
    if places is None:
        return {"same_text": None, "divergences_per_1000_tokens": None}
    compared = sum(len(each.tokens) if place is None else place + 1 for each, place in zip(own, places, strict=True))
    parted = sum(place is not None for place in places)
    return {"same_text": len(places) - parted, "divergences_per_1000_tokens": 1000 * parted / compared}


def first_difference(plain: Sequence[int], own: Sequence[int]) -> int | None:
    """Index of the first token that differs or that only one text has; None for equal texts."""
    for place, (one, other) in enumerate(zip(plain, own, strict=False)):
        if one != other:
            return place
    return None if len(plain) == len(own) else min(len(plain), len(own))


# ---- estimates ----


def ratio(above: Sequence[float], below: Sequence[float]) -> Statistic:
    """The sum of `above` divided by the sum of `below`, over the chosen prompts."""
    above_P, below_P = np.asarray(above, dtype=float), np.asarray(below, dtype=float)

    def pooled(picks_BP: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # 0 / 0: texts that ended with prefill's token have no rounds
            return above_P[picks_BP].sum(-1) / below_P[picks_BP].sum(-1)

    return pooled


def estimate(statistic: Statistic, prompts: int, seed: int = 0) -> tuple[float | None, list[float] | None]:
    """The value over all prompts and its 95% bootstrap interval (of one prompt: the value itself, twice)."""
    point = float(statistic(np.arange(prompts)[None])[0])
    if np.isnan(point):
        return None, None
    resamples_BP = np.random.default_rng(seed).integers(prompts, size=(RESAMPLES, prompts))
    low, high = np.nanpercentile(statistic(resamples_BP), COVERAGE)
    return point, [float(low), float(high)]
