"""The training-time test: run the draft on its own output for several steps, as decoding will (EAGLE-3, draft model training).

An unroll is a comb-shaped tree: the parent of (step i, slot j) is (i-1, j), of (0, j) it is (0, j-1). So under the one ancestor rule a
row sees step-0 keys 0..j and its own slot's later keys, never a later step-0 key, whose feature the target would not have computed yet.
Here that is computed as causal scores against step 0 and one dot product for each own key, in one softmax; the dense mask is the tests'.
Each decoder layer has a comb of its own.
Knows the network and packed documents; knows nothing of files, optimisers or where features come from.

    slot        0    1    2     step 0: (g_j, t_{j+1}) at position j      -> p_{j+1}
    feature    f0   f1   f2     step 1: (a_j, t_{j+2}) at position j+1    -> p_{j+2}
    token      t1   t2   t3     step i: (a_j, t_{j+1+i}) at position j+i  -> p_{j+1+i}, the law of t_{j+2+i}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eyas.config import LAST_HIDDEN
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import DraftLayer, EagleModule
from eyas.model.transformer import Block
from eyas.train.losses import Columns, head_loss

# Axes: M rows of all documents of a batch, N slots that count at a step, H width, D draft vocabulary


@dataclass
class Batch:
    """Documents laid end to end."""

    tokens: Tensor  # [M] int64
    features: Tensor  # [M, taps * H]
    answers: Tensor  # [M] int64: number of the answer a token belongs to (different for every answer of the batch), -1 outside
    lengths: list[int]  # of the documents; they sum to M
    hidden: Tensor | None = None  # [M, H] the target's last, after its final norm

    def wanted(self, wants: Sequence[int]) -> Tensor:
        """What a draft reads of the target at each row."""
        wanted = self.hidden if wants == LAST_HIDDEN else self.features
        assert wanted is not None, "last hidden states are kept for those who read them"
        return wanted

    def slots(self) -> tuple[Tensor, Tensor]:
        """Rows [N] that count at step 0, and for how many steps each counts: those where t_{j+1} and t_{j+2+i} lie in one answer."""
        return loss_slots(self.answers, self.lengths)

    def taught(self) -> tuple[Tensor, Tensor]:
        """Rows [R] before a token of an answer, the only ones whose law teaches; and for every row [M] its place among them, or 0."""
        before = torch.cat([self.answers[1:] >= 0, torch.tensor([False])])
        return before.nonzero()[:, 0], (before.cumsum(0) - 1).clamp_min(0)


def loss_slots(answers: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """`Batch.slots` of answer numbers [M] alone, before there are features."""
    changes = torch.cat([(answers[1:] != answers[:-1]).nonzero()[:, 0], torch.tensor([len(answers) - 1])])
    last = changes[torch.searchsorted(changes, torch.arange(len(answers)))]  # last row of the answer a row belongs to
    rows = torch.arange(len(answers) - 1)
    counted = torch.where(answers[1:] >= 0, last[1:] - rows - 1, 0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    counted[starts[1:-1] - 1] = 0  # a document's last row has no next token of its own
    slots = (counted > 0).nonzero()[:, 0]
    return slots, counted[slots]


class Step(NamedTuple):
    """What the draft made of the slots that count at one step."""

    slots: Tensor  # [N] rows of the batch
    a: Tensor  # [N, H] output before the final norm
    teacher_rows: Tensor  # [N] rows of the batch whose law is the teacher: slot + 1 + step


def unroll(network: EagleModule, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """Yield each step; gradients flow through all. `depths` [N]: steps after which a slot drops out (default: none does early)."""
    place = torch.cat([torch.arange(length) for length in batch.lengths])
    following = torch.cat([batch.tokens, batch.tokens.new_zeros(steps)])
    slots, counted = batch.slots()
    counted = counted if depths is None else torch.minimum(counted, depths)
    g = network.fuse(batch.wanted(network.wants))
    a, layers = g, [Layer(block, batch.lengths) for block in network.blocks]
    for step in range(steps):
        if step == 0:  # at every row: slots see the keys of all of them
            read, residual = network.join(following[1 : len(g) + 1], g)
            positions = place
        else:
            going = counted > step
            slots, counted, a = slots[going], counted[going], a[going]
            if len(slots) == 0:  # every answer is shorter than this step reaches
                return
            for layer in layers:
                layer.own = [(k[going], v[going]) for k, v in layer.own]
            read, residual = network.join(following[slots + 1 + step], network.fed_back(a))
            positions = place[slots] + step
        a = through(layers, read, residual, network.rotary(positions, network.dtype), slots)
        yield Step(slots, a, slots + 1 + step)


class Layer:
    """One decoder layer of the comb: its keys and values of step 0 at every row, and of each later step at the slots still counted."""

    def __init__(self, block: DraftLayer, lengths: list[int]) -> None:
        self.block, self.lengths = block, lengths
        self.spine: tuple[Tensor, Tensor] | None = None  # of step 0: k, v [M, k, d]
        self.own: list[tuple[Tensor, Tensor]] = []  # of each later step: [N, k, d]

    def __call__(self, read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], slots: Tensor) -> Tensor:
        """What attention and MLP make of `residual` at the slots [N, H]; at step 0 there is a row for every one of the batch."""
        q, k, v = heads(self.block, read, rotation)
        if self.spine is None:
            self.spine = k, v
            q, residual = q[slots], residual[slots]
        else:
            self.own.append((k, v))
        x = residual + self.block.self_attn.out(comb_attention(q, *self.spine, self.own, slots, self.lengths))
        return x + self.block.mlp(self.block.post_attention_layernorm(x))


def through(layers: list[Layer], read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], slots: Tensor) -> Tensor:
    """a [N, H] at the slots. At step 0 every layer but the last is computed at all rows, since the next one's keys are made of them."""
    everywhere = slots if layers[-1].spine else torch.arange(len(residual))
    for number, layer in enumerate(layers):
        if number:
            assert isinstance(layer.block, Block), "those behind the first are ordinary ones"
            read = layer.block.input_layernorm(residual)
        residual = layer(read, residual, rotation, slots if layer is layers[-1] else everywhere)
    return residual


