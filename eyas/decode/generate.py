"""The round: propose trees, read them all in one pass of the target, walk along its draws, keep the path, repeat.

Knows the target, the drafter protocol and a verifier; knows no drafter. One sequence, a ragged batch and a stream are the same loop, and
plain decoding is the same round with an empty tree.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eyas.config import VERIFIERS, EyasError, Sampling, TreeShape
from eyas.decode.drafter import Drafter, NoDrafter, TreeRequest
from eyas.decode.plan.planner import FixedPlan, Planner
from eyas.decode.sampling import CHOICE, GUESS, NOISE_VERSION, Noise, draw, gumbel, law, uniforms
from eyas.decode.text import TextStream
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted, Chance, Law, Uniforms, accept_reject, block, traversal, typical, walk, without_replacement
from eyas.kernels.captured import Graph, synchronize
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.target import Target

PREFILL = 256  # rows of a prompt read at once: bounds the mask and the activations


@dataclass
class Text:
    """One text as it grows."""

    number: int  # among the prompts of its call
    slot: int  # where the caches keep it, while it grows
    tokens: list[int]
    prompt_length: int
    limit: int  # total length at which it ends
    seed: int
    noise: Noise
    stream: TextStream
    finish_reason: str | None = None
    rounds: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)  # tokens committed by a round -> rounds
    prefill_seconds: float = 0.0
    seconds: float = 0.0  # from the call's start to this text's end

    @property
    def root(self) -> int:
        return self.tokens[-1]

    @property
    def position(self) -> int:
        return len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        return self.limit - len(self.tokens)

    def guesses(self, node: int, count: int) -> Tensor:
        """Noise of the draft's own for the children of a node of this round's tree: it knows nothing of the target's."""
        return gumbel(self.seed, self.position, count, GUESS, node)


@dataclass(frozen=True)
class Result:
    """One finished text and how it came about."""

    text: str
    tokens: list[int]  # generated ids, an end-of-turn id included
    tau: float  # tokens committed in rounds / rounds; the token that prefill draws does not count
    rounds: int
    accepted_lengths: dict[int, int]  # tokens committed by a round -> number of rounds
    seconds: float  # from the call's start to this text's end
    prefill_seconds: float  # of that, until its first token
    seed: int
    noise_version: int
    finish_reason: str  # "stop", "length", or "interrupted" where the call was ended early
    prompt_tokens: int


@dataclass(frozen=True)
class RoundRecord:
    """What one sequence's round did, for those who watch (trace, demo, calibration)."""

    sequence: int
    tree: Tree
    accepted: Accepted
    committed: list[int]
    logits: Tensor  # [nodes, V]


Verify = Callable[[Tree, Tensor, Text, Sampling], Accepted]


def verify_by_walk(tree: Tree, logits_NV: Tensor, sequence: Text, sampling: Sampling) -> Accepted:
    """The target's draw at a node of depth d uses the noise of the position it fills (position + d + 1)."""

    def draw_at(row: int) -> int:
        noise = None if sampling.greedy else sequence.noise.at(sequence.position + tree.depths[row] + 1)
        return draw(logits_NV[row], sampling, noise)

    return walk(tree, draw_at)


def verify_by(rule: Callable[[Tree, Law, Chance], Accepted]) -> Verify:
    """Verification by a rule of acceptance, with uniforms of the sequence's own. Of greedy text only the walk's can be right."""

    def verify(tree: Tree, logits_NV: Tensor, sequence: Text, sampling: Sampling) -> Accepted:
        if sampling.greedy:
            return verify_by_walk(tree, logits_NV, sequence, sampling)
        stream = uniforms(sequence.seed, sequence.position, len(tree) + 1, CHOICE)
        return rule(tree, lambda row: law(logits_NV[row], sampling), Uniforms(iter(stream.tolist())))

    return verify


RULES = (accept_reject, without_replacement, traversal, block, typical)
VERIFY = dict(zip(VERIFIERS, (verify_by_walk, *map(verify_by, RULES))))
DRAWS = ("without-replacement", "traversal", "block")  # those whose trees the draft draws with noise of its own


