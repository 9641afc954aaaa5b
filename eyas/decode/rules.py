"""Rules of acceptance other than the walk, for comparison: EAGLE's, rejection without replacement, traversal, block, typical.

Knows parents, token ids and the distributions that children were drawn from; knows nothing of models, caches or temperature: the target's
probabilities at a node come from a function that it is handed, and so does chance. The walk itself is in verify.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from eyas.config import EyasError
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted

TYPICAL, TYPICAL_SHARE = 0.09, 0.3  # Medusa's: a guess is typical above the smaller of TYPICAL and TYPICAL_SHARE * exp(-entropy)

Distribution = Callable[[int], Tensor]  # a tree's row -> the target's probabilities [V] there

# why a rule cannot read a tree
BLOCK = "verifier block reads chains: --tree chain:K; for trees there is verifier traversal"
DRAWN = (
    "verifier {verifier} needs a draft that draws its guesses (not look-up) in a tree fixed beforehand: "
    "--tree chain:K or static:CHILDREN; on chosen guesses it would change the text's distribution"
)


class Chance(Protocol):
    """The random decisions of a rule of acceptance."""

    def accepts(self, probability: float) -> bool: ...  # true with this probability

    def draws(self, weights_V: Tensor) -> int:
        """Draw a token, each with a chance in proportion to its weight."""
        ...


class Uniforms:
    """Decides from uniform numbers in (0, 1), one for each decision."""

    def __init__(self, numbers: Iterator[float]) -> None:
        self.numbers = numbers

    def accepts(self, probability: float) -> bool:
        return next(self.numbers) < probability

    def draws(self, weights_V: Tensor) -> int:
        cdf_V = weights_V.cumsum(0)
        return min(int(torch.searchsorted(cdf_V, next(self.numbers) * cdf_V[-1], right=True)), len(cdf_V) - 1)


def accept_reject(tree: Tree, target: Distribution, chance: Chance) -> Accepted:
    """EAGLE's rule with draft probability 1 (SafeAILab): accept a child x with the chance p(x), else strike x out of p and renormalise p.

    On trees whose candidates do not depend on `chance` its text has exactly the distribution of the walk's. It accepts less, since the
    draft cannot know what will be drawn.
    """
    path = [0]
    while True:
        left_V = target(path[-1]).clone()
        for token, child in tree.children[path[-1]].items():
            if chance.accepts(float(left_V[token] / left_V.sum())):
                path.append(child)
                break
            left_V[token] = 0
        else:
            return Accepted(path, chance.draws(left_V))


def without_replacement(tree: Tree, target: Distribution, chance: Chance) -> Accepted:
    """Recursive rejection of children drawn without replacement (Jeon et al. 2024, arXiv 2402.14160; with one child Leviathan et al. 2023):
    accept a child x with the chance p(x) / q(x); else p becomes what it has above q, q loses x, and the next child is tried.

    Divides by q, so it is lossless only where the children really were drawn from q, in a shape that did not depend on them.
    """
    check_drawn(tree, "without-replacement")
    path = [0]
    while True:
        p_V, children = target(path[-1]), tree.children[path[-1]]
        q_V = drawn_from(tree, path[-1]).clone() if children else p_V
        for token, child in children.items():
            if chance.accepts(min(1.0, float(p_V[token] / q_V[token]))):
                path.append(child)
                break
            p_V = above(p_V, q_V)
            q_V[token] = 0
            q_V /= q_V.sum()
        else:
            return Accepted(path, chance.draws(p_V))


def block(tree: Tree, target: Distribution, chance: Chance) -> Accepted:
    """Block verification (Sun et al. 2024, arXiv 2403.10444): no lossless verifier accepts more of one drawn chain. It is `traversal` on a
    chain; raises `EyasError` on a tree that branches."""
    if any(len(children) > 1 for children in tree.children):
        raise EyasError(BLOCK)
    return traversal(tree, target, chance)


def traversal(tree: Tree, target: Distribution, chance: Chance) -> Accepted:
    """Traversal verification (Weng et al. 2025, arXiv 2505.12398): whole paths are accepted, from the first leaf towards the root, so a
    token too likely under the draft may be made good by later ones.

    A leaf is accepted with a chance equal to its path's joint ratio p / q. A rejected leaf is struck out, its parent's distribution
    becomes what p had there above q, and the parent, or the first leaf below its next child, is tried.
    """
    check_drawn(tree, "traversal")
    p = {0: target(0)}
    q = {row: drawn_from(tree, row).clone() for row in range(len(tree)) if tree.children[row]}
    left = {row: list(tree.children[row].values()) for row in range(len(tree))}
    reached = {0: 1.0}
    row = 0
    while True:
        while left[row]:  # down to the first leaf
            child = left[row][0]
            token = tree.tokens[child]
            reached[child] = min(1.0, reached[row] * float(p[row][token] / q[row][token]))
            p[child] = target(child)
            row = child
        if row == 0 or chance.accepts(reached[row]):
            return Accepted(path_to(tree, row), chance.draws(p[row]))
        parent, token = tree.parents[row], tree.tokens[row]
        left[parent].pop(0)
        surplus_V = (reached[parent] * p[parent] - q[parent]).clamp(min=0)
        total = float(surplus_V.sum())
        p[parent] = surplus_V / total if total > 0 else p[parent]
        reached[parent] = ratio(total, total + 1 - reached[parent])
        q[parent][token] = 0
        q[parent] /= q[parent].sum() if left[parent] else 1
        row = parent


def path_to(tree: Tree, row: int) -> list[int]:
    """The rows from the root down to `row`."""
    path = [row]
    while path[-1]:
        path.append(tree.parents[path[-1]])
    return path[::-1]


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 where the whole is 0."""
    return part / whole if whole > 0 else 0.0


def typical(tree: Tree, target: Distribution, chance: Chance) -> Accepted:
    """Typical acceptance (Medusa, arXiv 2401.10774, 2.3.1), not lossless: accept a guess that the target finds likely enough, where less
    is enough the less sure the target is; keep the longest path of accepted guesses."""
    good, p = {0}, {0: target(0)}
    for row in range(1, len(tree)):
        parent = tree.parents[row]
        if parent in good:
            if parent not in p:
                p[parent] = target(parent)
            p_V = p[parent]
            entropy = float(torch.special.entr(p_V).sum())
            if float(p_V[tree.tokens[row]]) > min(TYPICAL, TYPICAL_SHARE * math.exp(-entropy)):
                good.add(row)
    best = max(good, key=lambda row: (tree.depths[row], -row))
    return Accepted(path_to(tree, best), chance.draws(target(best)))


def check_drawn(tree: Tree, verifier: str) -> None:
    if not tree.drawn:
        raise EyasError(DRAWN.format(verifier=verifier))


def drawn_from(tree: Tree, row: int) -> Tensor:
    """The draft's probabilities [V] that the row's children were drawn from."""
    q_V = tree.distributions[row] if tree.distributions else None
    assert q_V is not None, "a drawn tree says what its children were drawn from"
    return q_V


def above(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What p has above q, renormalised; p itself where rounding leaves nothing."""
    left_V = (p_V - q_V).clamp(min=0)
    total = left_V.sum()
    return left_V / total if total > 0 else p_V
