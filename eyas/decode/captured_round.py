"""A whole round of one sequence as one graph: catch up, grow, the target's pass, the walk along its draws, keep.

The host hands in the text that the draft has not read, a few numbers and how tokens are drawn, and learns the tokens that the round
commits; in between it decides nothing. The round in generate.py is the readable twin, and runs wherever something is asked for that this
one does not know. Knows a target of ours, a draft's growth and their caches; knows nothing of text, ends of it, or plans.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from eyas.config import TreeShape
from eyas.decode.captured_growth import CapturedGrowth, Draft, Levels, numbers_of
from eyas.decode.drafter import Drafter, TreeRequest
from eyas.decode.fixed import Drawn, settled, tree_of
from eyas.decode.fixed_filters import Filters, filtered
from eyas.decode.philox import gumbel_on
from eyas.decode.tree import IMPOSSIBLE, Tree
from eyas.decode.unread import Unread
from eyas.decode.verify import Accepted
from eyas.kernels.captured import StaticAttention, fixed_call, window_of
from eyas.model.cache import Cache, KVCache, Slabs
from eyas.model.protocols import TargetModel
from eyas.model.target import Output, Target

END = -1  # behind a path's last row
MOST_GIVEN = 16  # rows of guesses that are given
DEEP = 15  # levels of them


@runtime_checkable
class CapturedDrafter(Drafter, Protocol):
    """A drafter whose part of a round a graph can run."""

    cache: KVCache
    captured: CapturedGrowth

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
    """What a round found. Its path's rows are in the caches."""

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


def runs(target: TargetModel, cache: Cache, drafter: Drafter) -> bool:
    """Whether graphs may run rounds over these caches."""
    able = draft_of(drafter) is not None or (isinstance(drafter, GivingDrafter) and drafter.beside is None)
    return isinstance(target, Target) and pooled(cache) and able


def draft_of(drafter: Drafter | None) -> CapturedDrafter | None:
    """The drafter whose part a graph may run, where there is one."""
    drafter = drafter.beside if isinstance(drafter, GivingDrafter) else drafter
    return drafter if isinstance(drafter, CapturedDrafter) and pooled(drafter.cache) else None


