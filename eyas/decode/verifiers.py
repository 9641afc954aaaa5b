"""Verifiers by name: the walk, and the rules of acceptance that it is compared with, over a sequence's own settings and noise.

Knows a sequence, a tree and the logits of its rows; verify.py and rules.py find the path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from eyas.config import EyasError, Sampling, TreeShape
from eyas.decode.philox import CHOICE
from eyas.decode.rules import (
    BLOCK,
    DRAWN,
    Chance,
    Distribution,
    Uniforms,
    accept_reject,
    block,
    path_to,
    traversal,
    typical,
    without_replacement,
)
from eyas.decode.sampling import distribution, draw, uniforms
from eyas.decode.sequence import Sequence
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted, walk

Verify = Callable[[Tree, Tensor, Sequence], Accepted]  # (a tree, the target's logits [nodes, V] at its rows, the sequence) -> the path
Rule = Callable[[Tree, Distribution, Chance], Accepted]


class Verifier(NamedTuple):
    verify: Verify
    shares_noise: bool = False  # the draft may rank its guesses with the noise that the target will draw with
    draws: bool = False  # it needs trees whose nodes the draft draws, with noise of the draft's own


def draws(verifier: str, sampling: Sampling) -> bool:
    """Whether a verifier, if there is one of this name, reads nothing but guesses that the draft drew."""
    return verifier in VERIFY and VERIFY[verifier].draws and not sampling.greedy


def check_shape(verifier: str, shape: TreeShape, sampling: Sampling) -> None:
    """Raise `EyasError` for a verifier that cannot read trees of this shape."""
    if verifier == "block" and shape.nodes > 1 and (shape.top_k > 1 or not shape.fixed):
        raise EyasError(BLOCK)
    if draws(verifier, sampling) and shape.nodes > 1 and not shape.fixed:
        raise EyasError(DRAWN.format(verifier=verifier))


def verify_by_walk(tree: Tree, logits_NV: Tensor, sequence: Sequence) -> Accepted:
    """Verify by the walk. The target's draw at a node of depth d uses the noise of the position it fills, the root's + d + 1."""

    def draw_at(row: int) -> int:
        noise = sequence.noise_at(sequence.position + tree.depths[row] + 1)
        return draw(processed(tree, row, logits_NV, sequence), sequence.sampling, noise)

    return walk(tree, draw_at)


def verify_by(rule: Rule) -> Verify:
    """A verifier from a rule of acceptance, with uniforms from the sequence's own seed. Greedy text is always verified by the walk: only
    the walk's text can be right there."""

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
    """The logits [V] to draw from at a tree's row, after the sequence's processors: these depend on the path (penalties do), so they run
    at every node."""
    if not sequence.processors:
        return logits_NV[row]
    return sequence.processed(logits_NV[row], [tree.tokens[each] for each in path_to(tree, row)[1:]])


VERIFY: dict[str, Verifier] = {  # by the names of config.VERIFIERS
    "walk": Verifier(verify_by_walk, shares_noise=True),
    "accept-reject": Verifier(verify_by(accept_reject)),
    "without-replacement": Verifier(verify_by(without_replacement), draws=True),
    "traversal": Verifier(verify_by(traversal), draws=True),
    "block": Verifier(verify_by(block), draws=True),
    "typical-lossy": Verifier(verify_by(typical)),
}
