"""Claims about the training loop: it resumes to the last bit, its workers add up, and it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from eyas.config import EyasError
from eyas.files.target import load_target
from eyas.files.tensors import read_tensors
from eyas.train import trainer as training
from eyas.train.acceptance import simulate
from eyas.train.batches import make_batch, split_evenly
from eyas.train.features import Example
from eyas.train.trainer import Budget, Trainer
from eyas.train.unroll import Supervision, unrolled_loss
from tests.tiny import save_tiny_target, tiny_target
from tests.train.training import (
    FACTS,
    SETTINGS,
    assert_identical,
    examples,
    interrupt_at,
    make_trainer,
    one_line,
    silent,
    state_of,
)


@pytest.mark.parametrize(
    ("workers", "step_keep", "budget"),
    [(1, 0.5, Budget(steps=7)), (2, 0.5, Budget(steps=7)), (1, 1.0, Budget(tokens=500)), (2, 1.0, Budget(steps=7))],
    ids=str,
)
def test_a_run_that_was_stopped_twice_equals_one_that_was_not(tmp_path, workers, step_keep, budget):
    """Weights, optimiser and curve to the last bit; the batches of its second epoch too (an epoch has four)."""
    settings = replace(SETTINGS, step_keep=step_keep)
    whole = make_trainer(tmp_path / "whole", settings, workers, torch.float32)
    whole.run(budget, silent)
    for stop in (2, 5):
        parts = make_trainer(tmp_path / "parts", settings, workers, torch.float32)
        if stop > 2:
            parts.resume()
        with pytest.raises(KeyboardInterrupt):
            parts.run(budget, interrupt_at(stop))
    parts = make_trainer(tmp_path / "parts", settings, workers, torch.float32)
    parts.resume()
    assert parts.progress.steps == 5
    parts.run(budget, silent)
    assert parts.progress.steps > 5
    assert_identical(state_of(parts), state_of(whole))
    assert_identical(read_tensors(parts.out), read_tensors(whole.out))


def test_a_finished_run_goes_on_to_a_larger_budget(tmp_path):
    """The schedule is the budget's: what a run of 4 steps wrote is where one of 9 begins, not what one of 9 had after 4."""
    first = make_trainer(tmp_path)
    first.run(Budget(steps=4), silent)
    rates = []
    second = make_trainer(tmp_path)
    second.resume()
    assert_identical(second.network.state_dict(), first.network.state_dict())
    second.run(Budget(steps=9), lambda progress, losses, spent: rates.append(second.optimiser.param_groups[0]["lr"]))
    assert rates == [second.learning_rate(step / 9) for step in range(4, 9)]
    assert [point["step"] for point in second.progress.curve] == [4, 9]


def test_resuming_a_spent_budget_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(Budget(steps=3), silent)
    before = state_of(trainer)
    again = make_trainer(tmp_path)
    again.resume()
    again.run(Budget(steps=3), silent)
    assert_identical(state_of(again), before)


def test_batches_are_a_function_of_seed_and_epoch_and_lose_no_document(tmp_path):
    one, other = make_trainer(tmp_path), make_trainer(tmp_path)
    for epoch in range(2):
        batches = list(one.batches(epoch))
        assert batches == list(other.batches(epoch)) and len(batches) > 2
        assert sorted(map(id, (example for batch in batches for example in batch))) == sorted(map(id, examples()[4:]))
        assert all(sum(len(example.tokens) for example in batch) <= SETTINGS.tokens_per_batch for batch in batches)
    assert list(one.batches(0)) != list(one.batches(1))


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({"learning_rate": 1e-4}, {}, "learning_rate 0.003 there, 0.0001 here"),
        ({"unroll_steps": 3, "seed": 5}, {}, "unroll_steps 4 there, 3 here; seed 0 there, 5 here"),
        ({}, {"facts": {**FACTS, "target_sha256": "def"}}, "another target"),
        ({}, {"facts": {**FACTS, "taps_are_inputs_of_layers": [0, 1, 2]}}, "other taps"),
        ({}, {"ids": range(1, 41)}, "the data, and with it the draft vocabulary"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, settings, changes, reason):
    make_trainer(tmp_path).run(Budget(steps=1), silent)
    other = make_trainer(tmp_path, replace(SETTINGS, **settings), **changes)
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with pytest.raises(EyasError, match=reason) as caught:
        other.resume()
    assert "choose another --out" in one_line(caught)
    assert_identical(dict(other.network.state_dict()), before)


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    make_trainer(tmp_path).run(Budget(steps=1), silent)
    later = make_trainer(tmp_path, replace(SETTINGS, checkpoint_minutes=1.0))
    later.resume()
    assert later.progress.steps == 1


