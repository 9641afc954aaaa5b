"""The training-time test: run the draft on its own output for several steps, as decoding will (EAGLE-3, draft model training).

An unroll is a comb-shaped tree: the parent of (step i, anchor j) is (i-1, j), and the parent of (0, j) is (0, j-1). So under the rule that
a row sees its ancestors, it sees step-0 keys 0..j and the later keys of its own anchor. It never sees a later step-0 key, whose feature
the target would not have computed yet. In comb.py that is computed as causal scores against step 0 and one dot product for each own key, in
one softmax; the tests compare it with the dense mask. Each decoder layer has a comb of its own. Which rows count is settled on the CPU, on
every device: a step on CUDA never waits for it.
Knows the network and packed documents; knows nothing of files, optimisers or where features come from.

    anchor      0    1    2     step 0: (g_j, t_{j+1}) at position j      -> p_{j+1}
    feature    f0   f1   f2     step 1: (a_j, t_{j+2}) at position j+1    -> p_{j+2}
    token      t1   t2   t3     step i: (a_j, t_{j+1+i}) at position j+i  -> p_{j+1+i}, the distribution of t_{j+2+i}
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
from eyas.train.comb import Comb, comb_over, moved
from eyas.train.losses import Columns, head_loss

# Axes: M rows of all documents of a batch, N anchors that count at a step, H model width, D draft vocabulary, q/k heads, d head width


@dataclass
class Batch:
    """The documents of one batch, laid end to end: M rows."""

    tokens: Tensor  # [M] int64
    features: Tensor  # [M, taps * H]
    answers: Tensor  # [M] int64, on the CPU: number of the answer a token belongs to (different for every answer of the batch), -1 outside
    lengths: list[int]  # tokens of each document; they sum to M
    hidden: Tensor | None = None  # [M, H] the target's last hidden states, after its final norm

    def wanted(self, wants: Sequence[int]) -> Tensor:
        """What a draft with these `wants` reads of the target: last hidden states [M, H], or features [M, taps * H]."""
        wanted = self.hidden if wants == LAST_HIDDEN else self.features
        assert wanted is not None, "last hidden states are kept for those who read them"
        return wanted

    def anchors(self) -> tuple[Tensor, Tensor]:
        """The anchors: rows [N] that count at step 0, and for how many steps each counts, on the CPU. Row j counts at step i where t_{j+1}
        and t_{j+2+i} lie in one answer."""
        return loss_anchors(self.answers, self.lengths)

    def taught(self) -> tuple[Tensor, Tensor]:
        """The rows [R] before a token of an answer, whose distributions teach; and for every row [M] its index among these, or 0."""
        before = torch.cat([self.answers[1:] >= 0, torch.tensor([False], device="cpu")])
        device = self.tokens.device
        return moved(before.nonzero()[:, 0], device), moved((before.cumsum(0) - 1).clamp_min(0), device)


def loss_anchors(answers: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """`Batch.anchors` from answer numbers [M] and documents' lengths alone, before there are features."""
    rows = torch.arange(len(answers), device="cpu")
    changes = torch.cat([(answers[1:] != answers[:-1]).nonzero()[:, 0], rows[-1:]])
    last = changes[torch.searchsorted(changes, rows)]  # last row of the answer a row belongs to
    rows = rows[:-1]
    counted = torch.where(answers[1:] >= 0, last[1:] - rows - 1, 0)
    starts = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    counted[starts[1:-1] - 1] = 0  # a document's last row has no next token of its own
    anchors = (counted > 0).nonzero()[:, 0]
    return anchors, counted[anchors]


class Step(NamedTuple):
    """The draft's output at the anchors that count at one step."""

    anchors: Tensor  # [N] rows of the batch
    a: Tensor  # [N, H] the draft's output, before its final norm
    teacher_rows: Tensor  # [N] rows of the batch whose distribution is the teacher: anchor + 1 + step


def unroll(network: EagleModule, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """Yield each of up to `steps` steps; gradients flow through all of them. `depths` [N], on the CPU: the number of steps after which an
    anchor drops out (default: at its answer's end)."""
    device = batch.tokens.device
    place = torch.cat([torch.arange(length, device="cpu") for length in batch.lengths])
    following = torch.cat([batch.tokens, batch.tokens.new_zeros(steps)])
    turns = network.rotary(torch.arange(max(batch.lengths) + steps, device=device), network.dtype)
    anchors, counted = batch.anchors()
    counted = counted if depths is None else torch.minimum(counted, depths)
    g = network.fuse(batch.wanted(network.wants))
    a, layers = g, [Layer(block, batch.lengths, network.window) for block in network.blocks]
    for step in range(steps):
        if step == 0:  # at every row, since anchors see the keys of all earlier rows
            read, residual = network.join(following[1 : len(g) + 1], g)
            there, positions = moved(anchors, device), moved(place, device)
        else:
            going = (counted > step).nonzero()[:, 0]
            anchors, counted = anchors[going], counted[going]
            if len(anchors) == 0:  # every answer is shorter than this step reaches
                return
            going, there, positions = moved(torch.stack([going, anchors, place[anchors] + step]), device)
            a = a.index_select(0, going)
            for layer in layers:
                layer.own = [(k.index_select(0, going), v.index_select(0, going)) for k, v in layer.own]
            read, residual = network.join(following[there + 1 + step], network.fed_back(a))
        a = through(layers, read, residual, (turns[0][positions], turns[1][positions]), anchors)
        yield Step(there, a, there + 1 + step)


class Layer:
    """One decoder layer of the comb: its keys and values of step 0 at every row, and of each later step at the anchors that still
    count."""

    def __init__(self, block: DraftLayer, lengths: list[int], window: int | None = None) -> None:
        """`window`: how many positions a row sees, itself included; None: all."""
        self.block, self.lengths, self.window = block, lengths, window
        self.comb: Comb | None = None  # with keys and values of step 0, [M, k, d] each
        self.own: list[tuple[Tensor, Tensor]] = []  # for each later step its keys and values, [N, k, d] each

    def __call__(self, read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], anchors: Tensor) -> Tensor:
        """The layer's output [N, H] at the anchors, which lie on the CPU. `read` and `residual` have a row for each anchor, at step 0 for
        each row of the batch."""
        q, k, v = heads(self.block, read, rotation)
        if self.comb is None:
            self.comb, there = comb_over(k, v, self.lengths, self.window), moved(anchors, q.device)
            q, residual = q.index_select(0, there), residual.index_select(0, there)
        else:
            self.own.append((k, v))
        x = residual + self.block.self_attn.out(self.comb(q, self.own, anchors))
        return x + self.block.mlp(self.block.post_attention_layernorm(x))


