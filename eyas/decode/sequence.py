"""One sequence from its prompt to the result it becomes.

Knows tokens, the settings they are drawn with, and how a text ends; knows nothing of models, caches or drafts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eyas.config import GREEDY, PLAIN, Request, Sampling, TargetConfig, TreeShape
from eyas.decode.logprobs import TokenLogprobs, token_logprobs
from eyas.decode.philox import GUESS
from eyas.decode.processors import LogitsProcessor, Processor, end_ids, processors_of
from eyas.decode.sampling import NOISE_VERSION, Noise, gumbel
from eyas.decode.text import TextStream
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted


@dataclass
class Sequence:
    """One sequence while it grows, with settings of its own: a batch may mix them."""

    tokens: list[int]  # the prompt, then what was committed
    limit: int  # tokens at which it ends, the prompt's included
    noise: Noise
    sampling: Sampling = GREEDY
    shape: TreeShape = PLAIN  # the largest tree a round may grow for it
    stream: TextStream = field(default_factory=lambda: TextStream(None))
    processors: tuple[LogitsProcessor, ...] = ()
    end_ids: frozenset[int] | None = None  # ids that end it; None: the target's own
    top_logprobs: int | None = None  # for each of its tokens so many likeliest are told, and its own log probability; None: none
    number: int = 0  # its index among the sequences of its call
    call: str = ""  # what its caller names the call, for watchers
    tells_prompt: bool = False  # whether the log probabilities of its prompt's tokens are told too, where those of its own are
    slot: int = -1  # its slot in the caches; -1: none yet
    read: int = 0  # tokens of the prompt that the target has read
    owner: str = ""  # whose it is: rows of a prompt are reused for the same owner alone, where they are
    reuses: bool = True  # whether it may begin with rows of another text, where they are kept
    reused: int = 0  # rows of its prompt that were not read for it
    prompt_length: int = field(init=False)
    finish_reason: str | None = None
    rounds: int = 0
    guesses: int = 0  # that its rounds' passes read
    logprobs: list[TokenLogprobs] = field(
        default_factory=lambda: list[TokenLogprobs]()
    )  # one for each token of the answer, where asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=lambda: list[TokenLogprobs]())  # of each token read but the first
    accepted_lengths: Counter[int] = field(default_factory=lambda: Counter[int]())  # tokens committed by a round -> rounds
    admitted: float = 0.0  # when the decoder took it in, on the clock of time.perf_counter
    seated: float = 0.0  # when it got its slot, on the same clock; 0: not yet
    prefill_seconds: float = 0.0  # from `admitted` until its first token
    seconds: float = 0.0  # from `admitted` until its last token so far

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def seed(self) -> int:
        return self.noise.seed

    @property
    def root(self) -> int:
        """The last token: the root of the next tree."""
        return self.tokens[-1]

    @property
    def position(self) -> int:
        """The absolute position of the root."""
        return len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        return self.limit - len(self.tokens)

    def noise_at(self, position: int) -> Tensor | None:
        """The noise [V] that the token at this position is drawn with; None: greedy text is drawn with none."""
        return None if self.sampling.greedy else self.noise.at(position)

    def draft_noise(self, node: int, count: int) -> Tensor:
        """The draft's own noise [count] for the children of a node of this round's tree; it says nothing about the target's noise."""
        return gumbel(self.seed, self.position, count, GUESS, node)

    def processed(self, logits_V: Tensor, path: Items[int] = ()) -> Tensor:
        """The logits [V] to draw the next token from, after the text and then `path`, the tokens of a tree's nodes below its root."""
        for process in self.processors:
            logits_V = process(self.tokens, path, logits_V)
        return logits_V

    def guessed(self, paths: Items[Items[int]], logits_RD: Tensor, columns_V: Tensor | None) -> Tensor:
        """A draft's logits [R, D] after each of R paths, as the target's will be processed there; `columns_V` as in `Processor.rows`.
        Processors of one's own are not the draft's to know."""
        for process in self.processors:
            if isinstance(process, Processor):
                with process.aside():
                    logits_RD = process.rows(self.tokens, paths, logits_RD, columns_V)
        return logits_RD

    def forced(self) -> bool:
        """Whether its processors say what follows."""
        return any(isinstance(process, Processor) and process.forces(self.tokens) for process in self.processors)

    def fitted(self, tree: Tree) -> Tree:
        """A tree of guesses as its processors would have it."""
        for process in self.processors:
            if isinstance(process, Processor):
                tree = process.fit(self.tokens, tree, self.shape.nodes, max(self.remaining - 1, 0))
        return tree

    def commit(self, tokens: Iterable[int], eos_ids: Collection[int]) -> list[int]:
        """Append tokens until one ends the text (end of turn, stop string, length) and drop the tokens after it. Returns the tokens that
        were appended. `eos_ids`: the target's own."""
        end_ids = eos_ids if self.end_ids is None else self.end_ids
        committed: list[int] = []
        for token in tokens:
            self.tokens.append(token)
            committed.append(token)
            if token in end_ids or self.stream.push(token):
                self.finish("stop")
            elif self.remaining <= 0:
                self.finish("length")
            if self.finish_reason:
                break
        self.seconds = time.perf_counter() - self.admitted
        return committed

    def record_logprobs(self, logits_NV: Tensor, tokens: Items[int]) -> None:
        """Keep what the target thought of N committed tokens, if that was asked for; `logits_NV`: what each was drawn from."""
        if self.top_logprobs is not None:
            self.logprobs += token_logprobs(logits_NV, tokens, self.top_logprobs)

    def record_prompt(self, logits_NV: Tensor, first: int) -> None:
        """Keep what the target thought of the prompt's tokens behind N rows of it; `first`: the position of the first of these rows."""
        tokens = self.tokens[first + 1 : min(first + 1 + len(logits_NV), self.prompt_length)]
        if self.top_logprobs is not None and tokens:
            self.prompt_logprobs += token_logprobs(logits_NV[: len(tokens)], tokens, self.top_logprobs)

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self.stream.finish()


