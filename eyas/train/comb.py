"""Attention over the comb of an unroll (unroll.py): an anchor sees its document's step-0 keys up to its own, and its own later keys.

In two forms that compute the same. On a CPU documents are taken one by one, each with as many keys as its last anchor sees. On CUDA a
launch takes longer than what it computes, so documents are padded to one length and computed together: as many launches for a hundred of
them as for one, and none waits for a number to come back. Knows queries, keys and where documents lie; knows nothing of networks or losses.

Axes: M rows of all documents, N anchors, B documents of at most L rows and A anchors, q/k heads, g query heads of a key head, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 8  # padded lengths are multiples of this: products of 16 bits want rows of 16 bytes

Keys = Sequence[tuple[Tensor, Tensor]]  # for each later step its keys and values [N, k, d] at the anchors that still count


class Comb:
    """A layer's step-0 keys and values, and what anchors make of them; document by document."""

    def __init__(self, k0: Tensor, v0: Tensor, lengths: Sequence[int], window: int | None = None) -> None:
        """`k0`, `v0` [M, k, d]; `lengths` [B]: rows of each document; `window`: how many positions a row sees, itself included (None:
        all)."""
        self.k0, self.v0, self.lengths, self.window = k0, v0, list(lengths), window
        self.ends = torch.tensor(self.lengths, device="cpu").cumsum(0)

    def __call__(self, q: Tensor, own: Keys, anchors: Tensor) -> Tensor:
        """Attention [N, q * d] of q [N, q, d]: anchor j sees step-0 keys 0..j of its document and its own later keys, in one softmax; of
        these only keys within the window. `anchors` [N]: their rows, ascending, on the CPU."""
        N, heads, d = q.shape
        q = q.view(N, self.k0.shape[1], -1, d) * d**-0.5
        mixed, shares = self.over_documents(q, self.own_scores(q, own), anchors, len(own))
        return self.with_own(mixed, shares, own).reshape(N, heads * d)

    def own_scores(self, q: Tensor, own: Keys) -> Tensor:
        """Scores [N, k, g, own] of the anchors' own keys. At step s anchor j lies at position j + s, its key of step i at j + i."""
        step = len(own)
        scores = self.of_own(q, own) if own else q.new_zeros(*q.shape[:-1], 0)
        if self.window is not None and step > self.window:
            scores[..., : step - self.window] = float("-inf")
        return scores

    def of_own(self, q: Tensor, own: Keys) -> Tensor:
        return torch.stack([(q * k[:, :, None]).sum(-1) for k, _ in own], -1)

    def over_documents(self, q: Tensor, own_scores: Tensor, anchors: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The step-0 part of the result [N, k, g, d], and the softmax shares [N, k, g, own] of the anchors' own keys."""
        outputs, start, first = [], 0, 0
        ends = torch.searchsorted(anchors, self.ends).tolist()
        for length, end in zip(self.lengths, ends, strict=True):
            if end > first:
                places = anchors[first:end] - start
                last = int(places[-1]) + 1  # no anchor sees keys behind the last one
                hidden = self.hidden(torch.arange(last, device="cpu"), places[:, None], step).to(q.device)
                rows = slice(start, start + last)
                outputs.append(one_document(q[first:end], self.k0[rows], self.v0[rows], own_scores[first:end], hidden))
            start, first = start + length, end
        mixed, shares = zip(*outputs, strict=True)
        return torch.cat(mixed), torch.cat(shares)

    def hidden(self, keys: Tensor, places: Tensor, step: int) -> Tensor:
        """Which step-0 keys the anchors at these places of their document do not see."""
        hidden = keys > places
        return hidden if self.window is None else hidden | (keys <= places + step - self.window)

    def with_own(self, mixed: Tensor, shares: Tensor, own: Keys) -> Tensor:
        for i, (_, v) in enumerate(own):
            mixed = mixed + shares[..., i, None] * v[:, :, None]
        return mixed


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


class PaddedComb(Comb):
    """The same for all documents at once, padded to one length."""

    def __init__(self, k0: Tensor, v0: Tensor, lengths: Sequence[int], window: int | None = None) -> None:
        super().__init__(k0, v0, lengths, window)
        self.longest = aligned(max(self.lengths))
        rows = torch.arange(int(self.ends[-1]), device="cpu")
        document, place = self.places(rows)
        index = moved(document * self.longest + place, k0.device)
        # [B * k, d, L] and [B * k, L, d]; no anchor sees a row that pads
        self.keys = self.padded(k0, index, self.longest).permute(0, 2, 3, 1).flatten(0, 1)
        self.values = self.padded(v0, index, self.longest).transpose(1, 2).flatten(0, 1)

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For rows [n] of the batch the document and the place there, on the CPU."""
        document = torch.searchsorted(self.ends, rows, right=True)
        starts = self.ends - torch.tensor(self.lengths, device="cpu")
        return document, rows - starts[document]

    def padded(self, x: Tensor, index: Tensor, width: int) -> Tensor:
        """Rows x [n, ..] laid into [B, width, ..] where `index` says, with zeros elsewhere."""
        spread = x.new_zeros(len(self.lengths) * width, *x.shape[1:]).index_copy(0, index, x)
        return spread.unflatten(0, (-1, width))

    def over_documents(self, q: Tensor, own_scores: Tensor, anchors: Tensor, step: int) -> tuple[Tensor, Tensor]:
        document, place = self.places(anchors)
        counts = torch.bincount(document, minlength=len(self.lengths))
        width = aligned(int(counts.max()))
        cell = document * width + torch.arange(len(anchors), device="cpu") - (counts.cumsum(0) - counts)[document]
        index, place = moved(torch.stack([cell, place]), q.device)
        places = self.padded(place, index, width)[:, None, None, :, None]  # [B, 1, 1, A, 1]; cells without an anchor see the first key
        hidden = self.hidden(torch.arange(self.longest, device=q.device), places, step)
        q_BkgAd = self.padded(q, index, width).permute(0, 2, 3, 1, 4)
        scores = torch.bmm(q_BkgAd.flatten(2, 3).flatten(0, 1), self.keys).view(*q_BkgAd.shape[:-1], self.longest)
        own_BkgAi = self.padded(own_scores, index, width).permute(0, 2, 3, 1, 4)
        shares = torch.cat([scores.masked_fill(hidden, float("-inf")), own_BkgAi], -1).softmax(-1)
        seen = shares[..., : self.longest].flatten(2, 3).flatten(0, 1)
        mixed = torch.bmm(seen, self.values).view(q_BkgAd.shape)
        of_anchors = (each.permute(0, 3, 1, 2, 4).flatten(0, 1).index_select(0, index) for each in (mixed, shares[..., self.longest :]))
        first, own = of_anchors
        return first, own

    def of_own(self, q: Tensor, own: Keys) -> Tensor:
        return (q[:, :, :, None] * torch.stack([k for k, _ in own], 2)[:, :, None]).sum(-1)

    def with_own(self, mixed: Tensor, shares: Tensor, own: Keys) -> Tensor:
        return mixed + (shares[..., None] * torch.stack([v for _, v in own], 2)[:, :, None]).sum(-2) if own else mixed


def aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def moved(index: Tensor, device: torch.device) -> Tensor:
    """Numbers that were settled on the CPU, on another device; nothing waits for them."""
    return index.to(device, non_blocking=True)


def comb_over(k0: Tensor, v0: Tensor, lengths: Sequence[int], window: int | None = None) -> Comb:
    """The comb in the form that suits the device."""
    return (Comb if k0.device.type == "cpu" else PaddedComb)(k0, v0, lengths, window)
