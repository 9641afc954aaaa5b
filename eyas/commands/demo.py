"""`eyas demo`: one answer twice from the same weights, plain and with EAGLE-3, and what that gained."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console

from eyas.commands.common import engine_from
from eyas.config import EyasError
from eyas.decode.generate import Result, result_of
from eyas.load import Engine, Prompt, Request
from eyas.model.target import chain_rows
from eyas.view.colour import write_coloured

QUESTION = "What makes a hawk such a good hunter? Answer in a few sentences."


def run(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 2:
        raise EyasError(f"max-new-tokens must be at least 2 here, not {options.max_new_tokens}")
    engine = engine_from(options)
    engine.drafter("eagle3")
    prompt = options.prompt or QUESTION
    console = console_for(options)
    shared = {"max_new_tokens": options.max_new_tokens, "seed": 0}
    plain, fast = Request(method="plain", **shared), Request(method="eagle3", tree=options.tree, **shared)
    for request in (plain, fast):  # the first pass of a process is slow: let neither pay for it
        engine.generate(prompt, Request(**{**vars(request), "max_new_tokens": 4}))
    console.print(f"[bold]{prompt}[/bold]\n\n[dim]plain decoding, one token a pass:[/dim]")
    slow_result = written(engine, prompt, plain, console)
    console.print("\n[dim]EAGLE-3, same weights, [/dim][bold green]guessed by the draft and right[/bold green][dim]:[/dim]")
    fast_result = written(engine, prompt, fast, console)
    status = report(engine, prompt, slow_result, fast_result, console, options)
    if options.svg:
        save_picture(console, options.svg)
    return status


def console_for(options: argparse.Namespace) -> Console:
    width = 100 if options.svg else None
    return Console(highlight=False, quiet=options.json, record=bool(options.svg), width=width)


def save_picture(console: Console, path: str) -> None:
    try:
        console.save_svg(path, title="eyas demo")
    except OSError as error:
        raise EyasError(f"cannot write {path} ({error.strerror})") from None


def written(engine: Engine, prompt: Prompt, request: Request, console: Console) -> Result:
    return result_of(next(iter(list(write_coloured(engine, prompt, request, console)))))


def report(engine: Engine, prompt: Prompt, plain: Result, fast: Result, console: Console, options: argparse.Namespace) -> int:
    same = plain.tokens == fast.tokens
    ratio = (len(fast.tokens) / fast.seconds) / (len(plain.tokens) / plain.seconds)
    if options.json:
        print(json.dumps({"same_text": same, "tau": round(fast.tau, 4), "ratio": round(ratio, 4), "tokens": len(fast.tokens)}))
        return 0
    console.print(
        f"\n[bold]{'Same text' if same else 'Texts part'}[/bold] · tau {fast.tau:.2f} tokens a round · "
        f"{len(plain.tokens) / plain.seconds:.1f} -> {len(fast.tokens) / fast.seconds:.1f} tokens/s, [bold]{ratio:.2f}x[/bold]"
        f" [dim]({options.precision}, greedy, {len(fast.tokens)} tokens, {torch.get_num_threads()} threads)[/dim]"
    )
    if not same:
        console.print(explain_parting(engine, prompt, plain, fast, options.precision))
    return 0


def explain_parting(engine: Engine, prompt: Prompt, plain: Result, fast: Result, precision: str) -> str:
    """Where two greedy texts part and how near the two tokens were: rounding flips near ties when passes have other shapes."""
    pairs: Any = zip(plain.tokens, fast.tokens)
    place = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
    text = engine.encode(prompt) + plain.tokens[:place]
    with torch.inference_mode():
        logits = engine.target(chain_rows(0, text, 0), engine.target.new_cache(1, len(text)), (), slice(-1, None)).logits[0]
    one, other = plain.tokens[place], fast.tokens[place]
    words = [repr(engine.tokenizer.decode([token])) for token in (one, other)]
    gap = abs(float(logits[one] - logits[other]))
    return (
        f"They part at token {place + 1}: {words[0]} against {words[1]}, {gap:.3f} apart in the logits. Under {precision} a pass of "
        f"another shape rounds differently and a near tie may fall either way; with --precision fp32 the texts are equal."
    )
