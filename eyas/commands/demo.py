"""`eyas demo`: one answer twice from the same weights, plain and with EAGLE-3, and what that gained."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from eyas.commands.common import engine_from
from eyas.commands.output import picture_file, terminal
from eyas.config import EyasError, Request, TreeShape
from eyas.decode.sequence import Result
from eyas.engine import Engine
from eyas.model.exactness import why_texts_may_part
from eyas.model.rows import chain_rows
from eyas.view.colour import write_coloured

QUESTION = "What makes a hawk such a good hunter? Answer in a few sentences."


def run(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 2:
        raise EyasError(f"max-new-tokens must be at least 2 here, not {options.max_new_tokens}")
    if options.tree != "auto":
        TreeShape.parse(options.tree)
    picture = picture_file("--svg", options.svg, (".svg",))
    engine = engine_from(options)
    engine.drafter("eagle3")
    prompt = options.prompt or QUESTION
    console = terminal(quiet=options.json)
    shared: Any = {"max_new_tokens": options.max_new_tokens, "seed": 0, "chat_template_kwargs": options.chat_template_kwargs}
    copy = bool(options.copy)
    plain, fast = Request(method="plain", **shared), Request(method="eagle3", copy=copy, tree=options.tree, **shared)
    for request in (plain, fast):  # the first pass of a process is slow: let neither pay for it
        engine.generate(prompt, replace(request, max_new_tokens=4))
    shown: list[Any] = [f"[bold]{escape(prompt)}[/bold]", "[dim]plain decoding, one token a pass:[/dim]"]
    console.print(*shown, sep="\n\n")
    slow_result, slow_text, _ = write_coloured(engine, prompt, plain, console)
    guessed = "guessed by the draft or copied, and right" if copy else "guessed by the draft and right"
    heading = f"[dim]EAGLE-3, same weights, [/dim][bold green]{guessed}[/bold green][dim]:[/dim]"
    console.print(f"\n{heading}")
    fast_result, fast_text, nodes = write_coloured(engine, prompt, fast, console)
    tokens = engine.encode(prompt, chat_template_kwargs=options.chat_template_kwargs)
    lines = verdict(engine, tokens, slow_result, fast_result, options.precision, tree_told(options.tree, nodes))
    console.print(f"\n{lines}")
    if options.json:
        print(json.dumps({**facts(slow_result, fast_result), "copy": copy}))
    if picture:
        save_picture(picture, [*shown, slow_text, heading, fast_text, lines])
    return 0


def facts(plain: Result, fast: Result) -> dict[str, Any]:
    """Whether the texts are equal, tokens a round, and how many times faster (tokens a second over tokens a second)."""
    ratio = (len(fast.tokens) / fast.seconds) / (len(plain.tokens) / plain.seconds)
    return {"same_text": plain.tokens == fast.tokens, "tau": round(fast.tau, 4), "ratio": round(ratio, 4), "tokens": len(fast.tokens)}


def tree_told(tree: str, nodes: list[int]) -> str:
    """The tree behind the figures: the shape asked for, or that each round had its own, and how large they were, roots included."""
    if tree != "auto" or not nodes:
        return f"tree {tree}"
    return f"tree auto: planned each round, {sum(nodes) / len(nodes):.1f} nodes on average"


def verdict(engine: Engine, prompt: list[int], plain: Result, fast: Result, precision: str, tree: str) -> str:
    found = facts(plain, fast)
    rates = f"{len(plain.tokens) / plain.seconds:.1f} -> {len(fast.tokens) / fast.seconds:.1f} tokens/s"
    conditions = f"[dim]({precision}, greedy, {tree}, {found['tokens']} tokens, {torch.get_num_threads()} threads)[/dim]"
    same = "Same text" if found["same_text"] else "Texts part"
    line = f"[bold]{same}[/bold] · tau {found['tau']:.2f} tokens a round · {rates}, [bold]{found['ratio']:.2f}x[/bold] {conditions}"
    return line if found["same_text"] else f"{line}\n{explain_parting(engine, prompt, plain, fast, precision)}"


def save_picture(path: Path, shown: list[Any]) -> None:
    """What was shown, as an SVG of a terminal."""
    console = Console(record=True, file=io.StringIO(), width=110, highlight=False)
    for part in shown:
        console.print(part, end="\n\n")
    try:
        console.save_svg(str(path), title="eyas demo")
    except OSError as error:
        raise EyasError(f"cannot write {path} ({error.strerror})") from None


def explain_parting(engine: Engine, prompt: list[int], plain: Result, fast: Result, precision: str) -> str:
    """Where two greedy texts part and how near the two tokens were: rounding flips near ties when passes have other shapes. `prompt`: the
    token ids of what was asked."""
    pairs: Any = zip(plain.tokens, fast.tokens, strict=False)
    place = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
    text = prompt + plain.tokens[:place]
    with torch.inference_mode():
        logits = engine.target(chain_rows(0, text, 0), engine.target.new_cache(1, len(text)), (), slice(-1, None)).logits[0]
    one, other = plain.tokens[place], fast.tokens[place]
    words = [repr(engine.tokenizer.decode([token])) for token in (one, other)]
    gap = abs(float(logits[one] - logits[other]))
    parted = f"They part at token {place + 1}: {words[0]} against {words[1]}, {gap:.3f} apart in the logits."
    why = why_texts_may_part(engine.target)
    if why is None:
        return f"{parted} They should not: here every row of a pass is computed alone. Please report it."
    return f"{parted} Under {precision} a pass of another shape rounds differently ({why}) and a near tie may fall either way."
