"""Grow the trees of several sequences level by level, with one flat pass of the draft for each level (EAGLE-2, arXiv 2406.16858; EAGLE-3
keeps it).

Knows requests and growth; a drafter hands in what it computes: how to read a level's nodes, and what follows each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError, TreeShape
from eyas.decode.copying import is_sure
from eyas.decode.drafter import TreeRequest
from eyas.decode.score import children, logits_of
from eyas.decode.tree import Growth, StaticGrowth, Tree
from eyas.kernels.step import Ranked
from eyas.model.mask import Sight
from eyas.model.vocab import DraftVocab


class Level(NamedTuple):
    """The F nodes of one sequence's tree that the drafter reads next."""

    request: TreeRequest
    tokens: list[int]
    depths: list[int]
    outputs: Tensor  # [.., ...] the drafter's own outputs, among them those at the nodes' parents
    rows: list[int]  # which of these are the parents'
    sight: Sight  # which of the k tree rows read before, and of these, each node sees (the root is not among them)
    growth: Growth
    nodes: list[int]  # their numbers in `growth`

    @property
    def parents(self) -> Tensor:
        """[F, ...] the drafter's own output at each node's parent"""
        return self.outputs[self.rows]


Begin = Callable[[list[int]], Tensor]  # sequences -> outputs [S, ...] at their roots, from committed text alone
Read = Callable[[list[Level]], Tensor]  # -> outputs [all F, ...], in order
Logits = Callable[[int, Tensor], Tensor | Ranked]  # depth, outputs [R, ...] -> logits [R, D] of what lies one deeper, or these ranked


def grow(requests: Sequence[TreeRequest], begin: Begin, read: Read, logits: Logits, vocab: DraftVocab | None = None) -> list[Tree]:
    """Grow one tree for each request; without `vocab` the draft's ids are the target's. For an empty tree the drafter is not called:
    its committed text waits until the draft is next needed."""
    wanted = worth_drafting([request for request in requests if request.shape.nodes > 1])
    trees = {request.sequence: Tree.root(request.root) for request in requests}
    if wanted:
        grown = grow_levels(wanted, lambda: begin([request.sequence for request in wanted]), read, logits, vocab)
        trees |= {request.sequence: tree for request, tree in zip(wanted, grown, strict=True)}
    return list(trees.values())


def worth_drafting(requests: Sequence[TreeRequest]) -> Sequence[TreeRequest]:
    """The requests for which drafting is worth its time; all of them, where no planner says."""
    if not requests or requests[0].planner is None:
        return requests
    return [
        request
        for request, pays in zip(requests, requests[0].planner.worth_drafting([each.covered for each in requests]), strict=True)
        if pays
    ]


def grow_levels(
    requests: Sequence[TreeRequest], begin: Callable[[], Tensor], read: Read, logits: Logits, vocab: DraftVocab | None
) -> list[Tree]:
    """Expand the best nodes of each newest level, then keep the best of all. `begin` gives [S, ...], the drafter's output at each root."""
    growths = [growth_of(request) for request in requests]
    held = Held(len(requests))
    frontiers, planner = [[0] for _ in requests], requests[0].planner
    for level in range(1 + max(request.shape.depth for request in requests)):
        if level > 0:
            frontiers = [
                growth.frontier() if level <= request.shape.depth else [] for growth, request in zip(growths, requests, strict=True)
            ]
            frontiers = planner.frontiers(growths, frontiers) if planner else frontiers
            if not any(frontiers) or all(map(sure, requests, growths, frontiers)):
                break  # where copying is sure of what follows all nodes, the draft would add little
        started = time.perf_counter()
        outputs = read(held.levels(requests, growths, frontiers)) if level else begin()
        found, first = logits(level, outputs), 0
        held.take(outputs, frontiers)
        for request, growth, frontier in zip(requests, growths, frontiers, strict=True):
            if frontier:
                before, rows = len(growth.tokens), slice(first, first + len(frontier))
                paths = [growth.path(node) for node in frontier] if request.processed or request.copied else []
                mine = found[rows] if isinstance(found, Tensor) else found.of(rows)
                if request.processed:
                    mine = request.processed(paths, logits_of(mine), vocab.columns() if vocab else None)
                laws = [request.copied(path) for path in paths] if request.copied else None
                growth.expand(frontier, *children(request, level, frontier, mine, vocab, laws))
                first = rows.stop
                if planner:
                    planner.record_level(growth, frontier, before)
        if planner:
            planner.record_step(len(outputs), time.perf_counter() - started)
    for request, growth in zip(requests, growths, strict=True):
        copy_on(request, growth)
    return [growth.tree(request.shape.nodes) for growth, request in zip(growths, requests, strict=True)]


