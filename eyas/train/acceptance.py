"""How much of a draft is accepted on held-out text: simulated from the states that training uses, or in real rounds with trees.

Knows networks, examples, the unroll and the round; knows nothing of optimisers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.config import GREEDY, TreeShape
from eyas.decode.generate import Decoder
from eyas.methods import METHODS
from eyas.model.protocols import DraftModule, TargetModel
from eyas.model.vocab import DraftVocab
from eyas.train.batches import make_batch
from eyas.train.features import Example, StateSource
from eyas.train.unroll import Batch, Step, unroll

RANKS = 8  # the best guesses of a step that are counted, each for itself

Unroll = Callable[[Any, Batch, int], Iterator[Step]]


class Simulation(NamedTuple):
    """Counts for E examples and K steps: a chain is drafted at every anchor of their answers, fed with the text's own tokens."""

    anchors: Tensor  # [E]
    counted: Tensor  # [E, K] anchors whose answer is long enough for this step
    alive: Tensor  # [E, K] those of them where all steps before were right
    right: Tensor  # [E, K] those of `alive` where this step is right too: its guess is what the target finds likeliest
    forced: Tensor  # [E, K] those of `counted` where this step is right, whatever came before

    def tau(self) -> float:
        """1 + the mean number of leading steps that are right, over all anchors."""
        return 1 + float(self.right.sum()) / max(float(self.anchors.sum()), 1)

    def acceptance(self) -> list[float]:
        """P(step k right | steps before right)."""
        return (self.right.sum(0) / self.alive.sum(0).clamp_min(1)).tolist()

    def accuracy(self) -> list[float]:
        """Teacher-forced: P(step k right)."""
        return (self.forced.sum(0) / self.counted.sum(0).clamp_min(1)).tolist()

    def interval(self, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The ends of tau's 95% interval, by bootstrap over examples."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(0, len(self.anchors), (draws, len(self.anchors)), generator=generator)
        taus = 1 + self.right.sum(1)[chosen].sum(1) / self.anchors[chosen].sum(1).clamp_min(1)
        low, high = taus.quantile(torch.tensor([0.025, 0.975], dtype=taus.dtype)).tolist()
        return low, high


class Guessed(NamedTuple):
    """What a chain of guesses says at one step, beside what the target says there. N anchors reach the step."""

    step: Step
    logits: Tensor  # [N, D] the draft's
    wanted: Tensor  # [N] the target's likeliest tokens
    right: Tensor  # bool [N] whether this step says them
    alive: Tensor  # bool [N] whether all steps before said theirs


def guessed(network: DraftModule, vocab: DraftVocab, batch: Batch, target_argmax: Tensor, steps: int, unroll: Unroll) -> Iterator[Guessed]:
    """Draft a chain at every anchor of a batch, fed with the text's own tokens, and compare each step with the target's likeliest token."""
    alive_M = torch.ones_like(batch.tokens, dtype=torch.bool)
    for i, step in enumerate(unroll(network, batch, steps)):
        logits, wanted = network.logits_at(i, step.a), target_argmax[step.teacher_rows]
        right, alive = vocab.to_target(logits.argmax(-1)) == wanted, alive_M[step.anchors]
        yield Guessed(step, logits, wanted, right, alive)
        alive_M[step.anchors] = right & alive


@torch.no_grad()
def simulate(
    network: DraftModule,
    vocab: DraftVocab,
    examples: Sequence[Example],
    source: StateSource,
    steps: int,
    together: int = 8,
    unroll: Unroll = unroll,
) -> Simulation:
    """Draft a chain of `steps` steps at every anchor of the examples' answers, with the method's `unroll`, and count where it says what the
    target does, which is the source's `target_argmax`."""
    parts = []
    for first in range(0, len(examples), together):
        batch, states = make_batch(examples[first : first + together], source, network)
        lengths = torch.tensor(batch.lengths, device=batch.tokens.device)
        example_of = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        counts = torch.zeros(4, len(lengths), steps, dtype=torch.float64, device=lengths.device)
        for i, (step, _, _, right, alive) in enumerate(guessed(network, vocab, batch, states.target_argmax, steps, unroll)):
            for row, marked in zip(counts, (torch.ones_like(right), alive, right & alive, right), strict=True):
                row[:, i].index_add_(0, example_of[step.anchors], marked.double())
        parts.append(counts)
    counted, alive, right, forced = torch.cat(parts, 1).cpu()
    return Simulation(counted[:, 0], counted, alive, right, forced)


@torch.no_grad()
def rank_accuracies(
    network: DraftModule, vocab: DraftVocab, examples: Sequence[Example], source: StateSource, steps: int, unroll: Unroll, together: int = 8
) -> list[list[float]]:
    """How often the guess of each rank is the target's likeliest token, as [step][rank], counted where the text before was the target's
    likeliest too. decode/plan/static_tree.py makes the best tree of a fixed shape from it (Medusa, arXiv 2401.10774, 3.3)."""
    taken, tried = (torch.zeros(steps, width, dtype=torch.float64, device="cpu") for width in (RANKS, 1))
    for first in range(0, len(examples), together):
        batch, states = make_batch(examples[first : first + together], source, network)
        good = torch.ones_like(batch.tokens, dtype=torch.bool)
        following = torch.cat([batch.tokens, batch.tokens.new_zeros(steps + 2)])
        for i, step in enumerate(unroll(network, batch, steps)):
            ranked = vocab.to_target(network.logits_at(i, step.a).topk(min(RANKS, len(vocab)), -1).indices)
            said = states.target_argmax[step.teacher_rows]
            along = good[step.anchors]
            taken[i, : ranked.shape[1]] += (ranked == said[:, None])[along].sum(0).cpu()
            tried[i] += int(along.sum())
            good[step.anchors] = along & (following[step.anchors + 2 + i] == said)
    return [[round(share, 4) for share in row] for row in (taken / tried.clamp_min(1)).tolist()]


class TreeTau:
    """Measures tau in real rounds: greedy text after these prompts, with trees of one shape."""

    def __init__(
        self,
        target: TargetModel,
        vocab: DraftVocab,
        prompts: Sequence[list[int]],
        shape: TreeShape,
        new_tokens: int,
        method: str = "eagle3",
    ) -> None:
        """`target`: prepared for inference."""
        self.method = METHODS[method]
        self.target, self.vocab, self.prompts, self.shape, self.new_tokens = target, vocab, prompts, shape, new_tokens

    @torch.inference_mode()
    def __call__(self, network: DraftModule) -> float:
        embedding = {id(network.embedding[0]): self.target.embedding.detach()}  # is the target's own, and in its number format
        own = deepcopy(network, embedding).to(self.target.device, self.target.dtype).prepare()  # a copy: preparing packs weights away
        decoder = Decoder(self.target, self.method.decoding().drafter(own, self.vocab))
        *_, texts = decoder.run(self.prompts, self.shape, GREEDY, [0] * len(self.prompts), self.new_tokens)
        rounds = sum((text.accepted_lengths for text in texts), Counter())
        return sum(tokens * count for tokens, count in rounds.items()) / max(rounds.total(), 1)
