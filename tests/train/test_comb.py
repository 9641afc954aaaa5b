"""Claims about the comb's two forms: document by document and padded they are one function, and the padded one takes as many operations
for many documents as for few."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from eyas.train import unroll as unrolling
from eyas.train.comb import Comb, PaddedComb, comb_over
from eyas.train.unroll import Supervision, unrolled_loss
from tests.tiny import tiny_draft, tiny_target
from tests.train.test_unroll import documents, packed, random_features

KV, GROUPS, WIDTH = 2, 3, 4


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def drawn(lengths: list[int], share: float, own: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k0, v0 and `own` keys and values, and anchors: this share of all rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    anchors = (torch.rand(rows, generator=draw) < share).nonzero()[:, 0]
    shapes = [(len(anchors), KV * GROUPS), (rows, KV), (rows, KV), *[(len(anchors), KV)] * (2 * own)]
    return [torch.randn(*shape, WIDTH, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes], anchors


def result(form, tensors: list[torch.Tensor], anchors: torch.Tensor, lengths: list[int], window: int | None) -> list[torch.Tensor]:
    """The attention, and the gradients of a sum over it with weights of no pattern."""
    q, k0, v0, *rest = tensors
    found = form(k0, v0, lengths, window)(q, list(zip(rest[::2], rest[1::2])), anchors)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).sin().view_as(found)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), tensors)]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("own", [0, 1, 3])
@pytest.mark.parametrize(("lengths", "share"), [([5, 17, 1, 8], 0.6), ([30], 0.2), ([8, 8], 1.0), ([1, 2, 1, 40, 3], 0.15)])
def test_padded_documents_are_documents_one_by_one(lengths, share, own, window):
    tensors, anchors = drawn(lengths, share, own, seed=sum(lengths) + own)
    assert 0 < len(anchors) <= sum(lengths)
    for ours, theirs in zip(*(result(form, tensors, anchors, lengths, window) for form in (PaddedComb, Comb)), strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_on_a_cpu_documents_are_taken_one_by_one():
    (_, k0, v0), _ = drawn([4, 3], 1.0, 0, 0)
    assert type(comb_over(k0, v0, [4, 3])) is Comb


def operations(count: int, monkeypatch) -> Counter[str]:
    """Those of a step's loss and gradients in the padded form, for so many copies of some documents."""
    monkeypatch.setattr(unrolling, "comb_over", PaddedComb)
    target = tiny_target()
    network, vocab = tiny_draft(target)
    docs = documents(target.config.vocab_size) * count
    batch = packed(docs, random_features(docs))
    taught, place = batch.taught()
    even = torch.full((len(taught), len(vocab)), 1 / len(vocab)).double()
    supervision = Supervision(even, place, torch.ones(len(batch.tokens)) > 0, 4, 0.8)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with Operations() as found:
        loss, _ = unrolled_loss(network, batch, supervision)
        torch.autograd.grad(loss, parameters)
    return found.counts


def test_a_step_takes_as_many_operations_for_many_documents_as_for_few(monkeypatch):
    few, many = operations(1, monkeypatch), operations(6, monkeypatch)
    per_document = few.pop("aten::arange") - many.pop("aten::arange")  # the places of each document, on the CPU
    assert few == many and per_document < 0 and few.total() > 300
