"""Walks a draft along a text that is already written: what it would have guessed in each round, and how much of that was right.

So a draft can be measured on the very text that another engine wrote with it, and the two compared round by round. Knows drafters, features
and tokens; knows nothing of who wrote the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import GREEDY, Sampling, TreeShape
from eyas.decode.drafter import Drafter, TreeRequest
from eyas.decode.sampling import Noise
from eyas.decode.tree import Tree
from eyas.decode.verify import walk
from eyas.model.protocols import TargetModel
from eyas.model.rows import chain_rows


class Replay(NamedTuple):
    """Rounds along a text: after the first token, which prefill draws, each commits `steps[i]` tokens of it."""

    steps: list[int]  # accepted tokens and the bonus; the last round may be cut by the text's end
    trees: list[Tree]


@torch.inference_mode()
def features_of(target: TargetModel, tokens: Sequence[int], taps: Sequence[int], part: int = 256) -> Tensor:
    """The prepared target's features [N, taps * H] at each token of a text, computed in passes of `part` rows."""
    cache, features = target.new_cache(1, len(tokens)), []
    for start in range(0, len(tokens), part):
        rows = chain_rows(0, tokens[start : start + part], start)
        features.append(target(rows, cache, taps, slice(0, 0)).tapped)
        cache.keep(0, range(len(rows.tokens)))
    return torch.cat(features)


@torch.inference_mode()
def replay(
    drafter: Drafter,
    features_N3H: Tensor,
    tokens: Sequence[int],
    prompt_length: int,
    shape: TreeShape,
    sampling: Sampling = GREEDY,
    noise: Noise | None = None,
) -> Replay:
    """Run rounds with trees of `shape` along these tokens, the first `prompt_length` of which are the prompt. Every draw is the text's own
    token. Above temperature 0 the text was drawn with `sampling` and `noise`, which the trees share."""
    tokens = list(tokens)
    drafter.reserve(1, len(tokens) + shape.nodes + (shape.depth + 1) * shape.top_k)
    position = prompt_length  # of the root: the last token committed
    drafter.observe(0, tokens[: position + 1], features_N3H[:position])
    found = Replay([], [])
    while position < len(tokens) - 1:
        shared = (noise.at, noise.seed) if noise else (None, None)
        tree = drafter.propose([TreeRequest(0, tokens[position], position, shape, sampling, shared[0], seed=shared[1])])[0]
        following = [*tokens[position + 1 :], -1]  # no guess is right behind the end
        accepted = walk(tree, lambda row, tree=tree, following=following: following[min(tree.depths[row], len(following) - 1)])
        count = min(len(accepted.path), len(tokens) - 1 - position)
        drafter.observe(0, following[:count], features_N3H[position : position + count])
        found.steps.append(count)
        found.trees.append(tree)
        position += count
    return found
