"""A grammar over the answer: what it forbids is not drawn, what it forbids is not guessed, and what it forces is guessed.

The walk asks at the nodes it reaches, so the text is plain decoding's under the same grammar, whatever the tree was. Knows a matcher that
steps forward and back over tokens, and trees; knows nothing of how a grammar is written, or of requests.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eyas.decode.processors import Processor, placed
from eyas.decode.tree import Tree

FORCED = math.log(0.95)  # score of a forced token given its parent: the target may tell the same text in other tokens


class Matcher(Protocol):
    """Where a text stands in a grammar; llguidance's LLMatcher is one."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        """Step over tokens as far as they are allowed; returns over how many."""
        ...

    def rollback(self, num_tokens: int) -> bool: ...

    def compute_bitmask(self) -> bytes:
        """Which tokens are allowed next, a bit each, the lowest first; an end-of-turn id where the text may end."""
        ...

    def compute_ff_tokens(self) -> list[int]:
        """Tokens of the text that the grammar forces next; it may be told in other tokens too."""
        ...

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...

    def deep_copy(self) -> Matcher: ...


class Grammar(Processor):
    """Rules out what one sequence's grammar forbids behind its text and a path. `ends`: ids that end the answer.

    What other processors have ruled out counts less than the grammar: where nothing else is left, all that it allows is equally likely.
    A matcher that gives up where the target draws ends the text; `failed` then says why. One that gives up on a guess takes that guess out
    and nothing else, since plain decoding would not have asked.
    """

    def __init__(self, matcher: Matcher, prompt_length: int, ends: Collection[int]) -> None:
        self.settled, self.matcher = matcher, matcher.deep_copy()  # one follows the text alone, the other paths behind it
        self.ends = sorted(ends)
        self.known = prompt_length  # tokens of the text that the matchers have stepped over, the prompt's included
        self.path: list[int] = []  # tokens that `matcher` has stepped over behind these
        self.masks: dict[tuple[int, ...], Tensor | None] = {}  # by path: which tokens [V] are allowed; None: the path itself is not
        self.given_up: dict[tuple[int, ...], str] = {}  # by path: why the matcher gave up there
        self.failed: str | None = None
        self.draws = True  # whether the target draws at the rows that are asked for; see `aside`

    # ---- where a text stands ----

    def move(self, text: list[int], path: Sequence[int]) -> bool:
        """Step to the end of a path behind the text; False where the grammar forbids it, or has failed."""
        if len(text) > self.known:
            if self.settled.try_consume_tokens(text[self.known :]) < len(text) - self.known:
                self.fail(self.settled.get_error() or "the text has left its grammar")
            self.known = len(text)
            self.masks.clear()
            self.given_up.clear()
            self.begin_again()
        return self.failed is None and self.step_to(path)

    def step_to(self, path: Sequence[int]) -> bool:
        common = 0
        while common < min(len(path), len(self.path)) and path[common] == self.path[common]:
            common += 1
        if len(self.path) > common:
            self.matcher.rollback(len(self.path) - common)
        ahead = list(path[common:])
        taken = self.matcher.try_consume_tokens(ahead) if ahead else 0
        self.path = [*path[: common + taken]]
        return taken == len(ahead) and not self.gave_up(path)

    def gave_up(self, path: Sequence[int]) -> bool:
        """Whether the matcher has just given up on a path; another then goes on from the text."""
        if not self.matcher.is_error():
            return False
        self.given_up[tuple(path)] = self.matcher.get_error()
        self.begin_again()
        return True

    def begin_again(self) -> None:
        self.matcher, self.path = self.settled.deep_copy(), []

    def fail(self, why: str) -> None:
        self.failed = self.failed or " ".join(why.split())

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.draws = False
        try:
            yield
        finally:
            self.draws = True

    def allowed(self, text: list[int], path: Sequence[int]) -> Tensor | None:
        """Which tokens [V] may follow; None: no text of this grammar has this path."""
        if len(text) > self.known:
            self.move(text, ())
        if tuple(path) not in self.masks:
            self.masks[tuple(path)] = self.mask(path) if self.move(text, path) else None
        return self.masks[tuple(path)]

    def mask(self, path: Sequence[int]) -> Tensor | None:
        bits = self.matcher.compute_bitmask()
        if self.gave_up(path):
            return None
        return torch.from_numpy(np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")).bool()

    # ---- what is drawn, and what is guessed ----

    def rows(self, text: list[int], paths: Sequence[Sequence[int]], logits_RC: Tensor, columns_V: Tensor | None) -> Tensor:
        allowed_RC = torch.ones(logits_RC.shape, dtype=torch.bool)
        for row, path in enumerate(paths):
            mask_V = self.allowed(text, path)
            if self.draws and tuple(path) in self.given_up:  # the text has come to it
                self.fail(self.given_up[tuple(path)])
            if self.failed is not None:
                mask_V = torch.zeros(allowed_RC.shape[1] if columns_V is None else len(columns_V), dtype=torch.bool)
                mask_V[self.ends] = True
            if mask_V is not None and columns_V is None:
                allowed_RC[row] = mask_V[: allowed_RC.shape[1]]
            elif mask_V is not None and columns_V is not None:
                allowed_RC[row] = False
                allowed_RC[row, placed(mask_V[: len(columns_V)].nonzero()[:, 0], columns_V)[1]] = True
        allowed_RC = allowed_RC.to(logits_RC.device)
        out_RC = logits_RC.masked_fill(~allowed_RC, float("-inf"))
        lost_R = out_RC.amax(1) == float("-inf")
        if bool(lost_R.any()):
            # a draft that has no token for it guesses as it likes, and `fit` takes that out
            instead_RC = logits_RC if columns_V is not None else torch.zeros_like(out_RC).masked_fill(~allowed_RC, float("-inf"))
            out_RC = torch.where(lost_R[:, None], instead_RC, out_RC)
        return out_RC

    def forces(self, text: list[int]) -> bool:
        return self.move(text, ()) and bool(self.forced())

    def forced(self) -> list[int]:
        """What is forced where the matcher stands."""
        found = self.matcher.compute_ff_tokens()
        if self.matcher.is_error():  # it forces nothing that it could tell; whether it allows anything is another question
            self.begin_again()
            return []
        return found

    def fit(self, text: list[int], tree: Tree, nodes: int, deepest: int) -> Tree:
        """The tree without guesses that the grammar forbids, and with those that it forces."""
        if not self.move(text, ()):
            return tree
        kept, paths = [0], dict[int, list[int]]({0: []})
        for row in range(1, len(tree)):
            above = paths.get(tree.parents[row])
            if above is not None and self.move(text, path := [*above, tree.tokens[row]]):
                kept.append(row)
                paths[row] = path
        fitted = tree if len(kept) == len(tree) else tree.keep(kept)
        if nodes > 1:
            fitted = self.with_forced(text, fitted, [paths[row] for row in kept], deepest)
        return fitted.best(nodes)

    def with_forced(self, text: list[int], tree: Tree, paths: list[list[int]], deepest: int) -> Tree:
        tokens, parents, depths, scores = [*tree.tokens], [*tree.parents], [*tree.depths], [*tree.scores]
        for row, path in enumerate(paths):
            if tree.depths[row] >= deepest or not self.move(text, path):
                continue
            forced = self.forced()[: deepest - tree.depths[row]]
            if not forced or forced[0] in tree.children[row]:
                continue  # the child that is there already has its own
            for parent, token in zip([row, *range(len(tokens), len(tokens) + len(forced))], forced, strict=False):
                tokens.append(token)
                parents.append(parent)
                depths.append(depths[parent] + 1)
                scores.append(scores[parent] + FORCED)
        return tree if len(tokens) == len(tree) else Tree(tokens, parents, depths, scores, grown=tree.grown)
