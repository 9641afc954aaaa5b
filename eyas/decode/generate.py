"""The round: propose trees, read them all in one pass of the target, walk along its draws, keep the path, repeat.

Around the round is the turn, which every caller drives: `admit` a sequence, `step`, `abort`. One sequence, a ragged batch, a stream and a
server are the same turns, and plain decoding is the same round with an empty tree. Knows the target, the drafter protocol and a verifier;
knows no drafter.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from eyas.checks import within_memory
from eyas.config import PLAIN, VERIFIERS, EyasError, Request, Sampling, TreeShape
from eyas.decode.captured_round import alike, captured_round, largest
from eyas.decode.captured_round import runs as graphs_run
from eyas.decode.drafter import Drafter, NoDrafter, TreeRequest
from eyas.decode.memory import check_memory, free_on, would_fit
from eyas.decode.plan.planner import FixedPlan, Plan
from eyas.decode.prefixes import Prefixes
from eyas.decode.sampling import draw
from eyas.decode.sequence import RoundRecord, Sequence, new_sequence
from eyas.decode.tree import Tree
from eyas.decode.verifiers import VERIFY
from eyas.decode.verify import Accepted
from eyas.model.cache import Cache
from eyas.model.mask import ancestor_sight
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment, chain_rows

LOWER = "lower --max-new-tokens, --tree, or how many texts are decoded at a time (batch)"  # where memory is wanting
PROMPT_PART = 256  # rows of a prompt read at once: bounds the mask, the activations and how long others wait
TOLD_PART = 64  # the same where the logits of all these rows are wanted

Method = TypeVar("Method", bound=Callable[..., Any])


def on_its_cores(method: Method) -> Method:
    """A method of the decoder in inference mode, with the cores for the target's threads. Where memory runs out it raises `EyasError`."""

    @wraps(method)
    def led(self: Decoder, *arguments: Any) -> Any:
        with within_memory(self.way_out), torch.inference_mode(), self.target.threads():
            return method(self, *arguments)

    return cast("Method", led)


