"""Prompt look-up: guess that what followed the same few tokens earlier in the text follows them again.

Costs nothing to draft and knows nothing of the model; pays where texts repeat themselves or their prompt (summaries, edits, code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree, merge

CHANCES = {4: 0.8, 3: 0.65, 2: 0.45}  # rough chance that a token follows again, by how many tokens matched
OCCURRENCES = 4  # latest places looked at, so a much repeated pattern stays cheap


class LookupDrafter:
    wants: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.places: dict[int, dict[tuple[int, ...], list[int]]] = {}  # sequence -> pattern -> where it ended, latest last

    def reserve(self, sequences: int, capacity: int) -> None:
        for sequence in range(sequences):
            self.forget(sequence)

    def forget(self, sequence: int) -> None:
        self.texts[sequence], self.places[sequence] = [], {}

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        text, places = self.texts[sequence], self.places[sequence]
        for token in tokens:
            text.append(token)
            for length in CHANCES:
                if len(text) >= length:
                    held = places.setdefault(tuple(text[-length:]), [])
                    held.append(len(text))
                    del held[: -OCCURRENCES - 1]

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        return [self.look_up(request) for request in requests]

    def look_up(self, request: TreeRequest) -> Tree:
        """The continuations of the longest pattern that occurred before, the latest first, merged into one tree."""
        text, places = self.texts[request.sequence], self.places[request.sequence]
        levels = request.shape.levels
        for length in CHANCES if levels else ():
            earlier = [end for end in places.get(tuple(text[-length:]), ()) if end < len(text)]
            if earlier:
                trees = []
                for rank, end in enumerate(reversed(earlier[-request.shape.top_k :])):
                    following = text[end : end + levels]
                    step = math.log(CHANCES[length]) * (1 + rank)  # an older occurrence is worth less
                    trees.append(Tree.chain(request.root, following, [step * depth for depth in range(1, len(following) + 1)]))
                return merge(trees).best(request.shape.nodes)
        return Tree.root(request.root)
