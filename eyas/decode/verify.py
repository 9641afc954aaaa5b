"""Walk a draft tree along the target's own draws, or along EAGLE's accept/reject rule.

Knows parents and token ids; knows nothing of models, caches or temperature: what the target draws at a node is a function it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.decode.tree import Tree


class Accepted(NamedTuple):
    path: list[int]  # tree rows to keep, root first
    bonus: int  # the draw that left the tree


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


def accept_reject(tree: Tree, law: Callable[[int], Tensor], uniforms: Iterator[float]) -> Accepted:
    """EAGLE's rule with draft probability 1 (SafeAILab): accept a child with the chance p(x), else strike x out and renormalise.

    `law(row)` is the target's law [V] there, `uniforms` yields numbers in (0, 1). On trees whose candidates do not depend on the
    uniforms it has exactly the law of `walk`; it accepts less, since the draft cannot know what will be drawn.
    """
    path = [0]
    while True:
        left_V = law(path[-1]).clone()
        for token, child in tree.children[path[-1]].items():
            if next(uniforms) * left_V.sum() < left_V[token]:
                path.append(child)
                break
            left_V[token] = 0
        else:
            cdf_V = left_V.cumsum(0)
            return Accepted(path, min(int(torch.searchsorted(cdf_V, next(uniforms) * cdf_V[-1], right=True)), len(cdf_V) - 1))
