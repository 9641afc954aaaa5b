"""Prompt look-up: copying alone. Guess that what followed the text's last tokens earlier follows them again.

It costs nothing to draft, and pays where texts repeat themselves or their prompt (summaries, edits, code). Knows the copy law and trees;
knows nothing of the model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from torch import Tensor

from eyas.decode.copying import CopiedText
from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree
from eyas.model.protocols import TargetModel

LEAST = 2  # tokens that must match where nothing else guesses
FAINT = math.log(0.02)  # a guess less likely than this is not made


class LookupDrafter:
    """Proposes what followed earlier occurrences of the text's last tokens."""

    wants: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.texts: dict[int, CopiedText] = {}

    def reserve(self, sequences: int, capacity: int) -> None:
        for sequence in range(sequences):
            self.forget(sequence)

    def forget(self, sequence: int) -> None:
        self.texts[sequence] = CopiedText()

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.texts[sequence].unread += tokens  # until something is looked up

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        return [self.look_up(request, request.shape.levels) for request in requests]

    def look_up(self, request: TreeRequest, levels: int) -> Tree:
        """One tree, up to `levels` deep: the likeliest nodes by the copy law alone, each expanded when its turn comes."""
        text = self.texts[request.sequence]
        text.read()
        tokens, parents, depths, scores, paths = [request.root], [-1], [0], [0.0], [list[int]()]
        waiting: list[tuple[float, int, int, int]] = []  # -score, order, parent, token

        def expand(row: int) -> None:
            law = text.law(paths[row]) if depths[row] < levels else None
            if law is None or law.matched < LEAST:
                return
            ranked = sorted(law.following.items(), key=lambda each: -each[1])
            for token, share in ranked[: request.shape.top_k]:
                score = scores[row] + math.log(law.chance * share)
                if score >= FAINT:
                    heapq.heappush(waiting, (-score, len(tokens) * request.shape.top_k + len(waiting), row, token))

        expand(0)
        while waiting and len(tokens) < request.shape.nodes:
            score, _, parent, token = heapq.heappop(waiting)
            paths.append([*paths[parent], token])
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            scores.append(-score)
            expand(len(tokens) - 1)
        return Tree(tokens, parents, depths, scores)


def alone(target: TargetModel) -> LookupDrafter:
    """The method's drafter, which needs no draft."""
    return LookupDrafter()
