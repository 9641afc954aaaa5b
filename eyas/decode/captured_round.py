"""Which rounds run as one graph, what the host hands to it, and what it learns from it.

The host hands in the text that the draft has not read, a few numbers and how tokens are drawn, and learns the tokens that the round
commits; in between it decides nothing (fixed_round.py). The round in generate.py runs wherever something is asked for that this one does
not know. A graph serves 1, 2, 4, .. sequences. Knows requests, drafters whose part a graph can run, and caches; knows nothing of text, ends
of it, or plans.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from eyas.config import PLAIN, TreeShape
from eyas.decode.captured_growth import ALONE, numbers_of
from eyas.decode.drafter import Drafter, NoDrafter, TreeRequest
from eyas.decode.fixed import Drawn, settled, tree_of
from eyas.decode.fixed_filters import law_of
from eyas.decode.fixed_round import END, Guesses, Round
from eyas.decode.tree import IMPOSSIBLE, Tree
from eyas.decode.unread import Unread
from eyas.decode.verify import Accepted
from eyas.kernels.captured import BATCHES, MOST_ROWS, Seats, fixed_call, window_of
from eyas.model.cache import Cache, KVCache, Slabs
from eyas.model.protocols import TargetModel
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab

MOST_GIVEN = 16  # rows of guesses that are given
DEEP = 15  # levels of them


class Captured(Protocol):
    """A draft's part in rounds that are graphs: captured_growth.py, captured_heads.py, captured_modules.py."""

    @property
    def levels(self) -> int | None: ...  # how deep it can guess; None: as deep as is asked for
    @property
    def vocab(self) -> DraftVocab: ...
    @property
    def again(self) -> int: ...  # the most rows of text that it reads anew in each round
    @property
    def ids_D(self) -> Tensor: ...  # the target's id of each of its candidates

    def form(self, shape: TreeShape, requests: Sequence[TreeRequest], cache: KVCache, /) -> Guesses:
        """The form of a round with trees of this shape over a cache."""
        ...

    def part(self, slabs: Slabs, seats: Seats, /) -> Any:
        """What `Guesses.guess` computes with. It holds no cache, or slabs would never be idle once a graph ran over them."""
        ...


@runtime_checkable
class CapturedDrafter(Drafter, Protocol):
    """A drafter whose part of a round a graph can run."""

    @property
    def captured(self) -> Captured: ...
    @property
    def cache(self) -> KVCache | None: ...  # with its own rows, where it keeps some

    def unread(self, sequence: int, most: int) -> Unread:
        """The last rows of committed text that it has not read, at least one and at most `most`, for a graph that reads them now."""
        ...

    def was_read(self, sequence: int, count: int) -> None:
        """So many of these rows were read: they stand in the cache."""


@runtime_checkable
class GivingDrafter(Drafter, Protocol):
    """A drafter that makes guesses on the host, without a model, which a graph takes as they are: beside those of another drafter, if there
    is one."""

    @property
    def beside(self) -> Drafter | None: ...

    def given(self, request: TreeRequest, levels: int) -> tuple[Tree, bool]:
        """A tree of its guesses, at most so deep; and whether it is so sure of them that the other drafter would add little."""
        ...


class Found(NamedTuple):
    """What a round found for one sequence. Its path's rows are in the caches."""

    accepted: Accepted
    tokens: list[int]  # accepted, the bonus token last
    features: Tensor | None  # [tokens, F] of the path's rows
    logits: Tensor  # [rows, V] the target's; the next round overwrites them
    nodes: Tensor  # what `seen` is made of
    ranks: list[int] | None  # of the path's nodes below the root, by score among the draft's; 0: a given one. None: there was no draft

    def seen(self, root: int) -> tuple[Tree, Accepted, Tensor]:
        """The tree that was read, root included, the path in it and its logits [nodes, V]. A guess made twice is one node."""
        tree, places = tree_of(root, self.nodes)
        path = [places[row] for row in self.accepted.path]
        return tree, Accepted(path, self.accepted.bonus), self.logits[[places.index(place) for place in range(len(tree))]]


def runs(target: TargetModel, cache: Cache, drafter: Drafter, sequences: int) -> bool:
    """Whether graphs may run rounds of so many sequences over these caches. Where nothing is guessed for one sequence, its pass alone is a
    graph."""
    if not (isinstance(target, Target) and pooled(cache) and sequences <= BATCHES[-1]):
        return False
    able = draft_of(drafter) is not None or (isinstance(drafter, GivingDrafter) and drafter.beside is None)
    return able or (isinstance(drafter, NoDrafter) and sequences > 1)


