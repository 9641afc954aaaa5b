"""The methods of the line that leads to EAGLE-3, and what each leaves out, as rows of one table: what they are, and what was measured.

Knows names, settings and results; trains and decodes nothing (commands/compare.py does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eyas.config import EyasError
from eyas.methods import COPY, EARLIER, METHODS
from eyas.view import pictures

BUDGETS = (16, 60)  # target rows a round
GROWN = {16: "16x4x4", 60: "60x7x10"}  # trees grown by score
LOOKED_UP = {16: "16x14x4", 60: "60x30x4"}  # look-up's guesses cost nothing, so they may go deep
SHOWN_STEPS = 4


@dataclass(frozen=True)
class Row:
    name: str
    method: str  # that decodes
    trains: str | None = None  # the method whose draft is trained for it
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its training, where not the usual
    like: str | None = None  # the row whose draft it decodes with
    teaches: str = ""
    also: bool = False  # an ablation or a control: not one of the methods themselves
    copy: bool = False  # copying joins its trees


ROWS = (
    Row("plain", "plain", teaches="one token a round: what all others are measured against"),
    Row("lookup", "lookup", teaches="what the text's own repetitions are worth, without any draft"),
    Row("draft-model", "draft-model", teaches="a smaller model as draft; here the target's own first third, which nobody trained for it"),
    Row("medusa", "medusa", "medusa", teaches="independent heads: cheap, but no head knows what was drawn or what the others said"),
    Row("mtp", "mtp", "mtp", teaches="a layer for each token ahead, fed with what was drawn and with the layer before"),
    Row(
        "eagle1",
        "eagle1",
        "eagle1",
        teaches="one layer for all, fed with what was drawn and with its own guess of the feature; a fixed tree",
    ),
    Row("eagle2", "eagle2", like="eagle1", teaches="the same draft; its confidence shapes the tree"),
    Row("eagle3", "eagle3", "eagle3", teaches="no feature loss, three layers' features, trained on its own output"),
    Row(
        "eagle3+copy",
        "eagle3",
        like="eagle3",
        copy=True,
        teaches="what followed the same tokens before joins the draft's guesses",
    ),
    Row(
        "eagle2 without the token",
        "eagle2",
        "eagle1",
        {"token_left_out": True},
        teaches="EAGLE-1's question: how much hangs on which token was drawn",
        also=True,
    ),
    Row(
        "eagle3 without training-time test",
        "eagle3",
        "eagle3",
        {"unroll_steps": 1},
        teaches="trained on the target's features alone: what its own errors then do",
        also=True,
    ),
    Row("eagle3 without fusion", "eagle3", "eagle3", {"top_layer_only": True}, teaches="the high feature alone", also=True),
    Row("eagle3 with 3.1's settings", "eagle3", "eagle3", {"fc_norm": True, "norm_output": True}, teaches="norms of EAGLE-3.1", also=True),
    Row(
        "eagle3 from a random head",
        "eagle3",
        "eagle3",
        {"random_head": True},
        teaches="the control: EAGLE-1 owns a trained head from the start, and here the others begin with it too",
        also=True,
    ),
)


def with_copying(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows, where copying joins every method that drafts; the row that shows what it brings is left out."""
    return [replace(row, copy=METHODS[row.method].copy) for row in rows if not row.name.endswith(COPY)]


def trees_of(row: Row, network: Any) -> dict[int, str]:
    """The tree that a row decodes with, for each budget of rows. `network`: its draft's, where that has a tree of its own."""
    if row.method == "lookup":
        return LOOKED_UP
    return {nodes: str(network.static_tree(nodes)) for nodes in BUDGETS} if METHODS[row.method].static else GROWN


# ---- the table ----

COLUMNS = (
    "method",
    "tau, 16 rows",
    "tau, 60 rows",
    "tau, 16 rows, T = 1",
    "right at step 1, 2, ..",
    "draft, ms a round",
    "x plain",
    "parameters, M",
    "MB",
)


