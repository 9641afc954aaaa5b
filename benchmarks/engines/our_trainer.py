"""Ours beside speculators' trainer: eyas' own trainer on some examples, turn by turn, and what is handed to the other side as files.

Knows eyas' trainer and nothing of speculators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from turns import THREADS, Clock, Turn

from eyas.config import TrainSettings, default_taps
from eyas.files.target import load_target
from eyas.train.batches import make_batch, split_evenly
from eyas.train.build import new_draft
from eyas.train.features import Example, ShardStates
from eyas.train.teacher import Teacher
from eyas.train.trainer import Run, Trainer
from eyas.train.unroll import Supervision, unrolled_loss


class Ours:
    """eyas' own trainer on some examples, as `eyas train` makes it but for what is held out."""

    def __init__(self, directory: Path, examples: list[Example], vocabulary_from: list[Example], settings: TrainSettings) -> None:
        target = load_target(directory, "fp32")
        layers = target.config.num_hidden_layers
        network, vocab = new_draft(target, default_taps(layers), vocabulary_from, settings)
        self.norm = target.model.norm.weight.detach().float().clone()
        teacher = Teacher.of(target, vocab, torch.float32)
        self.trainer = Trainer(
            Run(
                network=network,
                vocab=vocab,
                teacher=teacher,
                examples=examples,
                held_out=[],
                source=ShardStates(),
                settings=settings,
                out=None,
                facts={},
                target_layers=layers,
                workers=THREADS,
            )
        )
        self.batches = list(self.trainer.batches(0))
        self.step(self.batches[0])  # warms up

    def step(self, batch: list[Example]) -> Turn:
        trainer = self.trainer
        parts = [part for part in split_evenly(batch, trainer.workers) if part]
        seeds = [f"{trainer.settings.seed}-{trainer.progress.steps}-{number}" for number in range(len(parts))]
        depths = torch.cat([trainer.depths(part, seed) for part, seed in zip(parts, seeds)])
        slot_steps = int(depths.clamp_max(trainer.settings.unroll_steps).sum())
        for group in trainer.optimiser.param_groups:
            group["lr"] = trainer.learning_rate(0.0)
        before, clock = trainer.progress.slots, Clock()
        trainer.step(batch)
        return Turn(*clock.passed(), trainer.progress.slots - before, slot_steps, 1)

    def turn(self) -> Turn:
        done = [self.step(batch) for batch in self.batches]
        return Turn(*(sum(values) for values in zip(*(asdict(turn).values() for turn in done))))

    def losses(self, example: Example) -> tuple[list[float], Tensor, Tensor, float]:
        """Mean KL(target | draft) of each step over our anchors, these as marks [steps, M] of the token read last, anchors a step, and the
        share of anchors whose likeliest is outside the draft vocabulary."""
        trainer, steps = self.trainer, self.trainer.settings.unroll_steps
        batch, states = make_batch([example], trainer.source, trainer.network)
        taught, teacher_of = batch.taught()
        distribution = trainer.teacher.distribution(states.hidden[taught])
        all_count = torch.ones(len(batch.tokens), dtype=torch.bool)
        with torch.no_grad():
            _, means = unrolled_loss(trainer.network, batch, Supervision(distribution, teacher_of, all_count, steps, 1.0))
        anchors, counted = batch.anchors()
        entropy = torch.special.entr(distribution).sum(-1)
        found, marks = [], torch.zeros(steps, len(batch.tokens), dtype=torch.bool)
        for step in range(steps):
            rows = anchors[counted > step] + 1 + step
            found.append(float(means[step] - entropy[teacher_of[rows]].mean()))
            marks[step, rows] = True
        outside = 1 - float(trainer.teacher.within(states.target_argmax[anchors + 1]).float().mean())
        return found, marks, marks.sum(1), outside


def hand_over(folder: Path, ours: Ours, examples: Sequence[Example], chosen: Example) -> None:
    """Conversations, vocabulary and weights as files that the child can read without eyas."""
    trainer, tensors = ours.trainer, {}
    for number, example in enumerate(examples):
        states = trainer.source.states([example])
        answers = torch.tensor(example.answers)
        tensors[f"{number}.tokens"] = torch.tensor(example.tokens)
        tensors[f"{number}.mask"] = torch.cat([(answers[:-1] >= 0) & (answers[:-1] == answers[1:]), torch.tensor([False])])
        hidden = states.hidden.float() / ours.norm  # their norm makes of this what it was before
        tensors[f"{number}.states"] = torch.cat([states.features.float(), hidden], -1).unflatten(-1, (4, -1)).contiguous()
    save_file(tensors, folder / "conversations.safetensors")
    save_file(trainer.vocab.as_tensors(), folder / "vocab.safetensors")
    save_file({key: value.detach().clone() for key, value in trainer.network.named_parameters()}, folder / "weights.safetensors")
    save_file({"marks": ours.losses(chosen)[1]}, folder / "marks.safetensors")