def captured_round(target: TargetModel, cache: Cache, drafter: Drafter, request: TreeRequest, shape: TreeShape) -> Found | None:
    """Run a round. None, and nothing done, where a graph cannot run it. `shape`: of the draft's guesses, where there is a draft; together
    with those that are given they are no more than the request allows."""
    if not (isinstance(target, Target) and pooled(cache) and settled(request)):
        return None
    draft, given, sure, most = draft_of(drafter), Tree.root(request.root), False, request.shape.nodes
    if isinstance(drafter, GivingDrafter):
        if draft is None and drafter.beside is not None:
            return None  # only the plain round can ask it
        given, sure = drafter.given(request, min(DEEP, request.deepest or request.shape.levels))
    rows = 0
    if len(given) > 1:
        rows = min(MOST_GIVEN, max(most // 2, 1) if draft and not sure else most - 1)
        shape = replace(shape, nodes=min(shape.nodes, most - rows))
    drafts = draft is not None and not sure and shape.nodes > 1
    if not (rows or drafts) or (draft and drafts and shape.top_k > len(draft.captured.vocab)):
        return None
    return run_round(target, cache, draft if drafts else None, drafter.wants, replace(request, shape=shape), columns_of(given, rows))


def run_round(
    target: Target, cache: KVCache, drafter: CapturedDrafter | None, taps: tuple[int, ...], request: TreeRequest, given_4M: Tensor
) -> Found | None:
    """The round with this drafter's guesses, where there is one, and those that are given."""
    levels, rows = drafter.captured.form(request, drafter.cache) if drafter else None, given_4M.shape[1]
    most = 1 + max(levels.shape.levels if levels else 0, min(rows, DEEP))  # a round commits no more
    window = window_of(request.position + (levels.shape.nodes if levels else 1) + rows, cache.capacity + 1)
    form = Round(levels, rows, most, Drawn.of(request), window, taps)
    unread = drafter.unread(request.sequence, most) if drafter else Unread([request.root], torch.zeros(1, 1))
    count = len(unread.tokens)
    tokens, features = torch.zeros(most, dtype=torch.int64), unread.features.new_zeros(most, unread.features.shape[1])
    tokens[:count], features[:count] = torch.tensor(unread.tokens), unread.features
    read = cache.slabs.of(request.sequence)
    drafted = drafter.cache.slabs.of(request.sequence) if drafter else read
    draft = Draft(drafter.captured.network, drafted, drafter.captured.group) if drafter else None
    key = ("round", form, weakref.ref(read))  # a graph runs over the slabs of both; it lies with the draft's, and does not keep the others
    inputs = (*numbers_of(request, count), tokens, features, given_4M, drafter.captured.ids_D if drafter else tokens[:0])
    if (outputs := fixed_call(partial(form.run, target, read, draft), key, drafted, *inputs)) is None:
        return None
    told, kept, logits, nodes = outputs
    assert told is not None and logits is not None and nodes is not None
    path, draws, ranks = told.tolist()
    accepted = path.index(END) if END in path else len(path)
    if drafter:
        drafter.was_read(request.sequence, count)
    cache.keep(request.sequence, range(accepted))  # their rows lie behind each other already
    return Found(
        Accepted(path[:accepted], draws[accepted - 1]),
        draws[:accepted],
        None if kept is None else kept[:accepted].clone(),
        logits,
        nodes,
        ranks[1:accepted] if drafter else None,
    )


def pooled(cache: Cache) -> TypeGuard[KVCache]:
    """Whether graphs may run over a cache: its slabs are from a pool."""
    return isinstance(cache, KVCache) and cache.slabs.pooled


class Round(NamedTuple):
    """All that a round's graph depends on besides models and slabs."""

    levels: Levels | None  # of the draft; None: it makes no guesses
    given: int  # rows of guesses that are given
    most: int  # tokens that a round may commit
    drawn: Drawn
    window: int  # keys that the target reads
    taps: tuple[int, ...]

    def run(
        self,
        target: Target,
        slabs: Slabs,
        draft: Draft | None,
        numbers: Tensor,
        law_4: Tensor,
        tokens_C: Tensor,
        features_CF: Tensor,
        given_4M: Tensor,
        ids_D: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The path's rows up to END, what was drawn there and their ranks, int64 [3, C]; their features [C, F]; the target's logits [N, V];
        the nodes as `grow_fixed` gives them, then those given. `numbers`: as `numbers_of` gives them, and how many of the C rows are unread
        text."""
        seed, position, allowed, count = numbers.split(1)
        depths_C = 1 + torch.arange(self.most, device=numbers.device)
        noise_CV = gumbel_on(seed.expand_as(depths_C), position + depths_C, target.config.vocab_size) if self.drawn.noisy else None
        root, nodes = tokens_C[count - 1], given_4M
        if self.levels and draft:
            a_1H = catch_up(draft, self.levels.window, position, count, tokens_C, features_CF)
            noise_LD = None if noise_CV is None else noise_CV[: self.levels.shape.levels, ids_D]
            nodes = beside(self.levels.tree(draft, a_1H, position, allowed, law_4, noise_LD, ids_D), given_4M)
        tokens_N, parents_N, depths_N = (
            torch.cat([first, rest]) for first, rest in zip((root, 0 * root, 0 * root), nodes[:3], strict=True)
        )
        there_N = torch.cat([root >= 0, nodes[3].view(torch.float64) > IMPOSSIBLE])
        ancestors_NN = ancestors(parents_N, self.most)
        out = self.read(target, slabs, position, tokens_N, depths_N, ancestors_NN)
        draws_N = drawn(out.logits, self.drawn.filters, law_4, None if noise_CV is None else noise_CV[depths_N])
        path_N = longest(walked(tokens_N, parents_N, there_N, ancestors_NN, draws_N), depths_N, ancestors_NN)
        path_C = path_N.long().sort(descending=True, stable=True).indices[: self.most]
        keep(slabs, position, path_C)
        ranks_N = torch.cat([0 * root, ranks_of(nodes[3, : nodes.shape[1] - self.given].view(torch.float64)), 0 * given_4M[0]])
        told = torch.stack([path_C.masked_fill(~path_N[path_C], END), draws_N[path_C], ranks_N[path_C]])
        return told, None if out.features is None else out.features[path_C], out.logits, nodes

    def read(self, target: Target, slabs: Slabs, position: Tensor, tokens_N: Tensor, depths_N: Tensor, ancestors_NN: Tensor) -> Output:
        """The target's pass over a tree: each row sees the text and its ancestors."""
        places_N = position + torch.arange(len(tokens_N), device=position.device)
        seen = (torch.arange(self.window, device=position.device) < position).expand(len(tokens_N), -1)
        seen = seen.index_copy(1, places_N, ancestors_NN)
        group = target.config.num_attention_heads // target.config.num_key_value_heads
        return target.read(tokens_N, position + depths_N, StaticAttention(slabs, places_N, seen, group=group), self.taps, None)


def catch_up(draft: Draft, window: int, position: Tensor, count: Tensor, tokens_C: Tensor, features_CF: Tensor) -> Tensor:
    """The draft's output [1, H] at the last of `count` rows of text, which end before `position`. The other rows go to the spare one."""
    order_C, columns_W = (torch.arange(size, device=position.device) for size in (len(tokens_C), window))
    positions_C = position - count + order_C
    places_C = positions_C.masked_fill(order_C >= count, draft.slabs.keys.shape[3] - 1)
    seen = columns_W <= positions_C[:, None]
    g_CH = draft.network.fuse(features_CF.to(draft.network.dtype))
    return draft.read(tokens_C, g_CH, positions_C, places_C, seen)[count - 1]


def ancestors(parents_N: Tensor, levels: int) -> Tensor:
    """Which rows each row has for ancestors, itself included: bool [N, N]. The root is its own parent; no row lies deeper than `levels`."""
    seen, above, reach = torch.eye(len(parents_N), dtype=torch.bool, device=parents_N.device), parents_N, 1
    while reach <= levels:
        seen, above, reach = seen | seen[above], above[above], 2 * reach
    return seen


def drawn(logits_NV: Tensor, filters: Filters, law_4: Tensor, noise_NV: Tensor | None) -> Tensor:
    """The target's draw at each row, as `sampling.draw` draws it: int64 [N]. Without noise: greedy."""
    if noise_NV is None:
        return logits_NV.argmax(-1)
    return (filtered(logits_NV.double() / law_4[:1], filters, law_4) + noise_NV).argmax(-1)


def walked(tokens_N: Tensor, parents_N: Tensor, there_N: Tensor, ancestors_NN: Tensor, draws_N: Tensor) -> Tensor:
    """Which rows a walk may come to, bool [N]: those that are there and were drawn at their parents, as all above them were. Row 0 is the
    root. Where no guess was made twice they are the path of `verify.walk`."""
    right_N = there_N & (tokens_N == draws_N[parents_N])
    right_N[:1].fill_(True)
    return (right_N | ~ancestors_NN).all(1)


def longest(walked_N: Tensor, depths_N: Tensor, ancestors_NN: Tensor) -> Tensor:
    """The rows of the longest path among those that a walk may come to, bool [N]: two of equal tokens, one guessed and one given, go as far
    as their children do."""
    last = (walked_N * (1 + depths_N)).argmax(0, keepdim=True)
    return ancestors_NN.index_select(0, last)[0]


def ranks_of(scores_n: Tensor) -> Tensor:
    """Each score's rank, int64 [n]; 1 for the best."""
    return 1 + scores_n.sort(descending=True, stable=True).indices.argsort()


def columns_of(tree: Tree, rows: int) -> Tensor:
    """A tree's best nodes below its root as `grow_fixed` gives them, int64 [4, rows]."""
    tree, found = tree.best(1 + rows), torch.zeros(4, rows, dtype=torch.int64)
    scores = torch.full((rows,), IMPOSSIBLE, dtype=torch.float64)
    scores[: len(tree) - 1] = torch.tensor(tree.scores[1:], dtype=torch.float64)
    found[:3, : len(tree) - 1] = torch.tensor([tree.tokens[1:], tree.parents[1:], tree.depths[1:]])
    found[3] = scores.view(torch.int64)
    return found


def beside(nodes_4n: Tensor, given_4M: Tensor) -> Tensor:
    """The nodes of two trees with one root, as `grow_fixed` gives them."""
    tokens, parents, depths, bits = given_4M
    moved = torch.stack([tokens, parents + nodes_4n.shape[1] * (parents > 0), depths, bits])
    return torch.cat([nodes_4n, moved], 1)


def keep(slabs: Slabs, position: Tensor, path_C: Tensor) -> None:
    """Move the tree's rows on a path to where the text ends. Behind the path any rows may follow: they are not of the text."""
    places_C = position + torch.arange(len(path_C), device=path_C.device)
    for slab in (slabs.keys[:, 0], slabs.values[:, 0]):
        slab.index_copy_(2, places_C, slab.index_select(2, position + path_C))
