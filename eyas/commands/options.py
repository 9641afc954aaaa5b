"""Options that several commands share, each described once.

Knows options and their defaults (from config.py); imports nothing heavy, so `eyas --help` is quick.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from eyas.config import PRECISIONS, VERIFIERS, Request, Sampling
from eyas.methods import METHODS


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"eyas: {message}; see `{self.prog} --help`\n")


def known_methods() -> str:
    *others, last = METHODS
    return f"{', '.join(others)} or {last}"


def add(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    plugin(command, "plugins")
    return command


def plugin(command: argparse.ArgumentParser, name: str) -> None:
    """Add `--plugin`, before the command's name or after it. Each has its own list: a command's defaults replace what came before."""
    told = "a Python file of your own that registers losses, growths or methods (docs/add-a-method.md)"
    command.add_argument("--plugin", dest=name, metavar="F.py", action="append", default=[], help=told)


def seed_prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed-prompts", metavar="F.jsonl", help="user turns that a fifth of the self-written conversations begin with")


def apart(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--apart",
        metavar="F.jsonl",
        nargs="+",
        action="extend",
        default=[],
        help="evaluation prompts: self-written conversations that share 13 tokens in a row with one are left out",
    )


def disk(command: argparse.ArgumentParser) -> None:
    command.add_argument("--disk", type=float, metavar="GB", help="most that self-written data may take (default: half of what is free)")


def models(command: argparse.ArgumentParser, tree: bool = True) -> None:
    command.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded SmolLM2-135M-Instruct)")
    command.add_argument("--draft", help="draft directory, or `bundled` (default: the bundled one for the embedded target)")
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the weights (default %(default)s); int8, q4: smaller and faster, rounded",
    )
    command.add_argument("--device", default=None, help="cpu (default) or cuda")
    if tree:
        command.add_argument(
            "--tree", default=Request.tree, help="NODESxDEPTHxTOPK (60x7x10), chain:K, or auto (default): planned each round"
        )


def generation(command: argparse.ArgumentParser, method: bool = True, new_tokens: int = Request.max_new_tokens) -> None:
    models(command)
    if method:
        command.add_argument("--method", default=None, help=f"{known_methods()} (default: the first of these that the draft serves)")
        command.add_argument("--plain", action="store_true", help="the same as --method plain")
    command.add_argument("--draft-model", help="a smaller model for method draft-model (default: the target's first third)")
    command.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy (default)")
    command.add_argument("--top-k", type=int, default=Sampling.top_k)
    command.add_argument("--top-p", type=float, default=Sampling.top_p)
    command.add_argument("--min-p", type=float, default=Sampling.min_p)
    command.add_argument(
        "--seed", type=int, default=None, help="the same seed gives the same text with any method (default: drawn and reported)"
    )
    command.add_argument("--max-new-tokens", type=int, default=new_tokens)
    command.add_argument("--stop", action="append", default=[], help="end at this string (may be given several times)")
    command.add_argument(
        "--verifier",
        choices=VERIFIERS,
        default=Request.verifier,
        help="the others are for comparison (EAGLE's rule; rejection of drawn guesses); traversal, with a static tree, suits hot sampling",
    )
