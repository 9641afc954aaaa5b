"""A drafter that copies as well: at every node of its tree the copy law joins its own, and behind the tree's leaves copying goes on alone.

Where a long match says what comes next the drafter is not used: its passes would cost more than they add. It reads the text it missed when
it is next needed. Knows the copy law, and a drafter by what it proposes; knows neither's insides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from eyas.config import PLAIN
from eyas.decode.drafter import Drafter, TreeRequest
from eyas.decode.tree import Tree, merge
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.drafters.lookup import LookupDrafter
from eyas.model.draft import DraftNetwork
from eyas.model.vocab import DraftVocab

SURE = math.log(0.8)  # where copying's best guess has this chance or more, and no planner weighs it, the draft is not used


class CopyingDrafter:
    """Another drafter, whose trees hold what followed the same tokens before, too."""

    def __init__(self, draft: Drafter) -> None:
        self.draft, self.lookup = draft, LookupDrafter()
        self.wants = draft.wants

    def reserve(self, sequences: int, capacity: int) -> None:
        self.draft.reserve(sequences, capacity)
        self.lookup.reserve(sequences, capacity)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.draft.observe(sequence, tokens, features)
        self.lookup.observe(sequence, tokens, None)

    def forget(self, sequence: int) -> None:
        self.draft.forget(sequence)
        self.lookup.forget(sequence)

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        found = [self.found(request) for request in requests]
        asked = [replace(request, copied=self.lookup.texts[request.sequence].law) for request in requests]
        drafted = self.draft.propose([ask(request, tree) for request, tree in zip(asked, found, strict=True)])
        return [both(request, one, other) for request, one, other in zip(requests, drafted, found, strict=True)]

    def found(self, request: TreeRequest) -> Tree:
        """Copying's own tree. Its guesses cost no pass of the draft, so it may be as deep as the shape has nodes."""
        nodes = request.shape.nodes
        return self.lookup.look_up(request, min(nodes - 1, request.deepest or request.shape.levels))


def both(request: TreeRequest, one: Tree, other: Tree) -> Tree:
    """The two trees merged and cut to the nodes that the request allows. Alone, the draft's tree `one` stays as it is."""
    if len(other) == 1:
        return one
    return (other if len(one) == 1 else merge([one, other])).best(request.shape.nodes)


def ask(request: TreeRequest, found: Tree) -> TreeRequest:
    """The request that the draft gets, given copying's tree. A planner is told the chance of its best guess; without a planner the draft is
    asked for nothing where that guess is sure."""
    if len(found) == 1:
        return request
    best = max(found.scores[1:])
    if request.planner is None:
        return replace(request, shape=PLAIN) if best >= SURE else request
    return replace(request, covered=math.exp(best))


def drafter(network: DraftNetwork, vocab: DraftVocab) -> CopyingDrafter:
    return CopyingDrafter(Eagle3Drafter(network, vocab))
