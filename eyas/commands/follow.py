"""A training run told in the terminal while it goes."""

from __future__ import annotations

from rich.console import Console

from eyas.commands.output import progress
from eyas.train.build import TREE
from eyas.train.trainer import Budget, Progress, Trainer


def follow(trainer: Trainer, budget: Budget, console: Console) -> None:
    """Train until the budget is spent, with a bar, and a line for every measurement."""
    with_bar(trainer, budget, console)
    console.print(curve_line(trainer.progress.curve[-1]))
    if trainer.progress.overfits(trainer.settings.patience):
        console.print("stopped early: held-out acceptance has fallen for good while the loss went on; the best weights are kept")


def with_bar(trainer: Trainer, budget: Budget, console: Console) -> None:
    told = len(trainer.progress.curve)
    with progress(console) as bar:
        task = bar.add_task("training", total=1000)

        def report(now: Progress, losses: list[float], spent: float) -> None:
            nonlocal told
            bar.update(task, completed=1000 * spent, told=f"{now.slots:,} tokens, step {now.steps}, loss {losses[0]:.2f}")
            for point in now.curve[told:]:
                console.print(curve_line(point))
            told = len(now.curve)

        trainer.run(budget, report)


def curve_line(point: dict[str, float]) -> str:
    trees = f", with {TREE} trees {point['tree_tau']:.2f}" if "tree_tau" in point else ""
    steps = " ".join(f"{value:.2f}" for name, value in point.items() if name.startswith("accept_"))
    return (
        f"{point['minutes']:.1f} min, {point['slots']} tokens: held-out simulated tau {point['tau']:.3f}{trees}, acceptance by step {steps}"
    )
