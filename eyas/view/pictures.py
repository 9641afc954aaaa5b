"""Pictures as files. Knows matplotlib, which is optional (`pip install 'eyas[bench]'`); callers say what is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg", ".pdf")  # endings of pictures that are drawn


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """matplotlib's pyplot, set to draw into files, since a machine may have no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curve(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Held-out simulated tau and acceptance of the first, third and last step against trained answer tokens."""
    plt = pyplot()
    steps = sorted(int(name.removeprefix("accept_")) for name in curve[-1] if name.startswith("accept_"))
    slots = [point["slots"] / 1000 for point in curve]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(slots, [point["tau"] for point in curve], marker="o", markersize=3)
    left.set(xlabel="answer tokens trained, thousands", ylabel="held-out simulated tau", title=f"a chain of {steps[-1]}")
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        right.plot(slots, [point[f"accept_{step}"] for point in curve], marker="o", markersize=3, label=f"step {step}")
    right.set(xlabel="answer tokens trained, thousands", ylabel="right, of those right before", ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_steps(drafts: Mapping[str, Sequence[float]], path: Path) -> None:
    """How often each draft's guess is right at step 1, 2, .., of those whose guesses before were right."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for name, right in drafts.items():
        axes.plot(range(1, len(right) + 1), right, marker="o", label=name)
    axes.set(xlabel="step: the so many-th guess ahead", ylabel="right, of those right before", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