class Decoder:
    """A target and a drafter, and the round that joins them."""

    def __init__(
        self, target: Target, drafter: Drafter | None = None, verifier: str = VERIFIERS[0], planner: Planner | None = None
    ) -> None:
        if verifier not in VERIFY:
            raise EyasError(f"verifier {verifier!r} is unknown; choose {', '.join(VERIFIERS)}")
        self.target, self.drafter, self.planner = target, drafter or NoDrafter(), planner
        self.verify, self.shares_noise, self.draws = VERIFY[verifier], verifier == VERIFIERS[0], verifier in DRAWS
        self.watch: Callable[[RoundRecord], None] | None = None

    # ---- the round ----

    @torch.inference_mode()
    def round(self, sequences: Sequence[Text], shape: TreeShape, sampling: Sampling) -> None:
        """One round of all sequences: at least one token each."""
        plan, began, brought, graphs = self.planner or FixedPlan(), time.perf_counter(), 0, Graph.made
        plan.begin([sequence.slot for sequence in sequences])
        if plan.guesses:
            trees = plan.cut(self.drafter.propose([self.request(sequence, shape, sampling) for sequence in sequences]))
        else:
            trees = [Tree.root(sequence.root) for sequence in sequences]
        rows, read = self.rows(sequences, trees), time.perf_counter()
        out = self.target(rows, self.cache, self.drafter.wants)
        synchronize(self.target.device)  # its seconds are a price; what comes next waits for it anyway
        first, read = 0, time.perf_counter() - read
        for sequence, tree in zip(sequences, trees):
            logits = out.logits[first : first + len(tree)]
            accepted = self.verify(tree, logits, sequence, sampling)
            self.cache.keep(sequence.slot, accepted.path)  # rejected branches hold rows at positions the next round reuses
            tokens = [*(tree.tokens[row] for row in accepted.path[1:]), accepted.bonus]
            committed = commit(sequence, tokens, self.target.config.eos_token_ids)
            sequence.rounds += 1
            sequence.accepted_lengths[len(committed)] += 1
            brought += len(committed)
            plan.judge(tree, accepted.path)
            if self.watch:
                self.watch(RoundRecord(sequence.number, tree, accepted, committed, logits))
            if sequence.finish_reason:
                self.drafter.forget(sequence.slot)
            else:
                features = picked(out.features, first, accepted.path) if self.drafter.wants else None
                self.drafter.observe(sequence.slot, tokens, features)
                sequence.noise.forget_before(sequence.position)
            first += len(tree)
        if Graph.made == graphs:
            plan.served(first, read, brought, time.perf_counter() - began)

    def request(self, sequence: Text, shape: TreeShape, sampling: Sampling) -> TreeRequest:
        """Ask for no deeper a tree than the text may still grow: a node at the last free position is of no use."""
        deepest = sequence.remaining - 1
        noise = sequence.noise.at if self.shares_noise and not sampling.greedy else None
        draws = sequence.guesses if self.draws and not sampling.greedy else None
        place, shape = (sequence.slot, sequence.root, sequence.position), shape.cut(deepest)
        return TreeRequest(*place, shape, sampling, noise, max(deepest, 0), self.planner, draws=draws)

    def rows(self, sequences: Sequence[Text], trees: Sequence[Tree]) -> Rows:
        """Lay all trees out as flat rows: a node at depth d sits at position + d and sees the text and its ancestors."""
        tokens = [token for tree in trees for token in tree.tokens]
        positions = [sequence.position + depth for sequence, tree in zip(sequences, trees) for depth in tree.depths]
        segments = [
            Segment(sequence.slot, len(tree), ancestor_mask(tree.parents) if len(tree) > 1 else None)
            for sequence, tree in zip(sequences, trees)
        ]
        return Rows(torch.tensor(tokens), torch.tensor(positions), segments)

    # ---- before and around it ----

    @torch.inference_mode()
    def prefill(self, sequence: Text, sampling: Sampling) -> None:
        """Read the prompt and draw the first token."""
        features = []
        for start in range(0, sequence.prompt_length, PREFILL):
            part = sequence.tokens[start : start + PREFILL]
            rows = chain_rows(sequence.slot, part, start)
            out = self.target(rows, self.cache, self.drafter.wants, slice(-1, None))
            self.cache.keep(sequence.slot, range(len(part)))
            features.append(out.features)
        noise = None if sampling.greedy else sequence.noise.at(sequence.prompt_length)
        commit(sequence, [draw(out.logits[-1], sampling, noise)], self.target.config.eos_token_ids)
        if not sequence.finish_reason:
            self.drafter.observe(sequence.slot, sequence.tokens, torch.cat(features) if self.drafter.wants else None)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        shape: TreeShape,
        sampling: Sampling,
        seeds: Sequence[int],
        max_new_tokens: int,
        tokenizer: Any = None,
        stops: Sequence[str] = (),
        batch: int | None = None,
    ) -> Iterator[list[Text]]:
        """Decode all prompts together, or at most `batch` of them at a time: a finished text leaves at once and the next one takes its
        slot. Yields all texts after prefill and after each round."""
        context = self.target.config.max_position_embeddings
        limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
        room, free = max(limits) + shape.nodes, list(range(min(batch or len(prompts), len(prompts))))
        self.cache = None  # what it held may serve this call
        self.cache = self.target.new_cache(len(free), room)
        self.drafter.reserve(len(free), room + (shape.depth + 1) * shape.top_k)
        everyone = []
        for number, (prompt, limit, seed) in enumerate(zip(prompts, limits, seeds)):
            noise = Noise(seed, self.target.config.vocab_size)
            everyone.append(Text(number, -1, list(prompt), len(prompt), limit, seed, noise, TextStream(tokenizer, stops)))
        waiting, active, started = deque(everyone), [], time.perf_counter()
        while True:
            while free and waiting:
                sequence = waiting.popleft()
                sequence.slot = free.pop(0)
                self.prefill(sequence, sampling)
                sequence.prefill_seconds = time.perf_counter() - started
                active.append(sequence)
            for sequence in active:
                sequence.seconds = time.perf_counter() - started
                if sequence.finish_reason:
                    self.cache.clear(sequence.slot)
                    free.append(sequence.slot)
            active = [sequence for sequence in active if not sequence.finish_reason]
            if free and waiting:
                continue
            yield everyone
            if not active:
                return
            self.round(active, shape, sampling)


