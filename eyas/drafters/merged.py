"""A model's tree and look-up's in one: what followed the same words before joins what the draft guesses, and one pass checks both.

Where a long match says what comes next, the draft is not even asked: its steps would cost more than they add, and what it has not read it
reads when it is next needed. Knows two drafters by what they propose; knows neither's insides.
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

SURE = math.log(0.8)  # chance of look-up's first guess from which on the draft is left alone


class MergedDrafter:
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
        drafted = self.draft.propose([ask(request, tree) for request, tree in zip(requests, found, strict=True)])
        return [both(request, one, other) for request, one, other in zip(requests, drafted, found, strict=True)]

    def found(self, request: TreeRequest) -> Tree:
        """Look-up's guesses cost no steps, so they may go as deep as there are nodes."""
        nodes = request.shape.nodes
        return self.lookup.look_up(request, min(nodes - 1, request.deepest or request.shape.levels))


def both(request: TreeRequest, one: Tree, other: Tree) -> Tree:
    if len(other) == 1:
        return one
    return (other if len(one) == 1 else merge([one, other])).best(request.shape.nodes)


def ask(request: TreeRequest, found: Tree) -> TreeRequest:
    """What the draft is asked for beside look-up's tree: a planner weighs that, else a sure guess is enough."""
    if len(found) == 1:
        return request
    best = max(found.scores[1:])
    if request.planner is None:
        return replace(request, shape=PLAIN) if best >= SURE else request
    return replace(request, covered=math.exp(best))


def drafter(network: DraftNetwork, vocab: DraftVocab) -> MergedDrafter:
    return MergedDrafter(Eagle3Drafter(network, vocab))