def new_sequence(
    tokens: Iterable[int], request: Request, shape: TreeShape, seed: int, config: TargetConfig, tokenizer: Any = None, number: int = 0
) -> Sequence:
    """A sequence that begins with a prompt's tokens, under a request's settings. `config`: the target's. `number`: its index among the
    sequences of its call. Without a tokenizer it has no text, and no stop strings."""
    prompt = list(tokens)
    return Sequence(
        prompt,
        min(len(prompt) + request.max_new_tokens, config.max_position_embeddings),
        Noise(seed, config.vocab_size),
        request.sampling,
        shape,
        TextStream(tokenizer, request.stop, request.min_new_tokens),
        processors_of(request, len(prompt), config.eos_token_ids),
        end_ids(request, config.eos_token_ids),
        request.logprobs,
        number,
    )


@dataclass(frozen=True)
class Result:
    """One finished text and how it came about."""

    # the answer as decoding `tokens` gives it, without special tokens and the token that ended the turn; it ends where a stop string begins
    text: str
    tokens: list[int]  # generated ids, an end-of-turn id and the tokens of a stop string included
    tau: float  # tokens committed in rounds / rounds (1.0 where there was no round); the token that prefill draws does not count
    rounds: int  # rounds that this text took, which is the target's passes over it after its prompt
    accepted_lengths: dict[int, int]  # tokens committed by a round -> number of rounds
    seconds: float  # from the call's start to this text's end
    prefill_seconds: float  # the part of `seconds` until its first token
    seed: int  # what this text was drawn with: the call's seed, or for one of several prompts the seed derived from it
    noise_version: int  # a seed means the same text only under the same version of the noise
    finish_reason: str  # "stop" (end of turn or stop string), "length", "aborted", or "interrupted" where the call was ended early
    prompt_tokens: int  # tokens of the prompt, the chat template's included
    sampling: Sampling = GREEDY  # what it was drawn by, a generation_config.json's part included
    logprobs: list[TokenLogprobs] | None = None  # of each token; None: not asked for (`Request.logprobs`)


def tau_of(sequence: Sequence) -> float:
    """Tokens that its rounds committed, a round; 1.0 where there was none."""
    committed = sum(length * rounds for length, rounds in sequence.accepted_lengths.items())
    return committed / sequence.rounds if sequence.rounds else 1.0


def result_of(sequence: Sequence) -> Result:
    """The finished sequence as a result; an interrupted one has the tokens it got so far."""
    return Result(
        text=sequence.stream.finish(),
        tokens=sequence.tokens[sequence.prompt_length :],
        tau=tau_of(sequence),
        rounds=sequence.rounds,
        accepted_lengths=dict(sorted(sequence.accepted_lengths.items())),
        seconds=sequence.seconds,
        prefill_seconds=sequence.prefill_seconds,
        seed=sequence.seed,
        noise_version=NOISE_VERSION,
        finish_reason=sequence.finish_reason or "interrupted",
        prompt_tokens=sequence.prompt_length,
        sampling=sequence.sampling,
        logprobs=None if sequence.top_logprobs is None else sequence.logprobs,
    )


@dataclass(frozen=True)
class RoundRecord:
    """What one round did for one sequence, as `watch` gets it (trace, demo, benchmarks)."""

    sequence: int  # its index among the sequences of its call
    tree: Tree  # the tree that the target read, root included
    accepted: Accepted  # the rows on the walk's path and the bonus token
    committed: list[int]  # the tokens that the round added to the text; fewer than were accepted where one of them ended it
    logits: Tensor  # [nodes, V] the target's, one row for each node of the tree
    text: Sequence | None = None  # the sequence itself, with these tokens committed