def sure(request: TreeRequest, growth: Growth, frontier: Sequence[int]) -> bool:
    """Whether copying is sure of what follows each of these nodes."""
    return request.copied is not None and all(is_sure(request.copied(growth.path(node))) for node in frontier)


def copy_on(request: TreeRequest, growth: Growth) -> None:
    """Grow on without the draft, level by level, where the copy law alone is sure; it costs no pass of the draft."""
    most = min(request.shape.nodes - 1, request.deepest or request.shape.levels)
    while request.copied and growth.newest and growth.depths[growth.newest[0]] < most:
        found = [(node, request.copied(growth.path(node))) for node in growth.frontier()]
        laws = {node: law for node, law in found if law is not None and is_sure(law)}
        if not laws:
            break
        ranked = [sorted(law.following.items(), key=lambda each: -each[1])[: request.shape.top_k] for law in laws.values()]
        scores = [[math.log(law.chance * share) for _, share in each] for law, each in zip(laws.values(), ranked, strict=True)]
        growth.expand(list(laws), [[token for token, _ in each] for each in ranked], scores)


GROWTHS: dict[str, Callable[[int, TreeShape], Growth]] = {}  # by the name at the end of a tree's shape: `60x7x10/mine`


def register(name: str, make: Callable[[int, TreeShape], Growth]) -> None:
    """Add a growth from a plugin. `make` takes the root's token and the shape, which limits nodes, levels and the children of a node.
    Raises `EyasError` if the name is taken or is not one word."""
    if name in GROWTHS:
        raise EyasError(f"growth {name!r} exists already; choose another name")
    if not name.isidentifier():
        raise EyasError(f"growth {name!r} must be one word of letters, digits and _")
    GROWTHS[name] = make


def growth_named(name: str) -> Callable[[int, TreeShape], Growth]:
    if name not in GROWTHS:
        raise EyasError(f"growth {name!r} is unknown; there are {', '.join(GROWTHS) or 'none (register one with --plugin)'}")
    return GROWTHS[name]


def growth_of(request: TreeRequest) -> Growth:
    if request.shape.growth:
        return growth_named(request.shape.growth)(request.root, request.shape)
    fixed = request.shape.fixed
    return StaticGrowth(request.root, fixed) if fixed else Growth(request.root, request.shape.top_k)


class Held:
    """The drafter's outputs at the nodes that were read, level by level, for those whose parents they are."""

    def __init__(self, requests: int) -> None:
        self.outputs: list[Tensor] = []
        self.places: list[dict[int, tuple[int, int]]] = [{} for _ in range(requests)]  # node -> its level, and its row there

    def take(self, outputs: Tensor, frontiers: Sequence[Sequence[int]]) -> None:
        """Hold the outputs [all F, ...] of these nodes."""
        row, level = 0, len(self.outputs)
        self.outputs.append(outputs)
        for places, frontier in zip(self.places, frontiers, strict=True):
            places.update((node, (level, place)) for place, node in enumerate(frontier, row))
            row += len(frontier)

    def levels(self, requests: Sequence[TreeRequest], growths: Sequence[Growth], frontiers: Sequence[list[int]]) -> list[Level]:
        """What the drafter reads of these nodes, for each sequence that has some."""
        return [self.level(*parts) for parts in zip(requests, growths, frontiers, self.places, strict=True) if parts[2]]

    def level(self, request: TreeRequest, growth: Growth, frontier: list[int], places: dict[int, tuple[int, int]]) -> Level:
        tokens, depths = [growth.tokens[node] for node in frontier], [growth.depths[node] for node in frontier]
        of = [places[growth.parents[node]] for node in frontier]
        outputs, rows = self.outputs[-1], [row for _, row in of]
        if any(level != len(self.outputs) - 1 for level, _ in of):  # of a growth that goes back to older nodes
            outputs, rows = torch.stack([self.outputs[level][row] for level, row in of]), list(range(len(of)))
        sight = Sight(growth.seen(frontier), len(growth.expanded) - 1 + len(frontier))
        return Level(request, tokens, depths, outputs, rows, sight, growth, frontier)