def cells(name: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the table, from `methods.<name>` of a result."""
    at, own = told["at"], told["parameters"] / 1e6
    steps = " ".join(f"{share:.2f}" for share in told["acceptance_by_step"][:SHOWN_STEPS])
    return (
        name,
        *(with_interval(at[place]) for place in ("16, T=0", "60, T=0", "16, T=1")),
        steps or "-",
        f"{told['draft_ms']:.1f}",
        f"{told['speedup']:.2f}" if told["speedup"] else "-",
        f"{own:.1f}" if own else "-",
        f"{told['memory_mb']:.1f}",
    )


def with_interval(figures: Mapping[str, Any]) -> str:
    if figures["tau"] is None:  # every text ended with its first token
        return "-"
    low, high = figures["tau_interval"]
    return f"{figures['tau']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low != high else "")


TRAINED_COLUMNS = ("draft", "tokens", "slots of all steps", "minutes", "held-out simulated tau")


def training_rows(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table of drafts: each draft once, under the row that trained it."""
    return [training_cells(name, told) for name, told in methods.items() if told.get("draft_of") == name]


def titled(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables a result holds, each with its title."""
    both = (("Equal training tokens", result["methods"]), ("Equal training time", result.get("same_time")))
    return [(title, methods) for title, methods in both if methods]


def training_cells(name: str, told: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells for one draft: tokens it was trained on, anchors over all steps, minutes, simulated tau on held-out text."""
    each = told["training"]
    return (name, f"{each['tokens']:,}", f"{each['unrolled_slots']:,}", f"{each['minutes']:.1f}", f"{each['simulated_tau']:.2f}")


def save_picture(methods: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Tau at both budgets with intervals, and acceptance by step. Needs matplotlib."""
    methods = {name: told for name, told in methods.items() if all(each["tau"] for each in told["at"].values())}
    pyplot = pictures.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.8 + 0.34 * len(methods)))
    names = list(methods)[::-1]
    for shift, place, colour in ((0.16, "16, T=0", "#c8553d"), (-0.16, "60, T=0", "#8fa3ad")):
        figures = [methods[name]["at"][place] for name in names]
        taus = [each["tau"] for each in figures]
        spans = [each["tau_interval"] for each in figures]
        errors = [
            [tau - low for tau, (low, _) in zip(taus, spans, strict=True)],
            [high - tau for tau, (_, high) in zip(taus, spans, strict=True)],
        ]
        heights = [number + shift for number in range(len(names))]
        left.barh(heights, [tau - 1 for tau in taus], 0.3, left=1, xerr=errors, color=colour, label=f"{place.split(',')[0]} rows")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="tokens a round (tau), greedy", xlim=(1, None))
    left.legend(frameon=False, fontsize=8)
    for number, name in enumerate(methods):
        steps = methods[name]["at"]["16, T=0"]["acceptance_by_step"][:SHOWN_STEPS]
        if steps:  # ten colours, so the rows that follow are dashed
            style = "-" if number < 10 else "--"
            right.plot(range(1, len(steps) + 1), steps, style, color=f"C{number % 10}", marker="o", markersize=3, label=name)
    right.set(xlabel="step", ylabel="right, where those before were", ylim=(0, 1), xticks=range(1, SHOWN_STEPS + 1))
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def chosen_rows(names: str | None, quick: bool) -> Sequence[Row]:
    """The named rows, with those whose draft they need; or all rows; `quick`: only the methods themselves, without their ablations."""
    rows = [row for row in ROWS if row.method in METHODS]
    if names is None:
        return [row for row in rows if not (quick and row.also)]
    wanted = [EARLIER.get(name.strip(), name.strip()) for name in names.split(",") if name.strip()]
    known = {row.name: row for row in rows}
    if unknown := [name for name in wanted if name not in known]:
        raise EyasError(f"row {unknown[0]!r} is unknown; choose {', '.join(known)}")
    wanted = ["plain", *wanted]
    wanted += [known[name].like for name in wanted if known[name].like]
    return [row for row in rows if row.name in wanted]