def through(layers: list[Layer], read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], anchors: Tensor) -> Tensor:
    """The output a [N, H] of all layers at the anchors. At step 0 every layer but the last is computed at all rows, since the next layer's
    keys are made of its outputs."""
    everywhere = anchors if layers[-1].comb else torch.arange(len(residual), device="cpu")
    for number, layer in enumerate(layers):
        if number:
            assert isinstance(layer.block, Block), "those behind the first are ordinary ones"
            read = layer.block.input_layernorm(residual)
        residual = layer(read, residual, rotation, anchors if layer is layers[-1] else everywhere)
    return residual


def heads(block: DraftLayer, read: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The rotated q [N, q, d], k and v [N, k, d] of rows. The block itself computes them: its `attend` hands them over here and attends to
    nothing."""
    caught: list[Tensor] = []

    def catch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caught.extend((q, k, v))
        return q.new_zeros(0, q.shape[1] * q.shape[2])

    block.self_attn(read, rotation, catch)
    return caught[0], caught[1], caught[2]


class Supervision(NamedTuple):
    """What the target teaches about a batch, and how much each step counts.

    Anchors where the target's likeliest token is not in the draft vocabulary add nothing to a step's sum, but are counted in its mean
    (SafeAILab's mask).
    """

    distribution_RD: Tensor  # the target's distribution over the draft vocabulary at R rows
    distribution_of_M: Tensor  # for each row m, which of these R is its own
    within_M: Tensor  # for each row m, whether the target's likeliest token is in the draft vocabulary
    steps: int
    decay: float  # step i weighs decay ** i
    depths: Tensor | None = None  # [N] the number of steps after which an anchor drops out
    counts: Sequence[int] | None = None  # anchors of each step in the whole batch, where this one is a part of it
    rule: str = "soft"  # a name in losses.py
    columns: Columns | None = None  # the tokens that losses are computed over; None: the whole draft vocabulary
    seed: int = 0  # of the random choices of a loss

    def of(self, found: Sequence[Step], x_NH: Tensor, head: nn.Linear, first: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The sum over steps i of decay ** i times the mean loss of step i, and these means. `x_NH`: the states before the head of all
        steps' anchors, one step after the other; they pass the head together, since it is the largest matrix and few rows use it badly.
        `first`: the number of the first of these steps. The sums of a batch's parts add up to the whole batch's."""
        sizes = [len(step.anchors) for step in found]
        shares = [self.decay**i / max(over, 1) for i, over in enumerate((self.counts or [0] * first + sizes)[first:], first)]
        rows = torch.cat([step.teacher_rows for step in found])
        pairs = zip(found, shares, strict=False)  # other parts of the batch may go on for more steps
        weight = torch.cat([self.within_M[step.teacher_rows].to(x_NH.dtype) * share for step, share in pairs])
        head_DH = head.weight
        if head.bias is not None:  # as one input more, which is always 1
            x_NH, head_DH = torch.cat([x_NH, torch.ones_like(x_NH[:, :1])], -1), torch.cat([head_DH, head.bias[:, None]], -1)
        total, terms = head_loss(x_NH, head_DH, self.distribution_RD, self.distribution_of_M[rows], weight, self.rule, self.columns)
        return total, [part.sum() / self.decay**i for i, part in enumerate(terms.split(sizes), first)]

    def padded(self, means: list[Tensor]) -> list[Tensor]:
        """A mean for every step, 0 for steps that no answer reached."""
        return means + [torch.zeros(())] * (self.steps - len(means))


def unrolled_loss(network: DraftNetwork, batch: Batch, supervision: Supervision) -> tuple[Tensor, list[Tensor]]:
    """EAGLE-3's loss: the sum over steps i of decay ** i times the mean loss of step i, and these means (EAGLE-3, draft model training)."""
    found = list(unroll(network, batch, supervision.steps, supervision.depths))
    total, means = supervision.of(found, network.norm(torch.cat([step.a for step in found])), network.lm_head)
    return total, supervision.padded(means)
