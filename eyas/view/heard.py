"""Hears a drafter while it grows a tree: which nodes it expands, level by level, and what its head says there before any noise.

Knows requests and the logits that growth hands to a request's `processed`; changes neither them nor the tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from eyas.decode.copying import CopyLaw
from eyas.decode.drafter import Drafter, TreeRequest
from eyas.decode.score import log_scores
from eyas.decode.tree import Tree

Path = tuple[int, ...]  # tokens below the root; () is the root


@dataclass
class Heard:
    """What the steps of one tree said."""

    noisy: bool  # whether the tree's scores know the target's noise
    levels: list[list[Path]] = field(default_factory=list)  # the nodes expanded at each level, in the order of the growth
    log_q: dict[Path, Tensor] = field(default_factory=dict)  # [D] the head's own distribution behind each of them, at the temperature
    columns: Tensor | None = None  # the draft's id of each token; None: the target's
    laws: dict[Path, CopyLaw | None] = field(default_factory=dict)  # what followed each of them before, where copying is on

    def own(self, path: Path, token: int) -> float:
        """The head's own probability of a token behind an expanded node, with no noise in it."""
        column = token if self.columns is None else int(self.columns[token])
        return math.exp(float(self.log_q[path][column])) if column >= 0 else 0.0


class Listener:
    """A drafter that proposes what another proposes, and keeps what it said for the last round's first request."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.wants = drafter, drafter.wants
        self.heard: Heard | None = None  # None where nothing was asked yet

    def reserve(self, sequences: int, capacity: int) -> None:
        self.drafter.reserve(sequences, capacity)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.drafter.observe(sequence, tokens, features)

    def forget(self, sequence: int) -> None:
        self.drafter.forget(sequence)

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        first, *others = requests
        self.heard = Heard(noisy=first.noise is not None)
        return self.drafter.propose([listened(first, self.heard), *others])


def listened(request: TreeRequest, heard: Heard) -> TreeRequest:
    """The request, whose levels are noted as they are grown; their logits stay as they are."""

    def processed(paths: Sequence[Sequence[int]], logits_RD: Tensor, columns: Tensor | None) -> Tensor:
        logits_RD = request.processed(paths, logits_RD, columns) if request.processed else logits_RD
        level = [tuple(path) for path in paths]
        heard.levels.append(level)
        heard.laws |= {path: request.copied(path) if request.copied else None for path in level}
        heard.log_q.update(zip(level, log_scores(logits_RD, request.sampling, None), strict=True))
        heard.columns = columns
        return logits_RD

    return replace(request, processed=processed)
