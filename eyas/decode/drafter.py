"""The drafter protocol: a drafter watches the text grow and proposes trees. Plain decoding is the drafter that proposes nothing.

Knows sequences by their slot; the round (generate.py) knows this protocol and no drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from eyas.config import Sampling, TreeShape
from eyas.decode.copying import CopyLaw
from eyas.decode.tree import Tree

if TYPE_CHECKING:
    from eyas.decode.plan.planner import Planner


@dataclass(frozen=True)
class TreeRequest:
    """What the round asks of a drafter: one tree for one sequence."""

    sequence: int  # its slot: the number that `Drafter.observe` and `forget` get too
    root: int  # token id of the root, the last committed token
    position: int  # of the root, absolute in the sequence; a node at depth d guesses the token at position + d
    shape: TreeShape  # the largest tree that is wanted; 1 node: nothing is to be guessed
    sampling: Sampling  # how the target's token will be drawn
    noise: Callable[[int], Tensor] | None  # position -> the noise [V] the target will draw with; None: greedy, or the verifier shares none
    deepest: int | None = None  # levels for which the text has room, where that is known; the shape never has more
    planner: Planner | None = None  # asked before each level, where trees are planned
    covered: float = 0.0  # chance that another drafter's guess at the root's child is right
    # (R paths of tokens below the root, logits [R, D] after them, each token's column or None) -> logits as the target's will be processed
    processed: Callable[[Sequence[Sequence[int]], Tensor, Tensor | None], Tensor] | None = None
    copied: Callable[[Sequence[int]], CopyLaw | None] | None = None  # path below the root -> what followed this context before
    seed: int | None = None  # what `noise` is made from, as sampling.py makes it, where that is known
    uncut: TreeShape | None = None  # the shape of which `shape` is as much as the text has room for; None: all of it
    draws: Callable[[int, int], Tensor] | None = None  # (node, count) -> noise [count] to draw children with; None: take the likeliest

    @property
    def whole(self) -> TreeShape:
        return self.uncut or self.shape


class Drafter(Protocol):
    """Guesses what follows the text of each sequence, as a tree. The decoder calls `reserve` once; then for each sequence `observe` while
    its prompt is read and after each round, `propose` before each round that guesses, and `forget` at its end.

    Under the walk a wrong guess costs time and never changes the text. A drafter gets nothing of the target but the features in `wants`.
    """

    wants: tuple[int, ...]  # numbers of the target layers whose input it reads, or LAST_HIDDEN; () for none

    def reserve(self, sequences: int, capacity: int) -> None:
        """Make room for slots 0 .. `sequences` - 1, each for a sequence of up to `capacity` rows, its tree's rows included. Forget what
        the slots held before."""

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Take in newly committed tokens, and the features [n, taps * H] of the rows that the target has read since the last call.

        Features come in the target's number format, on its device: the inputs of the layers in `wants`, side by side in layer order, or
        the last hidden state [n, H] for LAST_HIDDEN. They are None where `wants` is ().

        The last committed token is drawn but not read, so features are always one row behind the tokens: after the prompt
        t_0 .. t_{P-1} and the first draw, tokens are t_0 .. t_P and features f_0 .. f_{P-1}. A long prompt comes in several calls.
        """

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        """Return one tree for each request, in their order, rooted at the request's root. `Tree.root(root)` guesses nothing."""
        ...

    def forget(self, sequence: int) -> None:
        """Drop what is known of this sequence: it is finished, and its slot is free for another."""


def share_prefix(drafter: Drafter, source: int, sequence: int, tokens: Sequence[int]) -> int:
    """Let slot `sequence` begin with what slot `source` (which may be itself) has read of tokens t_0 .. t_r; returns for how many rows,
    at most r: `observe` goes on behind token t_rows. A drafter that reads features says with a method `share` of its own how it does that;
    one that has none takes no row."""
    if (share := getattr(drafter, "share", None)) is not None:
        return share(source, sequence, tokens)
    drafter.forget(sequence)
    if drafter.wants:
        return 0
    drafter.observe(sequence, tokens, None)
    return len(tokens) - 1


class NoDrafter:
    """Plain decoding: guesses nothing."""

    wants: tuple[int, ...] = ()

    def reserve(self, sequences: int, capacity: int) -> None:
        return None

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        return None

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        return [Tree.root(request.root) for request in requests]

    def forget(self, sequence: int) -> None:
        return None