def picked(rows: Tensor, first: int, path: Sequence[int]) -> Tensor:
    """A path's rows of a pass, counted from `first`: a slice where they follow each other, as they mostly do."""
    if path[-1] == len(path) - 1:
        return rows[first : first + len(path)]
    return rows[torch.tensor(path, device=rows.device) + first]


def commit(sequence: Text, tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Append tokens until one ends the text (end of turn, stop string, length); what lies behind it is dropped. Returns what stayed."""
    committed = []
    for token in tokens:
        sequence.tokens.append(token)
        committed.append(token)
        if token in end_ids or sequence.stream.push(token):
            sequence.finish_reason = "stop"
        elif sequence.remaining <= 0:
            sequence.finish_reason = "length"
        if sequence.finish_reason:
            sequence.stream.finish()
            break
    return committed


def result_of(sequence: Text) -> Result:
    """The finished sequence as a result; one that was interrupted has what it got so far."""
    committed = sum(length * rounds for length, rounds in sequence.accepted_lengths.items())
    return Result(
        text=sequence.stream.finish(),
        tokens=sequence.tokens[sequence.prompt_length :],
        tau=committed / sequence.rounds if sequence.rounds else 1.0,
        rounds=sequence.rounds,
        accepted_lengths=dict(sorted(sequence.accepted_lengths.items())),
        seconds=sequence.seconds,
        prefill_seconds=sequence.prefill_seconds,
        seed=sequence.seed,
        noise_version=NOISE_VERSION,
        finish_reason=sequence.finish_reason or "interrupted",
        prompt_tokens=sequence.prompt_length,
    )
