"""How well a draft agrees with its target on the target's own greedy text: step by step, teacher-forced, under any settings.

One text and one target pass serve every variant of a draft, so variants are compared on the same anchors. Knows targets, drafts and the
unroll; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eyas.config import GREEDY, PLAIN, EyasError
from eyas.decode.generate import Decoder
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import TargetModel
from eyas.model.vocab import DraftVocab
from eyas.train.acceptance import guessed
from eyas.train.batches import make_batch
from eyas.train.features import Example, States, TargetStates
from eyas.train.unroll import unroll

QUESTIONS = (
    "What is the difference between weather and climate?",
    "Write a short letter to a friend about a trip to the sea.",
    "How do I boil an egg?",
    "Explain what a prime number is and give three examples.",
    "Write a Python function that returns the largest number in a list.",
    "Why do leaves change colour in autumn?",
    "A farmer has 12 cows and buys 5 more. How many legs do his cows have?",
    "Name five instruments of an orchestra and say how each makes sound.",
)
STEPS = 3
CLEAR_ERRORS = 4.0  # standard errors between two readings of a draft before one overrules the other
TELLING_ACCEPTANCE = 0.1  # below this acceptance of the first step nothing can be concluded
UNSAYABLE = -20.0  # log probability given to a token outside the draft vocabulary


@dataclass(frozen=True)
class Evidence:
    """Texts that the target wrote, with the input of every layer at every token."""

    examples: list[Example]
    layers: list[Tensor]  # each example's [layers, N, H]: the input of every layer
    target_argmax: list[Tensor]  # [N] the target's likeliest next token at rows before an answer's token; else -1

    @property
    def answer_tokens(self) -> int:
        return sum(number >= 0 for example in self.examples for number in example.answers)


class Taken:
    """A source of states whose features are taken at these layers. `late`: how many tokens before its own a row's feature comes from (a
    usual mistake)."""

    def __init__(self, evidence: Evidence, taps: Sequence[int], late: int = 0) -> None:
        self.evidence, self.taps, self.late = evidence, taps, late
        self.place = {id(example): number for number, example in enumerate(evidence.examples)}

    def states(self, examples: Sequence[Example]) -> States:
        numbers = [self.place[id(example)] for example in examples]
        parts = [torch.cat([self.evidence.layers[number][tap] for tap in self.taps], -1) for number in numbers]
        if self.late:
            parts = [torch.cat([part[:1].expand(self.late, -1), part[: -self.late]]) for part in parts]
        features = torch.cat(parts)
        target_argmax = torch.cat([self.evidence.target_argmax[number] for number in numbers])
        return States(features, features.new_zeros(len(features), 1), target_argmax)


@torch.inference_mode()
def gather(
    target: TargetModel, prompts: Sequence[list[int]], new_tokens: int, report: Callable[[int], None] = lambda count: None
) -> Evidence:
    """Let the prepared target answer greedily, then read every layer's input along each text. `report` gets the number of tokens written
    so far."""
    texts = []
    for texts in Decoder(target).run(prompts, PLAIN, GREEDY, [0] * len(prompts), new_tokens):
        report(sum(len(text.tokens) - text.prompt_length for text in texts))
    count = target.config.num_hidden_layers
    source, examples, layers, target_argmax = TargetStates(target, range(count)), [], [], []
    for text in texts:
        answers = [0 if place >= text.prompt_length else -1 for place in range(len(text.tokens))]
        if sum(number == 0 for number in answers) > STEPS:
            examples.append(Example(text.tokens, answers, greedy=True))
            states = source.states(examples[-1:])
            layers.append(states.features.float().view(len(text.tokens), count, -1).transpose(0, 1))
            target_argmax.append(states.target_argmax)
    if not examples:
        raise EyasError("the target's answers end at once: there is nothing to measure a draft on")
    return Evidence(examples, layers, target_argmax)


class Agreement(NamedTuple):
    """What a draft says at every anchor of the texts, fed with the texts' own tokens."""

    acceptance: list[float]  # P(step k right | the steps before right)
    tau: float  # 1 + mean number of leading steps right
    log_q: Tensor  # [R] log probability of the target's likeliest, over all steps and anchors: finer than right or wrong

    @property
    def telling(self) -> bool:
        """Whether the draft agrees well enough to tell readings apart: if it does not agree at all, no reading is better than another."""
        return self.acceptance[0] >= TELLING_ACCEPTANCE

    def beats(self, other: Agreement) -> float:
        """How many standard errors lie between the mean log probabilities, anchor by anchor; positive where this one is better."""
        gain = (self.log_q - other.log_q).double()
        return float(gain.mean() / (gain.std() / len(gain) ** 0.5).clamp_min(1e-12))

    def overrules(self, other: Agreement) -> bool:
        """Whether this reading is so much better than the other that what the file says must be wrong."""
        return self.telling and self.beats(other) >= CLEAR_ERRORS


@torch.no_grad()
def agreement(
    network: DraftNetwork,
    vocab: DraftVocab,
    evidence: Evidence,
    late: int = 0,
    steps: int = STEPS,
    report: Callable[[int], None] = lambda step: None,
) -> Agreement:
    """Draft at every anchor of the texts' answers with this network (loose weights, float32), its taps and its vocabulary. `report` gets
    the number of steps done so far."""
    batch, states = make_batch(evidence.examples, Taken(evidence, network.config.taps, late), network)
    place = torch.full((vocab.vocab_size,), -1).index_copy_(0, vocab.ids, torch.arange(len(vocab)))  # draft id of a target token
    log_q, acceptance, leading, anchors = [], [], 0, 0
    for _, logits, wanted, right, alive in guessed(network, vocab, batch, states.target_argmax, steps, unroll):
        said = logits.log_softmax(-1).gather(1, place[wanted].clamp_min(0)[:, None])[:, 0]
        log_q.append(torch.where(place[wanted] >= 0, said, UNSAYABLE))
        still = int((right & alive).sum())
        acceptance.append(still / max(int(alive.sum()), 1))
        leading, anchors = leading + still, anchors or len(wanted)
        report(len(acceptance))
    return Agreement(acceptance, 1 + leading / max(anchors, 1), torch.cat(log_q))
