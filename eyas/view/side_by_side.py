"""Two drafts on one text, side by side: the same tokens of the target, other trees, other rounds.

Knows runs whose rounds are told as numbers and words, and a console; runs no model.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Drawing

from eyas.decode.sequence import tau_of
from eyas.view.rounds import Run

Round = dict[str, Any]
Path = tuple[int, ...]  # tokens below the root


def tell_both(runs: dict[str, Run], tokenizer: Any, places: int, console: Console) -> None:
    """Tell two runs of one prompt, by their drafts' names: the trees at the first `places` places where a round begins, then tau."""
    (first, one), (second, other) = runs.items()
    table = Table(title="the trees, by the token they hang from; in green what the walk kept", title_justify="left", show_lines=True)
    table.add_column("behind")
    for name in (first, second):
        table.add_column(name, ratio=1)
    begun = [{each["root"]["pos"]: each for each in run.rounds} for run in (one, other)]
    for place in sorted({*begun[0], *begun[1]})[:places]:
        mine, theirs = begun[0].get(place), begun[1].get(place)
        shared = paths(mine).keys() & paths(theirs).keys() if mine and theirs else None
        root = (mine or theirs or {})["root"]
        table.add_row(f"{escape(repr(root['text']))} at {place}", cell(mine, one, place, shared), cell(theirs, other, place, shared))
    console.print(table)
    for name, run in runs.items():
        tokens = len(run.text.tokens) - run.text.prompt_length
        console.print(f"{escape(name)}: {tokens} tokens in {run.text.rounds} rounds, tau {tau_of(run.text):.2f}", soft_wrap=True)
    console.print(verdict(one, other, tokenizer), soft_wrap=True)


def verdict(one: Run, other: Run, tokenizer: Any) -> str:
    """Whether the target's tokens are the same, which is what speculation promises."""
    mine, theirs = one.text.tokens[one.text.prompt_length :], other.text.tokens[other.text.prompt_length :]
    if mine == theirs:
        return f"The same {len(mine)} tokens of the target with both, seed {one.text.seed}: {escape(repr(tokenizer.decode(mine)))}"
    same = next((place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), min(len(mine), len(theirs)))
    return f"The texts part behind {same} token{'s' * (same != 1)}: at a near tie rounding decides here; --precision fp32 keeps them alike."


def cell(this: Round | None, run: Run, place: int, shared: set[Path] | None) -> Group | Text:
    """A draft's round that begins at a place, or which round the place lies in."""
    if this is None:
        within = [each["n"] for each in run.rounds if each["root"]["pos"] < place]
        return Text(f"within its round {within[-1]}" if within else "behind its last round", style="dim")
    lines: list[Drawing | Text] = [drawing(this)]
    if shared is not None:
        alone = len(this["nodes"]) - 1 - len(shared)
        lines.append(Text(f"{len(shared)} in both trees, {alone} in this one alone", style="dim"))
    count = len(this["committed"])
    return Group(*lines, Text(f"{count} token{'s' * (count > 1)} from one pass", style="dim"))


def paths(this: Round) -> dict[Path, int]:
    """The path of tokens down to each guess of a round, and the guess's row."""
    found: list[Path] = []
    for token, _, parent, *_ in this["nodes"]:
        found.append((*found[parent], token) if parent >= 0 else ())
    return {path: row for row, path in enumerate(found) if row}


def drawing(this: Round) -> Drawing:
    """A round's tree with the chance of each path; the kept path in green, and the bonus token behind it."""
    drawings: list[Drawing] = []
    for row, (_, text, parent, _, chance, _) in enumerate(this["nodes"]):
        name = escape(repr(text))
        name = f"[bold green]{name}[/bold green]" if row in this["path"] else name
        if parent < 0:
            drawings.append(Drawing(name))
        else:
            drawings.append(drawings[parent].add(f"{name} {chance:.2f}"))
    if len(this["committed"]) >= len(this["path"]):
        drawings[this["path"][-1]].add(f"[yellow]{escape(repr(this['bonus'][1]))}[/yellow] bonus")
    return drawings[0]
