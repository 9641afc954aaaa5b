"""Prompt look-up: copying alone. Guess that what followed the text's last tokens earlier follows them again.

It costs nothing to draft, and pays where texts repeat themselves or their prompt (summaries, edits, code). Knows the copied tree; knows
nothing of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eyas.decode.copying import CopiedText
from eyas.decode.drafter import TreeRequest
from eyas.decode.tree import Tree
from eyas.drafters.copying import copied_tree
from eyas.model.protocols import TargetModel


class LookupDrafter:
    """Proposes what followed earlier occurrences of the text's last tokens."""

    wants: tuple[int, ...] = ()
    beside = None

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
        return [copied_tree(self.texts[request.sequence], request, request.shape.levels) for request in requests]

    def given(self, request: TreeRequest, levels: int) -> tuple[Tree, bool]:
        return copied_tree(self.texts[request.sequence], request, min(levels, request.shape.levels)), False


def alone(target: TargetModel) -> LookupDrafter:
    """The method's drafter, which needs no draft."""
    return LookupDrafter()
