"""What a change of training brings: drafts that differ in this change alone, trained on one text, measured on the same held-out
conversations.

Intervals are paired: both drafts are measured on each held-out conversation, so how hard a conversation is cancels out of their difference.
Knows runs and how they are measured; knows nothing of options or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eyas.train.acceptance import Simulation, simulate
from eyas.train.build import Setup, build
from eyas.train.trainer import MEASURED, Budget, Trainer

DRAWS = 4000  # resamplings of the bootstrap
BASE = "base"
QUIET = {"measure_steps": 10**9, "tree_every": 0, "patience": 0}  # all of the budget trains, and the last weights are measured


@dataclass(frozen=True)
class Variant:
    """One way to train: what differs from the base."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    taps: tuple[int, ...] | None = None  # None: the base's


class Trained(NamedTuple):
    """The measurements of a variant's drafts, one for each seed."""

    simulations: list[Simulation]
    steps: int  # of all seeds together
    anchors: int
    minutes: float


def trained(setup: Setup, variant: Variant, budget: Budget, seeds: int, run: Callable[[Trainer, Budget], None]) -> Trained:
    """Train a variant once for each seed, and measure it. `setup`: the base's, held-out examples included; `run` lets a trainer train."""
    simulations, steps, anchors, minutes = [], 0, 0, 0.0
    for seed in range(seeds):
        settings = replace(setup.settings, **{**variant.settings, **QUIET, "seed": setup.settings.seed + seed})
        trainer = build(replace(setup, settings=settings, taps=variant.taps or setup.taps, out=None))
        trainer.measure = trainer.rank = lambda: None
        run(trainer, budget)
        with trainer.network.device:
            chain = min(trainer.network.levels or MEASURED, MEASURED)
            told = (trainer.network, trainer.vocab, trainer.held_out, trainer.source, chain)
            simulations.append(simulate(*told, unroll=trainer.teaching.unroll))
        progress = trainer.progress
        steps, anchors, minutes = steps + progress.steps, anchors + progress.slots, minutes + progress.minutes
    return Trained(simulations, steps, anchors, minutes)


def tau_of(simulations: Sequence[Simulation], chosen: Tensor | None = None) -> Tensor:
    """Tau [..] over examples (all of them, or those of each row of `chosen` [.., E]), seeds taken together."""
    right = torch.stack([each.right.sum(1) for each in simulations]).mean(0)
    anchors = simulations[0].anchors
    everyone = torch.arange(len(anchors)) if chosen is None else chosen
    return 1 + right[everyone].sum(-1) / anchors[everyone].sum(-1).clamp_min(1)


def difference(one: Sequence[Simulation], base: Sequence[Simulation], seed: int = 0) -> tuple[float, float, float]:
    """How much more tau `one` has than `base`, and the ends of its 95% interval; the same conversations are drawn for both."""
    count = len(base[0].anchors)
    chosen = torch.randint(0, count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    drawn = tau_of(one, chosen) - tau_of(base, chosen)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return float(tau_of(one) - tau_of(base)), low, high


def told(variant: Variant, found: Trained, base: Trained) -> dict[str, Any]:
    """A variant's figures as they are printed and kept."""
    count = len(found.simulations)
    acceptance = torch.tensor([each.acceptance() for each in found.simulations]).mean(0).tolist()
    figures: dict[str, Any] = {
        "settings": {**variant.settings, **({"taps": list(variant.taps)} if variant.taps else {})},
        "tau": round(float(tau_of(found.simulations)), 4),
        "by_seed": [round(each.tau(), 4) for each in found.simulations],
        "acceptance": [round(value, 4) for value in acceptance],
        "steps": found.steps // count,
        "slots": found.anchors // count,
        "minutes": round(found.minutes / count, 2),
    }
    if variant.name != BASE:
        more, low, high = difference(found.simulations, base.simulations)
        figures |= {"more_than_base": round(more, 4), "interval": [round(low, 4), round(high, 4)]}
    return figures
