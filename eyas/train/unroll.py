"""The training-time test: run the draft on its own output for several steps, as decoding will (EAGLE-3, draft model training).

An unroll is a comb-shaped tree: the parent of (step i, anchor j) is (i-1, j), and the parent of (0, j) is (0, j-1). So under the rule that
a row sees its ancestors, it sees step-0 keys 0..j and the later keys of its own anchor. It never sees a later step-0 key, whose feature
the target would not have computed yet. Here that is computed as causal scores against step 0 and one dot product for each own key, in one
softmax; the tests compare it with the dense mask. Each decoder layer has a comb of its own.
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
from eyas.train.losses import Columns, head_loss

# Axes: M rows of all documents of a batch, N anchors that count at a step, H model width, D draft vocabulary, q/k heads, d head width


@dataclass
class Batch:
    """The documents of one batch, laid end to end: M rows."""

    tokens: Tensor  # [M] int64
    features: Tensor  # [M, taps * H]
    answers: Tensor  # [M] int64: number of the answer a token belongs to (different for every answer of the batch), -1 outside
    lengths: list[int]  # tokens of each document; they sum to M
    hidden: Tensor | None = None  # [M, H] the target's last hidden states, after its final norm

    def wanted(self, wants: Sequence[int]) -> Tensor:
        """What a draft with these `wants` reads of the target: last hidden states [M, H], or features [M, taps * H]."""
        wanted = self.hidden if wants == LAST_HIDDEN else self.features
        assert wanted is not None, "last hidden states are kept for those who read them"
        return wanted

    def anchors(self) -> tuple[Tensor, Tensor]:
        """The anchors: rows [N] that count at step 0, and for how many steps each counts. Row j counts at step i where t_{j+1} and
        t_{j+2+i} lie in one answer."""
        return loss_anchors(self.answers, self.lengths)

    def taught(self) -> tuple[Tensor, Tensor]:
        """The rows [R] before a token of an answer, whose distributions teach; and for every row [M] its index among these, or 0."""
        before = torch.cat([self.answers[1:] >= 0, torch.tensor([False])])
        return before.nonzero()[:, 0], (before.cumsum(0) - 1).clamp_min(0)


def loss_anchors(answers: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """`Batch.anchors` from answer numbers [M] and documents' lengths alone, before there are features."""
    changes = torch.cat([(answers[1:] != answers[:-1]).nonzero()[:, 0], torch.tensor([len(answers) - 1])])
    last = changes[torch.searchsorted(changes, torch.arange(len(answers)))]  # last row of the answer a row belongs to
    rows = torch.arange(len(answers) - 1)
    counted = torch.where(answers[1:] >= 0, last[1:] - rows - 1, 0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    counted[starts[1:-1] - 1] = 0  # a document's last row has no next token of its own
    anchors = (counted > 0).nonzero()[:, 0]
    return anchors, counted[anchors]


class Step(NamedTuple):
    """The draft's output at the anchors that count at one step."""

    anchors: Tensor  # [N] rows of the batch
    a: Tensor  # [N, H] the draft's output, before its final norm
    teacher_rows: Tensor  # [N] rows of the batch whose distribution is the teacher: anchor + 1 + step


def unroll(network: EagleModule, batch: Batch, steps: int, depths: Tensor | None = None) -> Iterator[Step]:
    """Yield each of up to `steps` steps; gradients flow through all of them. `depths` [N]: the number of steps after which an anchor drops
    out (default: at its answer's end)."""
    place = torch.cat([torch.arange(length) for length in batch.lengths])
    following = torch.cat([batch.tokens, batch.tokens.new_zeros(steps)])
    anchors, counted = batch.anchors()
    counted = counted if depths is None else torch.minimum(counted, depths)
    g = network.fuse(batch.wanted(network.wants))
    a, layers = g, [Layer(block, batch.lengths, network.window) for block in network.blocks]
    for step in range(steps):
        if step == 0:  # at every row, since anchors see the keys of all earlier rows
            read, residual = network.join(following[1 : len(g) + 1], g)
            positions = place
        else:
            going = counted > step
            anchors, counted, a = anchors[going], counted[going], a[going]
            if len(anchors) == 0:  # every answer is shorter than this step reaches
                return
            for layer in layers:
                layer.own = [(k[going], v[going]) for k, v in layer.own]
            read, residual = network.join(following[anchors + 1 + step], network.fed_back(a))
            positions = place[anchors] + step
        a = through(layers, read, residual, network.rotary(positions, network.dtype), anchors)
        yield Step(anchors, a, anchors + 1 + step)


class Layer:
    """One decoder layer of the comb: its keys and values of step 0 at every row, and of each later step at the anchors that still
    count."""

    def __init__(self, block: DraftLayer, lengths: list[int], window: int | None = None) -> None:
        """`window`: how many positions a row sees, itself included; None: all."""
        self.block, self.lengths, self.window = block, lengths, window
        self.spine: tuple[Tensor, Tensor] | None = None  # keys and values of step 0, [M, k, d] each
        self.own: list[tuple[Tensor, Tensor]] = []  # for each later step its keys and values, [N, k, d] each

    def __call__(self, read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], anchors: Tensor) -> Tensor:
        """The layer's output [N, H] at the anchors. `read` and `residual` have a row for each anchor, at step 0 for each row of the
        batch."""
        q, k, v = heads(self.block, read, rotation)
        if self.spine is None:
            self.spine = k, v
            q, residual = q[anchors], residual[anchors]
        else:
            self.own.append((k, v))
        x = residual + self.block.self_attn.out(comb_attention(q, *self.spine, self.own, anchors, self.lengths, self.window))
        return x + self.block.mlp(self.block.post_attention_layernorm(x))