def heads(block: DraftLayer, read: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [N, q, d], k [N, k, d] and v of rows, through the block itself: `attend` hands them over instead of attending."""
    caught: list[Tensor] = []

    def catch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caught.extend((q, k, v))
        return q.new_zeros(0, q.shape[1] * q.shape[2])

    block.self_attn(read, rotation, catch)
    return caught[0], caught[1], caught[2]


def comb_attention(q: Tensor, k0: Tensor, v0: Tensor, own: Sequence[tuple[Tensor, Tensor]], slots: Tensor, lengths: list[int]) -> Tensor:
    """[N, q*d]: slot j sees step-0 keys 0..j of its document and its own slot's later keys, in one softmax. Works document by document."""
    N, heads_q, d = q.shape
    groups = heads_q // k0.shape[1]
    q = q.view(N, -1, groups, d) * d**-0.5
    own_scores = torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in own], -1) if own else q.new_zeros(*q.shape[:-1], 0)  # [N,k,g,own]
    outputs, start, first = [], 0, 0
    ends = torch.searchsorted(slots, torch.tensor(lengths).cumsum(0)).tolist()
    for length, end in zip(lengths, ends, strict=True):
        if end > first:
            rows = slots[first:end] - start
            last = int(rows[-1]) + 1  # keys behind the last slot are seen by none
            hidden = torch.arange(last)[None] > rows[:, None]
            outputs.append(one_document(q[first:end], k0[start : start + last], v0[start : start + last], own_scores[first:end], hidden))
        start, first = start + length, end
    mixed = torch.cat([out for out, _ in outputs])
    shares = torch.cat([share for _, share in outputs])
    for i, (_, v) in enumerate(own):
        mixed = mixed + shares[..., i, None] * v[:, :, None]
    return mixed.reshape(N, heads_q * d)


def one_document(q: Tensor, k0: Tensor, v0: Tensor, own_scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """q [n,k,g,d] over m step-0 keys [m,k,d]: the step-0 part of the result [n,k,g,d] and the shares [n,k,g,own] of the slots' own keys."""
    n, kv_heads, groups, d = q.shape
    folded = q.permute(1, 2, 0, 3).reshape(kv_heads, groups * n, d)
    scores = torch.bmm(folded, k0.permute(1, 2, 0)).view(kv_heads, groups, n, -1).masked_fill(hidden, float("-inf"))
    shares = torch.cat([scores, own_scores.permute(1, 2, 0, 3)], -1).softmax(-1)
    m = k0.shape[0]
    mixed = torch.bmm(shares[..., :m].reshape(kv_heads, groups * n, m), v0.transpose(0, 1)).view(kv_heads, groups, n, d)
    return mixed.permute(2, 0, 1, 3), shares[..., m:].permute(2, 0, 1, 3)


class Supervision(NamedTuple):
    """What the target teaches of a batch, and how much each step counts.

    Slots where the target's favourite token is not in the draft vocabulary add nothing to the sum but stay in the mean (SafeAILab's mask).
    """

    law_RD: Tensor  # the target's law over the draft vocabulary at R rows
    law_of_M: Tensor  # which of them is that of row m
    within_M: Tensor  # whether the target's favourite token there is in the draft vocabulary
    steps: int
    decay: float  # step i weighs decay ** i
    depths: Tensor | None = None  # [N] steps after which a slot drops out
    counts: Sequence[int] | None = None  # slots of each step that its mean is over, where this is a part of a larger batch
    rule: str = "soft"  # a name in losses.py
    columns: Columns | None = None
    seed: int = 0  # of what a loss leaves to chance

    def of(self, found: Sequence[Step], x_NH: Tensor, head: nn.Linear, first: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Sum over steps i of decay ** i times the mean loss of step i, and those means. x: states of all steps' slots before the head,
        which they pass together: it is the largest matrix, and few rows use it badly. Parts of a batch add up to the whole."""
        sizes = [len(step.slots) for step in found]
        shares = [self.decay**i / max(over, 1) for i, over in enumerate((self.counts or [0] * first + sizes)[first:], first)]
        rows = torch.cat([step.teacher_rows for step in found])
        weight = torch.cat([self.within_M[step.teacher_rows].to(x_NH.dtype) * share for step, share in zip(found, shares, strict=False)])
        head_DH = head.weight
        if head.bias is not None:  # as one input more, which is always 1
            x_NH, head_DH = torch.cat([x_NH, torch.ones_like(x_NH[:, :1])], -1), torch.cat([head_DH, head.bias[:, None]], -1)
        total, terms = head_loss(x_NH, head_DH, self.law_RD, self.law_of_M[rows], weight, self.rule, self.columns)
        return total, [part.sum() / self.decay**i for i, part in enumerate(terms.split(sizes), first)]

    def padded(self, means: list[Tensor]) -> list[Tensor]:
        """One for every step, 0 where no answer reached."""
        return means + [torch.zeros(())] * (self.steps - len(means))


def unrolled_loss(network: DraftNetwork, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    """Sum over steps i of decay ** i times the mean loss of step i, and those means (EAGLE-3, draft model training)."""
    found = list(unroll(network, batch, supervision.steps, supervision.depths))
    total, means = supervision.of(found, network.norm(torch.cat([step.a for step in found])), network.lm_head)
    return total, supervision.padded(means)
