"""Claims about training in bfloat16: one step's gradients are float32's within its rounding, it learns as well, and the choice is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eyas.config import EyasError, TrainSettings
from eyas.kernels.linear import Dense
from eyas.kernels.lowered import Matrices, logits, lowered
from eyas.methods import trained
from eyas.train import trainer as training
from eyas.train.build import check_products
from eyas.train.trainer import Budget, Trainer
from tests.train.training import SETTINGS, assert_identical, examples, interrupt_at, make_trainer, one_line, silent, state_of

UNIT = 2**-8  # the most that rounding to bfloat16 changes a number, as a share of it; it is even up to that, so half of it is usual
METHOD_STEPS = {"eagle1": 1}  # unroll steps of a method that learns so many; others learn as many as asked for


def trainer_of(out, method: str = "eagle3", products: str = "bf16", workers: int = 1, **changes) -> Trainer:
    own = {"unroll_steps": METHOD_STEPS.get(method, 3), "sampled_columns": 0, "products": products, **changes}
    trainer = make_trainer(out, replace(SETTINGS, **own), workers, torch.float32, method=method)
    for head in getattr(trainer.network, "frozen", []):
        head.to(torch.float32)
    return trainer


def gradients_of(trainer: Trainer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    documents = list(examples()[4:8])
    depths = trainer.depths(documents, "same")
    counts = [int((depths > step).sum()) for step in range(trainer.settings.unroll_steps)]
    return trainer.gradients(documents, depths, counts, "soft", 1)


@pytest.mark.parametrize("method", trained())
def test_gradients_of_a_step_are_those_of_fp32_within_the_rounding_of_bfloat16(method, tmp_path):
    """A step has six products in a row, the head's included, and its gradient as many backwards. Each rounds two operands and what it sums,
    by half a unit as a rule; these errors have independent signs, so they add up as squares do. Twice what that makes is allowed."""
    low, full = (trainer_of(tmp_path, method, products) for products in ("bf16", "fp32"))
    roundings = 3 * 2 * 6 * full.settings.unroll_steps
    bound = 2 * roundings**0.5 * UNIT / 2
    (ours, losses), (theirs, expected) = gradients_of(low), gradients_of(full)
    assert bound < 0.041
    differ = 0
    for (name, _), our, their in zip(full.network.named_parameters(), ours, theirs, strict=True):
        assert our.dtype == torch.float32
        assert float((our - their).norm()) <= bound * float(their.norm()), name
        differ += not torch.equal(our, their)
    assert differ > len(ours) / 2
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=bound, atol=0)


def test_gradients_of_shared_and_biased_layers_are_those_of_the_rounded_operands():
    """Operands that bfloat16 holds exactly: what is left is the rounding of results. A frozen layer, an input that needs no gradient, two
    uses of one matrix, and one matrix in two stacks."""
    draw = torch.Generator().manual_seed(3)
    layers = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 6)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=draw).float()
    layers[1].weight.requires_grad_(False)
    x = torch.randint(-3, 4, (5, 8), generator=draw).float()
    both, first = Dense(*layers), Dense(layers[0])
    parameters = [layers[0].weight, layers[0].bias, layers[1].bias]

    def loss() -> torch.Tensor:
        return both(x).sum() + (both(x[:2])[:, :4] * first(x[2:4])).sum() + both(x[:0]).sum()

    expected = torch.autograd.grad(loss(), parameters)
    with lowered(Matrices()) as part:
        total = loss()
    torch.testing.assert_close(part.gradients(total, parameters), list(expected), rtol=2 * UNIT, atol=0)


def test_logits_near_the_likely_one_are_off_by_the_rounding_of_their_distance():
    draw = torch.Generator().manual_seed(4)
    x, head = torch.randn(6, 64, generator=draw).bfloat16(), torch.randn(40, 64, generator=draw).bfloat16()
    exact = x.double() @ head.double().t()
    likely = exact.argmax(-1)
    middle = exact.gather(1, likely[:, None])
    off = (logits(x, head, likely).double() - exact).abs()
    assert float(exact.abs().max()) > 16
    near = 0.5  # the middle is known to bfloat16 only: this much of every distance is not its own
    assert bool((off <= UNIT * ((exact - middle).abs() + near)).all())


def test_the_curve_of_bfloat16_is_that_of_fp32_within_the_noise_of_seeds(tmp_path):
    """Thirty steps from one beginning: the losses of both differ less than those of two seeds do."""
    curves = {}
    for products, seed in (("fp32", 0), ("bf16", 0), ("fp32", 1)):
        trainer = trainer_of(tmp_path, products=products, sampled_columns=8, seed=seed)
        trainer.measure = trainer.rank = lambda: None
        trainer.save = lambda: None
        losses: list[float] = []
        trainer.run(Budget(steps=30), lambda progress, now, spent, losses=losses: losses.append(now[0]))
        curves[products, seed] = torch.tensor(losses).view(6, 5).mean(1)
    full = curves["fp32", 0]
    assert full[-1] < full[0] - 0.3
    noise = float((curves["fp32", 1] - full).square().mean().sqrt())
    assert 0 < float((curves["bf16", 0] - full).square().mean().sqrt()) < noise
    assert float(curves["bf16", 0][-1] - full[-1]) < noise


def test_a_run_in_bfloat16_that_was_stopped_equals_one_that_was_not(tmp_path):
    whole = trainer_of(tmp_path / "whole", workers=2)
    whole.run(Budget(steps=4), silent)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "parts", workers=2).run(Budget(steps=4), interrupt_at(2))
    parts = trainer_of(tmp_path / "parts", workers=2)
    parts.resume()
    parts.run(Budget(steps=4), silent)
    assert_identical(state_of(parts), state_of(whole))


# ---- the choice ----


def pretend(monkeypatch, quicker: str) -> None:
    """A CPU on which this number format is the quicker one, and a clock that knows it."""
    now = [0.0]
    gradients = Trainer.gradients

    def slow(self, *given):
        now[0] += 0.25 if self.settings.products == quicker else 0.5
        return gradients(self, *given)

    monkeypatch.setattr(Trainer, "gradients", slow)
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(training, "LARGE", 0)


@pytest.mark.parametrize(("quicker", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_what_a_measured_second_finds_quicker_is_chosen_recorded_and_kept(quicker, other, tmp_path, monkeypatch):
    pretend(monkeypatch, quicker)
    trainer = trainer_of(tmp_path, products="auto")
    trainer.run(Budget(steps=2), silent)
    state = state_of(trainer)
    assert state["settings"]["products"] == quicker
    assert state["facts"]["products_seconds"] == {quicker: 0.25, other: 0.5}
    assert f'"products": "{quicker}"' in (tmp_path / "training.json").read_text()
    pretend(monkeypatch, other)
    again = trainer_of(tmp_path, products="auto")
    again.resume()
    again.run(Budget(steps=3), silent)
    assert state_of(again)["settings"]["products"] == quicker
    assert state_of(again)["facts"]["products_seconds"] == {quicker: 0.25, other: 0.5}
    named = trainer_of(tmp_path, products=other)  # a machine may be another: who names it has it
    named.resume()
    assert named.settings.products == other and named.progress.steps == 3


def test_measuring_trains_nothing(tmp_path, monkeypatch):
    one = trainer_of(tmp_path, products="fp32")
    pretend(monkeypatch, "fp32")
    other = trainer_of(tmp_path, products="auto")
    batch = next(one.batches(0))
    assert one.step(batch) == other.step(batch)
    assert_identical(dict(one.network.state_dict()), dict(other.network.state_dict()))


def test_small_drafts_and_cpus_without_bfloat16_train_in_fp32_unmeasured(tmp_path, monkeypatch):
    for has, large in ((True, 1 << 20), (False, 0)):
        monkeypatch.setattr(training, "cpu_multiplies_bfloat16", lambda has=has: has)
        monkeypatch.setattr(training, "LARGE", large)
        trainer = trainer_of(tmp_path, products="auto")
        trainer.step(next(trainer.batches(0)))
        assert trainer.settings.products == "fp32" and "products_seconds" not in trainer.facts


def test_a_checkpoint_from_before_there_was_a_choice_goes_on_as_it_was(tmp_path):
    trainer_of(tmp_path, products="fp32").run(Budget(steps=1), silent)
    state = torch.load(tmp_path / training.CHECKPOINT, weights_only=True)
    del state["settings"]["products"]
    for autocast, products in ((False, "fp32"), (True, "bf16")):
        later = trainer_of(tmp_path, products="auto")
        later.resume({**state, "settings": {**state["settings"], "autocast": autocast}})
        assert later.settings.products == products


def test_products_that_are_not_known_or_not_possible_are_one_line():
    with pytest.raises(EyasError, match="products must be one of auto, fp32, bf16, not 'fp16'") as caught:
        TrainSettings(products="fp16")
    one_line(caught)
    with pytest.raises(EyasError, match="products=bf16 trains on CPUs and on CUDA; on mps leave it out") as caught:
        check_products(TrainSettings(products="bf16"), "mps")
    one_line(caught)