def draft_of(drafter: Drafter | None) -> CapturedDrafter | None:
    """The drafter whose part a graph may run, where there is one."""
    drafter = drafter.beside if isinstance(drafter, GivingDrafter) else drafter
    return drafter if isinstance(drafter, CapturedDrafter) and (drafter.cache is None or pooled(drafter.cache)) else None


def captured_round(
    target: TargetModel, cache: Cache, drafter: Drafter, requests: Sequence[TreeRequest], shape: TreeShape
) -> list[Found] | None:
    """Run a round of these sequences, which are `alike`. None, and nothing done, where a graph cannot run it. `shape`: of the draft's
    guesses, where there is a draft; together with those that are given they are no more than the requests allow."""
    if not (isinstance(target, Target) and pooled(cache)):
        return None
    draft, given, sure = draft_of(drafter), [Tree.root(request.root) for request in requests], False
    seats, most, rows = seats_of(requests, cache), largest(requests).nodes, 0
    if seats.count > 1:
        most = min(most, MOST_ROWS // seats.count)
    if shape.nodes > most:
        return None
    if isinstance(drafter, GivingDrafter):
        if draft is None and drafter.beside is not None:
            return None  # only the plain round can ask it
        found = [drafter.given(request, min(DEEP, request.deepest or request.shape.levels)) for request in requests]
        given, sure = [tree for tree, _ in found], all(its for _, its in found)
    if any(len(tree) > 1 for tree in given):
        rows = min(MOST_GIVEN, max(most // 2, 1) if draft and not sure else most - 1)
        shape = smaller(shape, most - rows)
    if draft and draft.captured.levels is not None:
        shape = shape.cut(draft.captured.levels)
    drafts = draft is not None and not sure and shape.nodes > 1
    if not (rows or drafts or seats.count > 1) or (draft and drafts and shape.top_k > len(draft.captured.vocab)):
        return None
    requests = [replace(request, shape=shape.cut(request.shape.levels)) for request in requests]
    columns = [columns_of(tree, rows) for tree in given]
    return run_round(target, cache, draft if drafts else None, drafter.wants, requests, shape, columns, seats)


def largest(requests: Sequence[TreeRequest]) -> TreeShape:
    """The shape of the trees that are asked for, before they were cut; the empty one where no text has room for a guess."""
    return next((request.whole for request in requests if request.shape.nodes > 1), PLAIN)


def smaller(shape: TreeShape, nodes: int) -> TreeShape:
    """A shape cut to so many nodes; of a static one the first ones."""
    if nodes >= shape.nodes:
        return shape
    if not shape.counts:
        return replace(shape, nodes=nodes)
    before = itertools.accumulate(shape.counts, initial=1)
    return TreeShape.static([min(count, max(nodes - made, 0)) for count, made in zip(shape.counts, before, strict=False)])


def alike(requests: Sequence[TreeRequest]) -> bool:
    """Whether one graph may serve these sequences: trees of one shape, but for how deep they may be, and tokens drawn greedily or in one
    way."""
    shapes = {request.whole for request in requests if request.shape.nodes > 1}
    kinds = {kind for kind in map(Drawn.of, requests) if kind.sampled}
    return all(map(settled, requests)) and len(shapes) <= 1 and len(kinds) <= 1


def seats_of(requests: Sequence[TreeRequest], cache: KVCache) -> Seats:
    """The seats of a round of these sequences, at most as many as there are of BATCHES."""
    if len(requests) == 1:
        return ALONE
    count = min(next(size for size in BATCHES if size >= len(requests)), cache.slots)
    return Seats(count, max(request.sequence for request in requests) >= count)


def run_round(
    target: Target,
    cache: KVCache,
    drafter: CapturedDrafter | None,
    taps: tuple[int, ...],
    requests: Sequence[TreeRequest],
    shape: TreeShape,
    given: Sequence[Tensor],
    seats: Seats,
) -> list[Found] | None:
    """The round with this drafter's guesses, where there is one, and those that are given to each sequence, [4, M]."""
    drafted_in = cache if drafter is None or drafter.cache is None else drafter.cache
    guesses, rows = drafter.captured.form(shape, requests, drafted_in) if drafter else None, given[0].shape[1]
    most = 1 + max(guesses.shape.levels if guesses else 0, min(rows, DEEP))  # a round commits no more
    furthest = max(request.position for request in requests) + (guesses.shape.nodes if guesses else 1) + rows
    form = Round(guesses, rows, most, Drawn.of_all(requests), window_of(furthest, cache.capacity + 1), taps, seats)
    read, drafted = (slabs_of(each, requests, seats) for each in (cache, drafted_in))
    part = drafter.captured.part(drafted, seats) if drafter else None
    key = ("round", form, weakref.ref(read))  # a graph runs over the slabs of both; it lies with the draft's, and does not keep the others
    late = most + (drafter.captured.again if drafter else 0)
    waiting = [drafter.unread(request.sequence, late) if drafter else Unread([request.root], torch.zeros(1, 1)) for request in requests]
    first_slots = seats.count > 1 and not seats.scattered
    homes = [request.sequence if first_slots else place for place, request in enumerate(requests)]  # by sequence, its number in the graph
    inputs = (*laid(form, late, requests, homes, waiting, given), drafter.captured.ids_D if drafter else torch.zeros(0, dtype=torch.int64))
    if (outputs := fixed_call(partial(form.run, target, read, part), key, drafted, *inputs)) is None:
        return None
    told, kept, logits, nodes = outputs
    assert told is not None and logits is not None and nodes is not None
    all_told, found = told.tolist(), list[Found]()
    for home, request, unread in zip(homes, requests, waiting, strict=True):
        path, draws, ranks = all_told[home]
        accepted = path.index(END) if END in path else len(path)
        if drafter:
            drafter.was_read(request.sequence, len(unread.tokens))
        cache.keep(request.sequence, range(accepted))  # their rows lie behind each other already
        features = None if kept is None else kept[home, :accepted].clone()
        its_ranks = ranks[1:accepted] if drafter else None
        found.append(
            Found(Accepted(path[:accepted], draws[accepted - 1]), draws[:accepted], features, logits[home], nodes[home], its_ranks)
        )
    return found


def slabs_of(cache: KVCache, requests: Sequence[TreeRequest], seats: Seats) -> Slabs:
    """The slabs over which these sequences' round is a graph: one's own, or all."""
    return cache.slabs.of(requests[0].sequence) if seats.count == 1 else cache.slabs


def laid(
    form: Round, late: int, requests: Sequence[TreeRequest], homes: Sequence[int], waiting: Sequence[Unread], given: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What a graph is handed for each of its B sequences: numbers [B, 5], laws [B, 4], `late` rows of unread text with their features, and
    given guesses [B, 4, M]. For those that are none zeros, and a law of ones."""
    count = form.seats.count
    numbers, laws = torch.zeros(count, 5, dtype=torch.int64), torch.ones(count, 4, dtype=torch.float64)
    tokens, columns = torch.zeros(count, late, dtype=torch.int64), torch.zeros(count, *given[0].shape, dtype=torch.int64)
    features = waiting[0].features.new_zeros(count, late, waiting[0].features.shape[1])
    for home, request, unread, guesses in zip(homes, requests, waiting, given, strict=True):
        rows = len(unread.tokens)
        numbers[home] = numbers_of(request, rows, request.sequence if count > 1 else 0)
        laws[home], columns[home] = law_of(request.sampling, form.drawn.filters), guesses
        tokens[home, :rows], features[home, :rows] = torch.tensor(unread.tokens), unread.features
    return numbers, laws, tokens, features, columns


def pooled(cache: Cache) -> TypeGuard[KVCache]:
    """Whether graphs may run over a cache: its slabs are from a pool."""
    return isinstance(cache, KVCache) and cache.slabs.pooled


def columns_of(tree: Tree, rows: int) -> Tensor:
    """A tree's best nodes below its root as `grow_fixed` gives them, int64 [4, rows]."""
    tree, found = tree.best(1 + rows), torch.zeros(4, rows, dtype=torch.int64)
    scores = torch.full((rows,), IMPOSSIBLE, dtype=torch.float64)
    scores[: len(tree) - 1] = torch.tensor(tree.scores[1:], dtype=torch.float64)
    found[:3, : len(tree) - 1] = torch.tensor([tree.tokens[1:], tree.parents[1:], tree.depths[1:]])
    found[3] = scores.view(torch.int64)
    return found
