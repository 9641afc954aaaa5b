"""What a finished draft says about itself: a model card with figures and their conditions, and its learning curve as a picture.

Knows training.json and a benchmark's result; measures nothing itself. The picture needs matplotlib (`pip install 'eyas[bench]'`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD, PICTURE = "README.md", "curve.png"


def best_point(told: Mapping[str, Any]) -> dict[str, float] | None:
    """The point of training.json's curve whose weights were kept; None where it holds no curve of the form that eyas writes."""
    curve = told.get("curve")
    numbers = ("tau", "accept_1")
    points = [point for point in curve if isinstance(point, dict)] if isinstance(curve, list) else []
    points = [point for point in points if all(isinstance(point.get(name), (int, float)) for name in numbers)]
    return max(points, key=lambda point: point["tau"]) if points else None


def card(told: dict[str, Any], measured: dict[str, Any], command: str, use: str) -> str:
    """The card's text. `told` is training.json, `measured` a result of bench, `command` what made the draft, `use` how to run it."""
    data, best = told["data"], max(told["curve"], key=lambda point: point["tau"])
    steps = ", ".join(f"{value:.2f}" for name, value in best.items() if name.startswith("accept_"))
    conditions = measured["conditions"]
    count = conditions["prompt_count"]
    cells = [(name, shown(figures, "tau", count), shown(figures, "speedup", count)) for name, figures in measured["methods"].items()]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"""# An EAGLE-3 draft for {told["target"]}

Made by `{command}` on {told["date"]}; target's weights sha256 {told["target_sha256"][:16]}. It serves this target only.

```bash
{use}
```

## How it was trained

{told["hours"]:.2f} hours of training on {told["machine"]}: {told["slots"]:,} answer tokens in {told["steps"]:,} steps, with training-time
test over {told["settings"]["unroll_steps"]} steps, on {data["answer_tokens"]:,} answer tokens in {data["conversations"]:,} conversations
that the target wrote itself. Settings, versions, data and curve: `training.json`.

![learning curve]({PICTURE})

The weights kept are those with the highest held-out simulated tau, {best["tau"]:.2f} (a chain of {told["settings"]["unroll_steps"]} on
held-out text of the training's own kind, which so chose them), reached after {best["slots"]:,} tokens. Acceptance by step, of those right
before: {steps}.

## What it does

{conditions["prompt_count"]} held-out questions of the training's own kind, up to {conditions["max_new_tokens"]} tokens, temperature
{conditions["temperature"]:g}, {conditions["precision"]}, {conditions["threads"]} threads; intervals are 95%, by bootstrap over
questions. Questions of other kinds may accept less: measure yours with `eyas bench`.

| method | tau (tokens a round) | speed over plain |
|---|---|---|
{rows}
"""


def shown(figures: dict[str, Any], name: str, prompts: int) -> str:
    """A figure with its interval; without it where only one question was asked, since it would say nothing."""
    value, between = figures.get(name), figures.get(f"{name}_interval")
    if value is None:
        return "-"
    return f"{value:.2f} [{between[0]:.2f}, {between[1]:.2f}]" if between and prompts > 1 else f"{value:.2f}"
