"""A whole round of one sequence as one graph: catch up, grow, the target's pass, the walk along its draws, keep.

The host hands in the text that the draft has not read, a few numbers and how tokens are drawn, and learns the tokens that the round
commits; in between it decides nothing. The round in generate.py is the readable twin, and runs wherever something is asked for that this
one does not know. Knows a target of ours, a draft's growth and their caches; knows nothing of text, ends of it, or plans.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from eyas.decode.captured_growth import CapturedGrowth, Draft, Levels, numbers_of
from eyas.decode.drafter import Drafter, TreeRequest
from eyas.decode.fixed import grows_fixed, tree_of
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


class Found(NamedTuple):
    """What a round found. Its path's rows are in the caches."""

    accepted: Accepted
    tokens: list[int]  # accepted, the bonus token last
    features: Tensor  # [tokens, F] of the path's rows
    logits: Tensor  # [nodes, V] the target's; the next round overwrites them
    nodes: Tensor  # what `tree` is made of
    ranks: list[int]  # of the path's nodes below the root, by score among all nodes; 1 for the best

    def tree(self, root: int) -> Tree:
        """The tree that was read, root included."""
        return tree_of(root, self.nodes)


def runs(target: TargetModel, cache: Cache, drafter: Drafter) -> bool:
    """Whether graphs may run rounds over these caches."""
    return isinstance(target, Target) and pooled(cache) and isinstance(drafter, CapturedDrafter) and pooled(drafter.cache)


def captured_round(target: TargetModel, cache: Cache, drafter: Drafter, request: TreeRequest) -> Found | None:
    """Run a round. None, and nothing done, where a graph cannot run it."""
    if not (isinstance(target, Target) and pooled(cache) and isinstance(drafter, CapturedDrafter) and pooled(drafter.cache)):
        return None
    growth, drafted = drafter.captured, drafter.cache
    if not grows_fixed(request, len(growth.vocab)):
        return None
    levels = growth.form(request, drafted)
    most = levels.shape.levels + 1  # a round commits no more
    unread = drafter.unread(request.sequence, most)
    count = len(unread.tokens)
    window = window_of(request.position + levels.shape.nodes, cache.capacity + 1)
    form = Round(levels, window, drafter.wants)
    tokens, features = torch.zeros(most, dtype=torch.int64), unread.features.new_zeros(most, unread.features.shape[1])
    tokens[:count], features[:count] = torch.tensor(unread.tokens), unread.features
    draft = Draft(growth.network, drafted.slabs, growth.group)
    # a graph runs over the slabs of both; it lies with the draft's, and knows the target's without keeping them
    key = ("round", form, weakref.ref(cache.slabs))
    given = (*numbers_of(request, count), tokens, features, growth.ids_D)
    if (outputs := fixed_call(partial(form.run, target, cache.slabs, draft), key, drafted.slabs, *given)) is None:
        return None
    told, kept, logits, nodes = outputs
    assert told is not None and kept is not None and logits is not None and nodes is not None
    path, draws, ranks = told.tolist()
    accepted = path.index(END) if END in path else len(path)
    drafter.was_read(request.sequence, count)
    cache.keep(request.sequence, range(accepted))  # their rows lie behind each other already
    return Found(
        Accepted(path[:accepted], draws[accepted - 1]), draws[:accepted], kept[:accepted].clone(), logits, nodes, ranks[1:accepted]
    )


def pooled(cache: Cache) -> TypeGuard[KVCache]:
    """Whether graphs may run over a cache: its slabs are from a pool."""
    return isinstance(cache, KVCache) and cache.slabs.pooled


class Round(NamedTuple):
    """All that a round's graph depends on besides models and slabs."""

    levels: Levels
    window: int  # keys that the target reads
    taps: tuple[int, ...]

    def run(
        self,
        target: Target,
        slabs: Slabs,
        draft: Draft,
        numbers: Tensor,
        law_4: Tensor,
        tokens_C: Tensor,
        features_CF: Tensor,
        ids_D: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The path's rows up to END, what was drawn there and their ranks, int64 [3, C]; their features [C, F]; the target's logits [N, V];
        the nodes as `grow_fixed` gives them. `numbers`: as `numbers_of` gives them, and how many of the C rows are unread text."""
        seed, position, allowed, count = numbers.split(1)
        depths_L = 1 + torch.arange(len(tokens_C), device=numbers.device)
        noise_LV = gumbel_on(seed.expand_as(depths_L), position + depths_L, target.config.vocab_size) if self.levels.drawn.noisy else None
        a_1H = catch_up(draft, self.levels.window, position, count, tokens_C, features_CF)
        noise_LD = None if noise_LV is None else noise_LV[:-1, ids_D]
        tree = self.levels.tree(draft, a_1H, position, allowed, law_4, noise_LD, ids_D)
        root = tokens_C[count - 1]
        tokens_N, parents_N, depths_N = (torch.cat([first, rest]) for first, rest in zip((root, 0 * root, 0 * root), tree[:3], strict=True))
        ancestors_NN = ancestors(parents_N, len(tokens_C))
        out = self.read(target, slabs, position, tokens_N, depths_N, ancestors_NN)
        draws_N = drawn(out.logits, self.levels.drawn.filters, law_4, None if noise_LV is None else noise_LV[depths_N])
        there_N = torch.cat([root >= 0, tree[3].view(torch.float64) > IMPOSSIBLE])
        path_N = walked(tokens_N, parents_N, there_N, ancestors_NN, draws_N)
        path_C = path_N.long().sort(descending=True, stable=True).indices[: len(tokens_C)]
        keep(slabs, position, path_C)
        assert out.features is not None
        order_n = tree[3].view(torch.float64).sort(descending=True, stable=True).indices
        ranks_N = torch.cat([0 * root, 1 + order_n.argsort()])
        told = torch.stack([path_C.masked_fill(~path_N[path_C], END), draws_N[path_C], ranks_N[path_C]])
        return told, out.features[path_C], out.logits, tree

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
    """Which rows are on the path of `verify.walk`, bool [N]: those that are there and were drawn at their parents, as all above them were.
    Row 0 is the root."""
    right_N = there_N & (tokens_N == draws_N[parents_N])
    right_N[:1].fill_(True)
    return (right_N | ~ancestors_NN).all(1)


def keep(slabs: Slabs, position: Tensor, path_C: Tensor) -> None:
    """Move the tree's rows on a path to where the text ends. Behind the path any rows may follow: they are not of the text."""
    places_C = position + torch.arange(len(path_C), device=path_C.device)
    for slab in (slabs.keys[:, 0], slabs.values[:, 0]):
        slab.index_copy_(2, places_C, slab.index_select(2, position + path_C))