class Decoder:
    """A target and a drafter, the round that joins them, and the sequences under way."""

    cache: Cache  # the target's; made by `reserve`

    def __init__(self, target: TargetModel, drafter: Drafter | None = None, verifier: str = VERIFIERS[0], plan: Plan | None = None) -> None:
        if verifier not in VERIFY:
            raise EyasError(f"verifier {verifier!r} is unknown; choose {', '.join(VERIFIERS)}")
        self.target, self.drafter, self.verifier = target, drafter or NoDrafter(), VERIFY[verifier]
        self.plan: Plan = plan or FixedPlan()
        self.watch: Callable[[RoundRecord], None] | None = None
        self.lower = LOWER  # what the user may lower where memory is wanting

    # ---- the round ----

    @on_its_cores
    def round(self, sequences: list[Sequence]) -> None:
        """Run one round: each of these sequences gets at least one token."""
        plan, first, brought = self.plan, 0, 0
        plan.begin(len(sequences))
        if self.round_as_graph(sequences):
            return
        if plan.guesses:
            trees = plan.cut(self.fitted(sequences, self.drafter.propose([self.request(sequence) for sequence in sequences])))
        else:
            trees = self.fitted(sequences, [Tree.root(sequence.root) for sequence in sequences])
        plan.pass_begins()
        out = self.target(self.rows(sequences, trees), self.cache, self.drafter.wants)
        plan.pass_ends(self.target.device)
        for sequence, tree in zip(sequences, trees, strict=True):
            rows = slice(first, first + len(tree))
            brought += self.advance(sequence, tree, out.logits[rows], None if out.features is None else out.features[rows])
            first += len(tree)
        plan.ends(first, brought)

    def round_as_graph(self, sequences: list[Sequence]) -> bool:
        """Run the round of these sequences as one graph, where a graph can; False: nothing was done."""
        unknown = not self.verifier.shares_noise or any(sequence.processors for sequence in sequences)
        if unknown or not graphs_run(self.target, self.cache, self.drafter, len(sequences)):
            return False
        asked = [replace(self.request(sequence), planner=None) for sequence in sequences]
        if not alike(asked) or (shape := self.plan.whole(largest(asked))) is None:
            return False
        self.plan.pass_begins()
        found = captured_round(self.target, self.cache, self.drafter, asked, shape)
        self.plan.judge_whole([each.ranks for each in found or [] if each.ranks is not None])
        if found is None:
            return False
        self.plan.pass_ends(self.target.device)
        brought, seen = 0, list[tuple[Tree | None, Accepted, Tensor]]()
        for sequence, each in zip(sequences, found, strict=True):  # before any is settled: the next graph overwrites their logits
            looks = self.watch or sequence.top_logprobs is not None
            seen.append(each.seen(sequence.root) if looks else (None, each.accepted, each.logits))
        for sequence, each, (tree, accepted, logits_NV) in zip(sequences, found, seen, strict=True):
            sequence.guesses += len(each.logits) - 1
            brought += self.settle(sequence, tree, accepted, each.tokens, logits_NV, each.features)
        self.plan.ends(sum(len(each.logits) for each in found), brought)
        return True

    def request(self, sequence: Sequence) -> TreeRequest:
        """What to ask the drafter for: no deeper a tree than the text may still grow, as a node at the last free position is of no use."""
        sampling, deepest = sequence.sampling, sequence.remaining - 1
        shared = self.verifier.shares_noise and not sampling.greedy
        return TreeRequest(
            sequence.slot,
            sequence.root,
            sequence.position,
            PLAIN if sequence.forced() and not self.verifier.draws else sequence.shape.cut(deepest),
            sampling,
            noise=sequence.noise.at if shared else None,
            uncut=sequence.shape,
            deepest=max(deepest, 0),
            planner=self.plan.planner,
            processed=sequence.guessed if sequence.processors else None,
            seed=sequence.seed if shared else None,
            draws=sequence.draft_noise if self.verifier.draws and not sampling.greedy else None,
        )

    def fitted(self, sequences: list[Sequence], trees: list[Tree]) -> list[Tree]:
        """The trees as the sequences' processors would have them, where the verifier reads any tree."""
        if self.verifier.draws:
            return trees
        return [sequence.fitted(tree) for sequence, tree in zip(sequences, trees, strict=True)]

    def rows(self, sequences: list[Sequence], trees: list[Tree]) -> Rows:
        """Lay all trees out as flat rows: a node at depth d sits at position + d and sees the text and its ancestors."""
        pairs = list(zip(sequences, trees, strict=True))
        tokens = [token for tree in trees for token in tree.tokens]
        positions = [sequence.position + depth for sequence, tree in pairs for depth in tree.depths]
        sights = [ancestor_sight(tree.parents) if len(tree) > 1 else None for tree in trees]
        segments = [Segment(sequence.slot, len(tree), sight) for (sequence, tree), sight in zip(pairs, sights, strict=True)]
        return Rows(torch.tensor(tokens), torch.tensor(positions), segments)

    def advance(self, sequence: Sequence, tree: Tree, logits_NV: Tensor, features: Tensor | None) -> int:
        """Verify a tree that the target has read, keep its path and commit the path's tokens; returns how many were committed."""
        sequence.guesses += len(tree) - 1
        accepted = self.verifier.verify(tree, logits_NV, sequence)
        self.cache.keep(sequence.slot, accepted.path)  # rejected branches hold rows at positions that the next round reuses
        tokens = [*(tree.tokens[row] for row in accepted.path[1:]), accepted.bonus]
        self.plan.judge(tree, accepted.path)
        return self.settle(sequence, tree, accepted, tokens, logits_NV, rows_of(features, accepted.path))

    def settle(
        self, sequence: Sequence, tree: Tree | None, accepted: Accepted, tokens: list[int], logits_NV: Tensor, features: Tensor | None
    ) -> int:
        """Commit the tokens of a round up to one that ends the text; returns how many those are. `features`: of the path's rows."""
        committed = sequence.commit(tokens, self.target.config.eos_token_ids)
        if sequence.top_logprobs is not None:
            sequence.record_logprobs(logits_NV[accepted.path[: len(committed)]], committed)
        sequence.rounds += 1
        sequence.accepted_lengths[len(committed)] += 1
        if self.watch and tree:
            self.watch(RoundRecord(sequence.number, tree, accepted, committed, logits_NV, sequence))
        if not sequence.finish_reason:
            self.drafter.observe(sequence.slot, tokens, features)
            sequence.noise.forget_before(sequence.position)
        return len(committed)

    # ---- the turn: what a caller drives ----

    def reserve(self, slots: int, longest: int, shapes: Iterable[TreeShape], keep_prefixes: bool = False) -> None:
        """Make room for `slots` sequences at a time, of up to `longest` tokens each, with trees of these shapes. Forget earlier ones.
        `keep_prefixes`: rows of a text that is over stay, for prompts that begin as it does."""
        shapes = list(shapes)
        nodes = max(shape.nodes for shape in shapes)
        room = longest + nodes
        self.memory, self.slots = self.memory_of(slots, room, nodes), slots
        if self.target.device.type == "cpu":  # a GPU says by itself when it is full, and pools what it has
            check_memory(self.memory, self.lower)
        if hasattr(self, "cache"):
            self.cache.release()  # what it held may serve the next one
        with within_memory(self.way_out):
            self.cache = self.target.new_cache(slots, room)
            self.drafter.reserve(slots, room + max((shape.depth + 1) * shape.top_k for shape in shapes))
        self.free = list(range(slots))
        self.prefixes = Prefixes(slots) if keep_prefixes else None
        self.waiting: deque[Sequence] = deque()  # sequences without a slot
        self.reading: deque[Sequence] = deque()  # sequences whose prompt is not read to its end
        self.decoding: list[Sequence] = []

    def memory_of(self, slots: int, room: int, nodes: int) -> dict[str, float]:
        """The bytes that keys and values of so many rows a slot take, and the logits of so many nodes."""
        config = self.target.config
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.target.dtype.itemsize
        keys, logits = 2 * slots * room * width, 4 * slots * nodes * config.vocab_size
        return {f"keys and values of {slots:,} x {room:,} tokens": keys, f"logits of {slots * nodes:,} nodes": logits}

    def way_out(self) -> str:
        """What to lower where memory has run out, and how many texts at a time would have fitted, as far as keys and logits tell."""
        held, free = getattr(getattr(self, "cache", None), "keys", None), free_on(self.target.device)
        return self.lower + would_fit(self.memory, self.slots, free and free + (0 if held is None else 2 * held.nbytes))

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence in. It waits until a slot is free; its clock starts now."""
        sequence.admitted = time.perf_counter()
        sequence.noise.device = self.target.device
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.decoding)

    def step(self) -> list[Sequence]:
        """Take one turn: read a part of the oldest unread prompt, or where there is none run one round of all sequences that decode.
        Returns the sequences it served.

        A caller that must not let a long prompt hold others up calls `seat`, `read_prompt` and `decode` itself, in turns of its own.
        """
        self.seat()
        return self.read_prompt() if self.reading else self.decode()

    def seat(self) -> None:
        """Give free slots to the waiting sequences."""
        while self.waiting and self.free:
            sequence = self.next_seated()
            if self.prefixes is None:
                sequence.slot = slot = min(self.free)  # one text after the other takes the same, over which there are graphs
                self.free.remove(slot)
            elif sequence.reuses and self.prefixes.worth_waiting(sequence, self.cache):
                break
            else:
                sequence.slot = self.prefixes.seat(sequence, self.free, self.cache, self.drafter)
            sequence.seated = time.perf_counter()
            self.waiting.remove(sequence)
            self.reading.append(sequence)

    def next_seated(self) -> Sequence:
        """Who waits longest, of the owners that have the fewest slots."""
        taken = Counter(sequence.owner for sequence in (*self.reading, *self.decoding))
        return min(self.waiting, key=lambda sequence: taken[sequence.owner])

    @on_its_cores
    def read_prompt(self, most: int = PROMPT_PART) -> list[Sequence]:
        """Read up to `most` rows of the oldest unread prompt and hand them to the drafter. After the prompt's last row, draw the first
        token, where the text may have any."""
        sequence = self.reading[0]
        most = min(most, TOLD_PART) if sequence.tells_prompt else most
        start, end = sequence.read, min(sequence.read + most, sequence.prompt_length)
        rows = chain_rows(sequence.slot, sequence.tokens[start:end], start)
        out = self.target(rows, self.cache, self.drafter.wants, None if sequence.tells_prompt else slice(-1, None))
        self.cache.keep(sequence.slot, range(end - start))
        sequence.read = end
        if sequence.tells_prompt:
            sequence.record_prompt(out.logits, start)
        if end == sequence.prompt_length:
            self.draw_first(sequence, out.logits[-1:])
            self.decoding.append(self.reading.popleft())
        if not sequence.finish_reason:
            self.drafter.observe(sequence.slot, sequence.tokens[start + (start > 0) : end + 1], out.features)
        self.dismiss()
        return [sequence]

    def draw_first(self, sequence: Sequence, logits_1V: Tensor) -> None:
        """Draw a text's first token; one that may have none is over."""
        if sequence.remaining > 0:
            token = draw(sequence.processed(logits_1V[0]), sequence.sampling, sequence.noise_at(sequence.prompt_length))
            sequence.commit([token], self.target.config.eos_token_ids)
            sequence.record_logprobs(logits_1V, [token])
        else:
            sequence.commit([], ())
            sequence.finish("length")
        sequence.prefill_seconds = sequence.seconds

    def decode(self) -> list[Sequence]:
        """Run one round of all sequences whose prompts are read, and return them."""
        served = self.decoding
        if served:
            self.round(served)
            self.dismiss()
        return served

    def abort(self, sequence: Sequence) -> None:
        """End a sequence wherever it stands; the tokens it has stay. Call it between turns only."""
        if not sequence.finish_reason:
            sequence.finish("aborted")
            for queue in (self.waiting, self.reading):
                if sequence in queue:
                    queue.remove(sequence)
            if sequence.slot >= 0 and sequence not in self.decoding:
                self.release(sequence)
            self.dismiss()

    def dismiss(self) -> None:
        """Take the slots of finished sequences back."""
        for sequence in self.decoding:
            if sequence.finish_reason:
                self.release(sequence)
        self.decoding = [sequence for sequence in self.decoding if not sequence.finish_reason]

    def release(self, sequence: Sequence) -> None:
        if self.prefixes is not None:
            self.prefixes.leave(sequence, self.cache)
        else:
            self.cache.clear(sequence.slot)
            self.drafter.forget(sequence.slot)
        self.free.append(sequence.slot)

    # ---- a closed list of sequences ----

    def run(
        self,
        prompts: Iterable[Iterable[int]],
        shape: TreeShape,
        sampling: Sampling,
        seeds: Iterable[int],
        max_new_tokens: int,
        tokenizer: Any = None,
        stops: Iterable[str] = (),
        batch: int | None = None,
    ) -> Iterator[list[Sequence]]:
        """Decode all prompts (token ids), at most `batch` of them at a time (None: all together); prompt i draws with the i-th of `seeds`.
        Yields all sequences once the prompts that have a slot are read, then after each round."""
        request = Request(sampling=sampling, max_new_tokens=max_new_tokens, stop=tuple(stops))
        everyone = [
            new_sequence(prompt, request, shape, seed, self.target.config, tokenizer, number)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=False))
        ]
        yield from self.run_all(everyone, batch)

    def run_all(self, everyone: list[Sequence], batch: int | None = None) -> Iterator[list[Sequence]]:
        """Decode these sequences as `run` does its prompts."""
        slots = min(batch or len(everyone), len(everyone))
        self.reserve(slots, max(sequence.limit for sequence in everyone), {sequence.shape for sequence in everyone})
        yield from self.go_on(everyone)

    def go_on(self, everyone: list[Sequence]) -> Iterator[list[Sequence]]:
        """The same in the room that there is."""
        for sequence in everyone:
            self.admit(sequence)
        while self.busy:
            self.step()
            if not (self.reading or (self.waiting and self.free)):
                yield everyone


def rows_of(features: Tensor | None, path: list[int]) -> Tensor | None:
    """The features [len(path), ..] of a path's rows; a slice, which copies nothing, where the rows follow each other, as they mostly do."""
    if features is None:
        return None
    if path[-1] == len(path) - 1:
        return features[: len(path)]
    return features[torch.tensor(path, device=features.device)]
