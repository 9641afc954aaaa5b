"""Copying as a part of every method: at every node of a drafter's tree the copy law joins its own, and behind the tree's leaves copying
goes on alone.

Where a long match says what comes next the drafter is not used: its passes would cost more than they add. It reads the text it missed when
it is next needed. Guesses that a verifier needs drawn are left as they are. Knows the copy law, and a drafter by what it proposes; knows
neither's insides.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from eyas.config import PLAIN
from eyas.decode.copying import SURE, CopiedText, CopyLaw
from eyas.decode.drafter import Drafter, TreeRequest, share_prefix
from eyas.decode.tree import Tree, merge

LEAST = 2  # tokens that must match where nothing else guesses
FAINT = math.log(0.02)  # a guess less likely than this is not made


class CopyingDrafter:
    """Another drafter, whose trees hold what followed the same tokens before, too."""

    def __init__(self, draft: Drafter) -> None:
        self.draft, self.wants = draft, draft.wants
        self.texts: dict[int, CopiedText] = {}

    def reserve(self, sequences: int, capacity: int) -> None:
        self.draft.reserve(sequences, capacity)
        self.texts = {sequence: CopiedText() for sequence in range(sequences)}

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.draft.observe(sequence, tokens, features)
        self.texts[sequence].unread += tokens

    def forget(self, sequence: int) -> None:
        self.draft.forget(sequence)
        self.texts[sequence] = CopiedText()

    def share(self, source: int, sequence: int, tokens: Sequence[int]) -> int:
        rows = share_prefix(self.draft, source, sequence, tokens)
        self.texts[sequence] = CopiedText(unread=list(tokens[: rows + 1]))
        return rows

    def law(self, sequence: int, path: Sequence[int]) -> CopyLaw | None:
        """What followed, earlier in a sequence's observed text, the tokens that now end in this path below its root."""
        return self.texts[sequence].law(path)

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        found = [self.found(request) for request in requests]
        drafted = self.draft.propose([self.ask(request, tree) for request, tree in zip(requests, found, strict=True)])
        return [both(request, one, other) for request, one, other in zip(requests, drafted, found, strict=True)]

    @property
    def beside(self) -> Drafter:
        return self.draft

    def given(self, request: TreeRequest, levels: int) -> tuple[Tree, bool]:
        found = copied_tree(self.texts[request.sequence], request, levels)
        return found, len(found) > 1 and max(found.scores[1:]) >= math.log(SURE)

    def found(self, request: TreeRequest) -> Tree:
        """Copying's own tree. Its guesses cost no pass of the draft, so it may be as deep as the shape has nodes."""
        if request.draws is not None:
            return Tree.root(request.root)
        levels = min(request.shape.nodes - 1, request.deepest or request.shape.levels)
        return copied_tree(self.texts[request.sequence], request, levels)

    def ask(self, request: TreeRequest, found: Tree) -> TreeRequest:
        """The request that the draft gets, given copying's tree. A planner is told the chance of its best guess; without a planner the
        draft is asked for nothing where that guess is sure."""
        if request.draws is not None:
            return request
        request = replace(request, copied=self.texts[request.sequence].law)
        if len(found) == 1:
            return request
        best = max(found.scores[1:])
        if request.planner is None:
            return replace(request, shape=PLAIN) if best >= math.log(SURE) else request
        return replace(request, covered=math.exp(best))


def both(request: TreeRequest, one: Tree, other: Tree) -> Tree:
    """The two trees merged and cut to the nodes that the request allows. Alone, the draft's tree `one` stays as it is."""
    if len(other) == 1:
        return one
    return (other if len(one) == 1 else merge([one, other])).best(request.shape.nodes)


def copied_tree(text: CopiedText, request: TreeRequest, levels: int) -> Tree:
    """One tree, up to `levels` deep: the likeliest nodes by the copy law alone, each expanded when its turn comes."""
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
