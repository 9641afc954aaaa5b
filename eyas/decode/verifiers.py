"""Verifiers by name: the walk, and the rules of acceptance that it is compared with, over a sequence's own settings and noise.

Knows a sequence, a tree and the logits of its rows; how a path is found is verify.py's and rules.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from eyas.decode.rules import Chance, Distribution, Uniforms, accept_reject, block, path_to, traversal, typical, without_replacement
from eyas.decode.sampling import CHOICE, distribution, draw, uniforms
from eyas.decode.sequence import Sequence
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted, walk

Verify = Callable[[Tree, Tensor, Sequence], Accepted]  # a tree, the target's logits [nodes, V] at its rows, whose tree it is
Rule = Callable[[Tree, Distribution, Chance], Accepted]


class Verifier(NamedTuple):
    verify: Verify
    shares_noise: bool = False  # the draft may rank its guesses with the noise that the target will draw with
    draws: bool = False  # its trees are drawn by the draft, with noise of its own


def verify_by_walk(tree: Tree, logits_NV: Tensor, sequence: Sequence) -> Accepted:
    """The target's draw at a node of depth d uses the noise of the position it fills (position + d + 1)."""

    def draw_at(row: int) -> int:
        noise = sequence.noise_at(sequence.position + tree.depths[row] + 1)
        return draw(processed(tree, row, logits_NV, sequence), sequence.sampling, noise)

    return walk(tree, draw_at)


def verify_by(rule: Rule) -> Verify:
    """Verification by a rule of acceptance, with uniforms of the sequence's own. Of greedy text only the walk's can be right."""

    def verify(tree: Tree, logits_NV: Tensor, sequence: Sequence) -> Accepted:
        if sequence.sampling.greedy:
            return verify_by_walk(tree, logits_NV, sequence)
        numbers = uniforms(sequence.seed, sequence.position, len(tree) + 1, CHOICE)
        return rule(
            tree,
            lambda row: distribution(processed(tree, row, logits_NV, sequence), sequence.sampling),
            Uniforms(iter(numbers.tolist())),
        )

    return verify


def processed(tree: Tree, row: int, logits_NV: Tensor, sequence: Sequence) -> Tensor:
    """The logits [V] to draw from at a tree's row: penalties and the like depend on the path, so every node has its own."""
    if not sequence.processors:
        return logits_NV[row]
    return sequence.processed(logits_NV[row], (tree.tokens[each] for each in path_to(tree, row)[1:]))


VERIFY: dict[str, Verifier] = {  # by the names of config.VERIFIERS
    "walk": Verifier(verify_by_walk, shares_noise=True),
    "accept-reject": Verifier(verify_by(accept_reject)),
    "without-replacement": Verifier(verify_by(without_replacement), draws=True),
    "traversal": Verifier(verify_by(traversal), draws=True),
    "block": Verifier(verify_by(block), draws=True),
    "typical-lossy": Verifier(verify_by(typical)),
}
