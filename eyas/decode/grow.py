"""Grow the trees of several sequences level by level, with one flat pass of the draft for each level (EAGLE-2, arXiv 2406.16858; EAGLE-3
keeps it).

Knows requests and growth; a drafter hands in what it computes: how to read a level's nodes, and what follows each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import EyasError, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.score import children
from eyas.decode.tree import Growth, StaticGrowth, Tree
from eyas.model.vocab import DraftVocab


class Level(NamedTuple):
    """The F nodes of one sequence's tree that the drafter reads next."""

    request: TreeRequest
    tokens: list[int]
    depths: list[int]
    parents: Tensor  # [F, ...] the drafter's own output at each node's parent
    sight: Tensor  # bool [F, k + F]: which of the k tree rows read before, and of these, each node sees (the root is not among them)
    growth: Growth
    nodes: list[int]  # their numbers in `growth`


Begin = Callable[[list[int]], Tensor]  # sequences -> outputs [S, ...] at their roots, from committed text alone
Read = Callable[[list[Level]], Tensor]  # -> outputs [all F, ...], in order
Logits = Callable[[int, Tensor], Tensor]  # depth, outputs [R, ...] -> logits [R, D] of what lies one deeper


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
    held: list[dict[int, Tensor]] = [{} for _ in requests]  # node -> the drafter's output there
    frontiers, planner = [[0] for _ in requests], requests[0].planner
    for level in range(1 + max(request.shape.depth for request in requests)):
        if level > 0:
            frontiers = [
                growth.frontier() if level <= request.shape.depth else [] for growth, request in zip(growths, requests, strict=True)
            ]
            frontiers = planner.frontiers(growths, frontiers) if planner else frontiers
            if not any(frontiers):
                break
        started = time.perf_counter()
        outputs = (
            read([level_of(*parts) for parts in zip(requests, growths, frontiers, held, strict=True) if parts[2]]) if level else begin()
        )
        counts = [len(frontier) for frontier in frontiers]
        parts = zip(requests, growths, frontiers, logits(level, outputs).split(counts), outputs.split(counts), held, strict=True)
        for request, growth, frontier, logits_RD, rows, kept in parts:
            if frontier:
                before = len(growth.tokens)
                paths = [growth.path(node) for node in frontier] if request.processed or request.copied else []
                if request.processed:
                    logits_RD = request.processed(paths, logits_RD, vocab.columns() if vocab else None)
                laws = [request.copied(path) for path in paths] if request.copied else None
                growth.expand(frontier, *children(request, level, frontier, logits_RD, vocab, laws))
                kept.update(zip(frontier, rows, strict=True))
                if planner:
                    planner.record_level(growth, frontier, before)
        if planner:
            planner.record_step(len(outputs), time.perf_counter() - started)
    return [growth.tree(request.shape.nodes) for growth, request in zip(growths, requests, strict=True)]


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


def level_of(request: TreeRequest, growth: Growth, frontier: list[int], held: dict[int, Tensor]) -> Level:
    return Level(
        request,
        [growth.tokens[node] for node in frontier],
        [growth.depths[node] for node in frontier],
        torch.stack([held[growth.parents[node]] for node in frontier]),
        growth.sight(frontier)[:, 1:],
        growth,
        frontier,
    )
