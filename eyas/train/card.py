"""What a finished draft says about itself: a model card with figures and their conditions, and its learning curve as a picture.

Knows training.json and a benchmark's result; measures nothing itself. The picture needs matplotlib (`pip install 'eyas[bench]'`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD, PICTURE = "README.md", "curve.png"
FEWEST = 8  # questions without which a card says no figure


def best_point(told: Mapping[str, Any]) -> dict[str, float] | None:
    """The point of training.json's curve whose weights were kept; None where it holds no curve of the form that eyas writes."""
    curve = told.get("curve")
    numbers = ("tau", "accept_1")
    points = [point for point in curve if isinstance(point, dict)] if isinstance(curve, list) else []
    points = [point for point in points if all(isinstance(point.get(name), (int, float)) for name in numbers)]
    return max(points, key=lambda point: point["tau"]) if points else None


def card(told: dict[str, Any], measured: dict[str, Any], command: str, use: str, pictured: bool = True) -> str:
    """The card's text. `told` is training.json, `measured` a result of bench, `command` what made the draft, `use` how to run it;
    `pictured`: whether the learning curve was drawn."""
    data, best = told["data"], max(told["curve"], key=lambda point: point["tau"])
    steps = ", ".join(f"{value:.2f}" for name, value in best.items() if name.startswith("accept_"))
    conditions = measured["conditions"]
    count = conditions["prompt_count"]
    curve = f"![learning curve]({PICTURE})\n\n" if pictured else ""
    return f"""# An EAGLE-3 draft for {told["target"]}

Made by `{command}` on {told["date"]}; target's weights sha256 {told["target_sha256"][:16]}. It serves this target only.

```bash
{use}
```

## How it was trained

{told["hours"]:.2f} hours of training on {told["machine"]}: {told["slots"]:,} answer tokens in {told["steps"]:,} steps, with training-time
test over {told["settings"]["unroll_steps"]} steps, on {data["answer_tokens"]:,} answer tokens in {data["conversations"]:,} conversations
that the target wrote itself. Settings, versions, data and curve: `training.json`.

{curve}The weights kept are those with the highest held-out simulated tau, {best["tau"]:.2f} (a chain of
{told["settings"]["unroll_steps"]} on held-out text of the training's own kind, which so chose them), reached after {best["slots"]:,}
tokens. Acceptance by step, of those right before: {steps}.

## What it does

{what_it_does(measured) if count >= FEWEST else too_few(count, measured.get("left_out", 0))}
"""


def what_it_does(measured: dict[str, Any]) -> str:
    conditions = measured["conditions"]
    count = conditions["prompt_count"]
    cells = [
        (name, figures.get("tree", ""), shown(figures, "tau", count), shown(figures, "speedup", count))
        for name, figures in measured["methods"].items()
    ]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"""{count} held-out questions of the training's own kind, up to {conditions["max_new_tokens"]} tokens, temperature
{conditions["temperature"]:g}, {conditions["precision"]}, {conditions["threads"]} threads; intervals are 95%, by bootstrap over
questions. Questions of other kinds may accept less: measure yours with `eyas bench`.

| method | tree | tau (tokens a round) | speed over plain |
|---|---|---|---|
{rows}"""


def too_few(count: int, left_out: int = 0) -> str:
    """What stands for figures that so few questions cannot give; `left_out`: those there was no time for."""
    asked = f"{count} question{'s' * (count != 1)}"
    asked += f" of {count + left_out} could be asked in the time given" if left_out else " could be asked"
    return f"Too few to say: {asked}, and below {FEWEST} a figure is luck. Measure it with `eyas bench --prompts F.jsonl`."


def shown(figures: dict[str, Any], name: str, prompts: int) -> str:
    """A figure with its interval, and a mark where its timing was disturbed; of few questions none, since it would be luck."""
    value, between = figures.get(name), figures.get(f"{name}_interval")
    if value is None:
        return "-"
    if prompts < FEWEST:
        return "too few to say"
    mark = " (disturbed)" if name == "speedup" and figures.get("disturbed") else ""
    return f"{value:.2f} [{between[0]:.2f}, {between[1]:.2f}]{mark}" if between else f"{value:.2f}{mark}"
