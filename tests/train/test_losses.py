"""Claims about the losses: values and gradients are those that autograd finds for the plain formula, chunk by chunk or at once."""

from __future__ import annotations

import pytest
import torch

from eyas.config import EyasError
from eyas.train import losses
from eyas.train.losses import LOSSES, choose_columns, head_loss

N, H, D, R = 13, 6, 17, 9


def plain(kind: str, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """[n] as the formulas stand in the papers."""
    entropy, accepted = -(p * q.log()).sum(-1), torch.minimum(p, q).sum(-1)
    w = (-3 * accepted).exp().detach()
    return {"soft": entropy, "lk-alpha": -accepted.log(), "lk-lambda": w * entropy + (1 - w) * (1 - accepted)}[kind]


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_of_the_plain_formula(kind, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(N, H, generator=draw, dtype=torch.float64).requires_grad_()
    head = torch.randn(D, H, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = (2 * torch.randn(R, D, generator=draw, dtype=torch.float64)).softmax(-1)
    place, weight = torch.randint(0, R, (N,), generator=draw), torch.rand(N, generator=draw, dtype=torch.float64)
    total, terms = head_loss(x, head, teacher, place, weight, kind)
    found = torch.autograd.grad(3 * total, [x, head])
    expected_terms = weight * plain(kind, (x @ head.T).softmax(-1), teacher[place])
    expected = torch.autograd.grad(3 * expected_terms.sum(), [x, head])
    torch.testing.assert_close(terms, expected_terms.detach())
    torch.testing.assert_close(found, expected)


def register_plainly(kind: str, monkeypatch) -> None:
    """The loss of this kind as a user would write it, under the name "plainly"."""
    monkeypatch.setattr(losses, "LOSSES", dict(LOSSES))
    losses.register("plainly", lambda log_q, p: plain(kind, log_q.exp(), p))


@pytest.mark.parametrize("kind", ["soft", "lk-alpha", "lk-lambda"])
def test_a_loss_written_plainly_is_the_one_with_its_slope_derived_by_hand(kind, monkeypatch):
    """Values and gradients, by chunks."""
    monkeypatch.setattr(losses, "CHUNK", 4)
    register_plainly(kind, monkeypatch)
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(N, H, generator=draw, dtype=torch.float64).requires_grad_()
    head = torch.randn(D, H, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = (2 * torch.randn(R, D, generator=draw, dtype=torch.float64)).softmax(-1)
    place, weight = torch.randint(0, R, (N,), generator=draw), torch.rand(N, generator=draw, dtype=torch.float64)
    found = []
    for name in (kind, "plainly"):
        total, terms = head_loss(x, head, teacher, place, weight, name)
        found.append((total.detach(), terms, *torch.autograd.grad(total, [x, head])))
    torch.testing.assert_close(*found)


def test_a_loss_that_cannot_be_registered_or_is_no_loss_is_one_line(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(LOSSES))
    with pytest.raises(EyasError, match="loss 'soft' exists already; choose another name"):
        losses.register("soft", plain)
    with pytest.raises(EyasError, match="loss 'mine' needs either a loss"):
        losses.register("mine")
    losses.register("whole", lambda log_q, p: -(p * log_q).mean())
    x, head, teacher = torch.randn(3, H), torch.randn(D, H), torch.full((1, D), 1 / D)
    with pytest.raises(EyasError, match=r"loss 'whole' must make one differentiable number of each row, \[3\], not \(\)"):
        head_loss(x.requires_grad_(), head, teacher, torch.zeros(3, dtype=torch.int64), torch.ones(3), "whole")


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_leads_from_a_cold_start_to_a_draft_that_is_accepted(kind):
    """Free logits that begin with a tenth of acceptance end near all of it."""
    draw = torch.Generator().manual_seed(2)
    teacher = (3 * torch.randn(5, D, generator=draw, dtype=torch.float64)).softmax(-1)
    logits = (-(teacher + 1e-3).log()).requires_grad_()
    head, rows, weight = torch.eye(D, dtype=torch.float64), torch.arange(5), torch.full((5,), 0.2, dtype=torch.float64)

    def accepted() -> float:
        return float(torch.minimum(logits.softmax(-1), teacher).sum(-1).mean())

    optimiser, before = torch.optim.Adam([logits], lr=0.05), accepted()
    for _ in range(400):
        optimiser.zero_grad()
        head_loss(logits, head, teacher, rows, weight, kind)[0].backward()
        optimiser.step()
    assert before < 0.1 and accepted() > 0.97


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("kind", ["soft", "lk-alpha", "lk-lambda"])
def test_columns_estimate_the_whole_vocabulary_without_bias(kind, plainly, monkeypatch):
    """All columns: the loss itself. Some: the gradient, averaged over many choices, comes near the whole one."""
    if plainly:
        register_plainly(kind, monkeypatch)
        kind = "plainly"
    draw = torch.Generator().manual_seed(3)
    x = (0.3 * torch.randn(N, H, generator=draw, dtype=torch.float64)).requires_grad_()
    head = torch.randn(D, H, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = (2 * torch.randn(R, D, generator=draw, dtype=torch.float64)).softmax(-1)
    place, weight = torch.randint(0, R, (N,), generator=draw), torch.full((N,), 1 / N, dtype=torch.float64)

    def gradient(columns):
        return torch.autograd.grad(head_loss(x, head, teacher, place, weight, kind, columns)[0], [x, head])

    whole = gradient(None)
    torch.testing.assert_close(gradient(choose_columns(teacher, 1, D, 0)), whole)
    some = [choose_columns(teacher, 1, 7, seed) for seed in range(300)]
    assert all(len(columns.ids) < D and float(columns.weight.sum()) == pytest.approx(D) for columns in some)
    for index, exact in enumerate(whole):
        mean = torch.stack([gradient(columns)[index] for columns in some]).mean(0)
        assert float((mean - exact).norm() / exact.norm()) < 0.15
