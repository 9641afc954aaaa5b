"""What a drafter is: it watches the text grow and proposes trees. Plain decoding is the drafter that proposes nothing.

Knows sequences by number; the round (generate.py) knows this protocol and no drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from eyas.config import Sampling, TreeShape
from eyas.decode.tree import Tree

if TYPE_CHECKING:
    from eyas.decode.plan.planner import Planner


@dataclass(frozen=True)
class TreeRequest:
    """A tree is wanted for this sequence."""

    sequence: int
    root: int  # its last token
    position: int  # of the root, absolute in the sequence; a node at depth d guesses the token at position + d
    shape: TreeShape
    sampling: Sampling
    noise: Callable[[int], Tensor] | None  # the target's noise [V] at a position, where the verifier draws with it; None when greedy
    deepest: int | None = None  # levels for which the text has room, where that is known; the shape never has more
    planner: Planner | None = None  # asked before each level, where trees are planned
    covered: float = 0.0  # chance that what another drafter guessed first is right
    draws: Callable[[int, int], Tensor] | None = None  # noise [count] of the draft's own for a node's children, where it shall draw them


class Drafter(Protocol):
    wants: tuple[int, ...]  # target layers whose input it reads, or LAST_HIDDEN; () for none

    def reserve(self, sequences: int, capacity: int) -> None:
        """Make room: sequences 0 .. `sequences` - 1 of up to `capacity` tokens come. What was known of earlier ones is forgotten."""

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Committed tokens, and features [n, taps * H] of the rows the target has read since.

        The last committed token is drawn but not read, so features are always one row behind the tokens: after the prompt
        t_0 .. t_{P-1} and the first draw, tokens are t_0 .. t_P and features f_0 .. f_{P-1}.
        """

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        """One tree a request, rooted at its last token; all of them computed together."""
        ...

    def forget(self, sequence: int) -> None:
        """The sequence is finished."""


class NoDrafter:
    """Plain decoding."""

    wants: tuple[int, ...] = ()

    def reserve(self, sequences: int, capacity: int) -> None:
        return None

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        return None

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        return [Tree.root(request.root) for request in requests]

    def forget(self, sequence: int) -> None:
        return None