def test_no_checkpoint_or_a_damaged_one_is_one_line(tmp_path):
    trainer = make_trainer(tmp_path / "draft")
    with pytest.raises(EyasError, match="holds no checkpoint to resume from") as caught:
        trainer.resume()
    one_line(caught)
    trainer.run(Budget(steps=1), silent)
    file = trainer.out / training.CHECKPOINT
    data = file.read_bytes()
    for kept in (0, 10, len(data) // 2, len(data) - 30):
        file.write_bytes(data[:kept])
        with pytest.raises(EyasError, match="checkpoint is damaged or cut short") as caught:
            trainer.resume()
        one_line(caught)


def test_two_workers_give_the_gradient_of_one(tmp_path):
    """Every step's mean is over the anchors of the whole batch, though the parts' answers end at different depths."""
    settings = replace(SETTINGS, step_keep=1.0, clip=1e9, tokens_per_batch=400)
    one, two, three = (make_trainer(tmp_path, settings, workers) for workers in (1, 2, 3))
    batch = sorted(next(one.batches(0)), key=lambda example: sum(number >= 0 for number in example.answers))[:7]
    losses = [trainer.step(batch) for trainer in (one, two, three)]
    assert_close(torch.tensor(losses[1:]), torch.tensor(losses[:1] * 2))
    assert one.progress.slots == two.progress.slots == three.progress.slots > 0
    for parameter, second, third in zip(one.parameters, two.parameters, three.parameters):
        assert_close(second.grad, parameter.grad, rtol=1e-9, atol=1e-12)
        assert_close(third.grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_step_is_the_gradient_of_the_unrolled_loss(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, step_keep=1.0, clip=1e9))
    documents = list(examples()[4:8])
    batch, states = make_batch(documents, trainer.source, trainer.network)
    distribution, within = trainer.teacher.distribution(states.hidden), trainer.teacher.within(states.target_argmax)
    loss, losses = unrolled_loss(
        trainer.network, batch, Supervision(distribution, torch.arange(len(distribution)), within, 4, SETTINGS.step_decay)
    )
    expected = torch.autograd.grad(loss, trainer.parameters)
    *found, norm = trainer.step(documents)
    assert_close(torch.tensor(found), torch.stack(losses).float())
    assert trainer.progress.slots == len(batch.anchors()[0])
    assert norm == pytest.approx(float(torch.stack([gradient.norm() for gradient in expected]).norm()))
    for parameter, gradient in zip(trainer.parameters, expected):
        assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gradients_reach_every_parameter_and_only_those(tmp_path):
    trainer = make_trainer(tmp_path)
    embedding = trainer.network.embedding[0].clone()
    trainer.step(list(examples()[4:]))
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    assert torch.equal(trainer.network.embedding[0], embedding)


def test_step_keep_drops_slots_with_its_chance_and_never_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, step_keep=0.5))
    long = [Example(list(range(3)) * 700, [-1] + [0] * 2099)]
    depths = torch.cat([trainer.depths(long, f"{seed}") for seed in range(4)])
    counts = [int((depths > step).sum()) for step in range(4)]
    assert counts[0] == len(depths)
    for step in range(3):
        assert counts[step + 1] / counts[step] == pytest.approx(0.5, abs=0.04)


def test_parts_have_about_equal_tokens_and_lose_nothing():
    for parts in (1, 2, 3, 40):
        split = split_evenly(examples(), parts)
        assert sorted(map(id, (example for part in split for example in part))) == sorted(map(id, examples()))
        sizes = [sum(len(example.tokens) for example in part) for part in split]
        assert parts == 40 or max(sizes) - min(sizes) <= max(len(example.tokens) for example in examples())


def held_out_loss(trainer: Trainer) -> float:
    batch, states = make_batch(trainer.held_out, trainer.source, trainer.network)
    distribution, within = trainer.teacher.distribution(states.hidden), trainer.teacher.within(states.target_argmax)
    with torch.no_grad():
        return float(
            unrolled_loss(
                trainer.network, batch, Supervision(distribution, torch.arange(len(distribution)), within, 4, SETTINGS.step_decay)
            )[0]
        )


def test_sixty_steps_lower_the_held_out_loss(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, tokens_per_batch=300))
    before, losses = held_out_loss(trainer), []
    trainer.run(Budget(steps=60), lambda progress, now, spent: losses.append(now[0]))
    assert held_out_loss(trainer) < before - 0.3  # the larger part of it is the teacher's own entropy
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.5


def test_learning_rate_warms_up_and_falls_to_its_final_value(tmp_path):
    trainer = make_trainer(tmp_path)
    rates = []
    for step in range(41):
        trainer.progress.steps = step
        rates.append(trainer.learning_rate(step / 40))
    assert (
        rates[0] == pytest.approx(SETTINGS.learning_rate / SETTINGS.warmup_steps) and rates.index(max(rates)) == SETTINGS.warmup_steps - 1
    )
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(SETTINGS.final_learning_rate)


def test_a_saved_tiny_target_is_the_target_in_memory(tmp_path):
    config = load_target(save_tiny_target(tmp_path), "fp32").config
    assert config.vocab_size == 263 and config.eos_token_ids == (257,) and config.num_hidden_layers == 5
    loaded, made = load_target(tmp_path, "fp32"), tiny_target(dtype=torch.float32, prepare=False, vocab_size=263)
    assert_identical(dict(loaded.state_dict()), dict(made.state_dict()))


# ---- more than one layer ----


def test_a_second_layer_begins_by_adding_nothing_and_learns(tmp_path):
    """A fresh draft of two layers computes what one of one layer does; after training its second layer counts."""
    one, two = (make_trainer(tmp_path / str(count), replace(SETTINGS, draft_layers=count)) for count in (1, 2))
    ours = {name: value for name, value in two.network.state_dict().items() if not name.startswith("layers.")}
    assert_identical(ours, dict(one.network.state_dict()))
    assert one.network.config.draft_layers == 1 and len(two.network.blocks) == 2
    taus = [simulate(each.network, each.vocab, each.held_out, each.source, 4).tau() for each in (one, two)]
    assert taus[0] == taus[1]
    two.run(Budget(steps=60), silent)
    assert two.progress.best() > 1.2
    assert two.network.layers["1"].mlp.down_proj.weight.any() and two.network.layers["1"].self_attn.o_proj.weight.any()
