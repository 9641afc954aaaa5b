"""Trees small enough to enumerate, and what a verifier commits on them, exactly; and a chi-square without scipy.

Knows plain lists; which walk is measured is handed in.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from eyas import reference

Distribution = Mapping[tuple[int, ...], float]  # what is committed -> its probability


def random_parents(rng: random.Random, size: int) -> list[int]:
    return [-1, *(rng.randrange(node) for node in range(1, size))]


def random_tree(rng: random.Random, size: int, vocab: int) -> tuple[list[int], list[int]]:
    """Tokens and parents, root first, siblings with distinct tokens."""
    tokens, parents = [0], [-1]
    while len(tokens) < size:
        token, parent = rng.randrange(vocab), rng.randrange(len(tokens))
        if token not in [tokens[child] for child in reference.children(parents, parent)]:
            tokens.append(token)
            parents.append(parent)
    return tokens, parents


def depths_of(parents: Sequence[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def random_distribution(rng: random.Random, nodes: int, vocab: int) -> list[list[float]]:
    """One target distribution for each node; some tokens have no chance at all."""
    rows = [[rng.random() * (rng.random() < 0.8) for _ in range(vocab)] for _ in range(nodes)]
    return [[p / (sum(row) or 1) if sum(row) else 1 / vocab for p in row] for row in rows]


def distribution_of_walk(
    tokens: Sequence[int], parents: Sequence[int], distribution: Sequence[Sequence[float]], walk: Callable = reference.walk
) -> Distribution:
    """Every way the target can draw at every node, followed by `walk(tokens, parents, draws)`."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for draws in itertools.product(range(len(distribution[0])), repeat=len(tokens)):
        chance = 1.0
        for node, draw in enumerate(draws):
            chance *= distribution[node][draw]
        if chance:
            path, bonus = walk(tokens, parents, draws)
            total[(*(tokens[node] for node in path[1:]), bonus)] += chance
    return total


def distribution_of_accept_reject(tokens: Sequence[int], parents: Sequence[int], distribution: Sequence[Sequence[float]]) -> Distribution:
    """Every way the children can be accepted or rejected, with the distribution really renormalised."""
    total: dict[tuple[int, ...], float] = defaultdict(float)

    def visit(node: int, committed: tuple[int, ...], chance: float) -> None:
        p = list(distribution[node])
        for child in [k for k, parent in enumerate(parents) if parent == node]:
            x = tokens[child]
            visit(child, (*committed, x), chance * p[x]) if p[x] else None
            chance *= 1 - p[x]
            p[x] = 0.0
            if sum(p) <= 1e-12:  # the child took all there was
                return
            p = [q / sum(p) for q in p]
        for token, q in enumerate(p):
            if q:
                total[(*committed, token)] += chance * q

    visit(0, (), 1.0)
    return total


class Script:
    """Chance that follows a script as far as it goes and then takes the first of what may happen, noting the rest."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.taken, self.probability, self.others = script, [], 1.0, []

    def choose(self, probabilities: Sequence[float]) -> int:
        possible = [outcome for outcome, p in enumerate(probabilities) if p > 0]
        if len(self.taken) < len(self.script):
            outcome = self.script[len(self.taken)]
        else:
            outcome = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(outcome)
        self.probability *= probabilities[outcome]
        return outcome

    def accepts(self, probability: float) -> bool:
        return self.choose([1 - probability, probability]) == 1

    def draws(self, weights: Sequence[float]) -> int:
        weights = [float(weight) for weight in weights]
        return self.choose([weight / sum(weights) for weight in weights])


def every_way(run: Callable[[Script], tuple[int, ...]]) -> Distribution:
    """The exact distribution of what `run` returns: it is run once for every way that chance can turn out."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Script(scripts.pop())
        total[run(chance)] += chance.probability
        scripts += chance.others
    return total


def distance(one: Distribution, other: Distribution) -> float:
    """The largest difference of two distributions at any text."""
    return max(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other})


def surprise(seen: Mapping[object, int], exact: Mapping[object, float]) -> float:
    """Chi-square of counts against probabilities, over the value that one seed in ten thousand exceeds: below 1 is agreement.

    Cells expected fewer than 5 times are pooled; the critical value is Wilson and Hilferty's (within 1% from 2 degrees of freedom up).
    """
    runs = sum(seen.values())
    impossible = [cell for cell in seen if exact.get(cell, 0.0) <= 0]
    assert not impossible, f"drawn, though they have no probability: {impossible[:5]}"
    cells = [(seen.get(cell, 0), runs * chance) for cell, chance in exact.items() if runs * chance >= 5]
    rare = [(seen.get(cell, 0), runs * chance) for cell, chance in exact.items() if 0 < runs * chance < 5]
    if sum(expected for _, expected in rare) >= 5:
        cells.append((sum(count for count, _ in rare), sum(expected for _, expected in rare)))
    assert len(cells) > 1, "too few draws to say anything"
    freedom = len(cells) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((count - expected) ** 2 / expected for count, expected in cells) / critical
