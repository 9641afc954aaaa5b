"""Walk a draft tree along the target's own draws; or follow rules of acceptance that others use, for comparison.

Knows parents, token ids and the laws that children were drawn from; knows nothing of models, caches or temperature: what the target draws
at a node, or its law there, is a function it is handed, and so is chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eyas.config import EyasError
from eyas.decode.tree import Tree

Law = Callable[[int], Tensor]  # a tree's row -> the target's law [V] there


class Accepted(NamedTuple):
    path: list[int]  # tree rows to keep, root first
    bonus: int  # the draw that left the tree


class Chance(Protocol):
    """What a rule of acceptance may leave to chance."""

    def accepts(self, probability: float) -> bool: ...

    def draws(self, weights_V: Tensor) -> int:
        """A token with a chance in proportion to its weight."""


class Uniforms:
    """Chance from numbers in (0, 1)."""

    def __init__(self, numbers: Iterator[float]) -> None:
        self.numbers = numbers

    def accepts(self, probability: float) -> bool:
        return next(self.numbers) < probability

    def draws(self, weights_V: Tensor) -> int:
        cdf_V = weights_V.cumsum(0)
        return min(int(torch.searchsorted(cdf_V, next(self.numbers) * cdf_V[-1], right=True)), len(cdf_V) - 1)


def walk(tree: Tree, draw: Callable[[int], int]) -> Accepted:
    """Draw the target's token at a node, follow the child that matches, stop where none does; the last draw is the bonus token.

    Lossless on any tree, since the draft cannot influence a draw. `draw(row)` is asked only for rows on the path.
    """
    path = [0]
    while True:
        token = draw(path[-1])
        child = tree.children[path[-1]].get(token)
        if child is None:
            return Accepted(path, token)
        path.append(child)


def accept_reject(tree: Tree, law: Law, chance: Chance) -> Accepted:
    """EAGLE's rule with draft probability 1 (SafeAILab): accept a child with the chance p(x), else strike x out and renormalise.

    On trees whose candidates do not depend on `chance` it has exactly the law of `walk`; it accepts less, since the draft cannot know
    what will be drawn.
    """
    path = [0]
    while True:
        left_V = law(path[-1]).clone()
        for token, child in tree.children[path[-1]].items():
            if chance.accepts(float(left_V[token] / left_V.sum())):
                path.append(child)
                break
            left_V[token] = 0
        else:
            return Accepted(path, chance.draws(left_V))


def without_replacement(tree: Tree, law: Law, chance: Chance) -> Accepted:
    """Recursive rejection of children drawn without replacement (Jeon et al. 2024, arXiv 2402.14160; with one child Leviathan et al. 2023):
    accept x with the chance p(x) / q(x), else go on with what p has above q, and with q less x.

    Divides by q, so it is lossless only where the children really were drawn from q, in a shape that did not depend on them.
    """
    if not tree.drawn:
        raise EyasError(
            "verifier without-replacement needs a draft that draws its guesses (eagle3, draft-model) in a tree fixed beforehand: "
            "--tree chain:K or static:CHILDREN; on chosen guesses it would change the text's law"
        )
    path = [0]
    while True:
        p_V, children = law(path[-1]), tree.children[path[-1]]
        q_V = tree.laws[path[-1]].clone() if children else p_V
        for token, child in children.items():
            if chance.accepts(min(1.0, float(p_V[token] / q_V[token]))):
                path.append(child)
                break
            p_V = above(p_V, q_V)
            q_V[token] = 0
            q_V /= q_V.sum()
        else:
            return Accepted(path, chance.draws(p_V))


def above(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What p has more than q, as a law; where rounding leaves nothing, p."""
    left_V = (p_V - q_V).clamp(min=0)
    total = left_V.sum()
    return left_V / total if total > 0 else p_V