def through(layers: list[Layer], read: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], anchors: Tensor) -> Tensor:
    """The output a [N, H] of all layers at the anchors. At step 0 every layer but the last is computed at all rows, since the next layer's
    keys are made of its outputs."""
    everywhere = anchors if layers[-1].spine else torch.arange(len(residual))
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


def comb_attention(
    q: Tensor,
    k0: Tensor,
    v0: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    anchors: Tensor,
    lengths: list[int],
    window: int | None = None,
) -> Tensor:
    """Attention over the comb, [N, q*d]: anchor j sees step-0 keys 0..j of its document and its own later keys, in one softmax; of these
    only keys within a `window` of its position, where there is one. Documents are computed one by one."""
    N, heads_q, d = q.shape
    groups = heads_q // k0.shape[1]
    q = q.view(N, -1, groups, d) * d**-0.5
    own_scores = torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in own], -1) if own else q.new_zeros(*q.shape[:-1], 0)  # [N,k,g,own]
    step, outputs, start, first = len(own), [], 0, 0  # anchor j lies at position j + step, its key of step i at j + i
    if window is not None and step > window:
        own_scores[..., : step - window] = float("-inf")
    ends = torch.searchsorted(anchors, torch.tensor(lengths).cumsum(0)).tolist()
    for length, end in zip(lengths, ends, strict=True):
        if end > first:
            rows = anchors[first:end] - start
            last = int(rows[-1]) + 1  # no anchor sees keys behind the last one
            hidden = torch.arange(last)[None] > rows[:, None]
            if window is not None:
                hidden |= torch.arange(last)[None] <= rows[:, None] + step - window
            outputs.append(one_document(q[first:end], k0[start : start + last], v0[start : start + last], own_scores[first:end], hidden))
        start, first = start + length, end
    mixed = torch.cat([out for out, _ in outputs])
    shares = torch.cat([share for _, share in outputs])
    for i, (_, v) in enumerate(own):
        mixed = mixed + shares[..., i, None] * v[:, :, None]
    return mixed.reshape(N, heads_q * d)


def one_document(q: Tensor, k0: Tensor, v0: Tensor, own_scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of n anchors of one document, q [n,k,g,d], over its m step-0 keys [m,k,d]. Returns the step-0 part of the result [n,k,g,d],
    and the softmax shares [n,k,g,own] of the anchors' own keys."""
    n, kv_heads, groups, d = q.shape
    folded = q.permute(1, 2, 0, 3).reshape(kv_heads, groups * n, d)
    scores = torch.bmm(folded, k0.permute(1, 2, 0)).view(kv_heads, groups, n, -1).masked_fill(hidden, float("-inf"))
    shares = torch.cat([scores, own_scores.permute(1, 2, 0, 3)], -1).softmax(-1)
    m = k0.shape[0]
    mixed = torch.bmm(shares[..., :m].reshape(kv_heads, groups * n, m), v0.transpose(0, 1)).view(kv_heads, groups, n, d)
    return mixed.permute(2, 0, 1, 3), shares[..., m:].permute(2, 0, 1, 3)


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
