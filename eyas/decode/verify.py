"""Walk a draft tree along the target's own draws.

Knows parents and token ids; knows nothing of models, caches or temperature: a function that it is handed says what the target draws at a
node. Other rules of acceptance, for comparison, are in rules.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from eyas.decode.tree import Tree


class Accepted(NamedTuple):
    path: list[int]  # tree rows to keep, root first
    bonus: int  # the draw that left the tree


def walk(tree: Tree, draw: Callable[[int], int]) -> Accepted:
    """Draw the target's token at a node, follow the child that matches, stop where none does; the last draw is the bonus token.

    Lossless on any tree, since the draft cannot influence a draw. `draw(row)` is called only for rows on the path.
    """
    path = [0]
    while True:
        token = draw(path[-1])
        child = tree.children[path[-1]].get(token)
        if child is None:
            return Accepted(path, token)
        path.append(child)
