"""Options that several commands share, each described once.

Knows options and their defaults (from config.py); imports nothing heavy, so `eyas --help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from typing import Any, NoReturn

from eyas.config import PRECISIONS, VERIFIERS, EyasError, Request, check_variables, short
from eyas.methods import METHODS


class Defaults(argparse.HelpFormatter):
    """Help that says what holds where an option of a value is left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or action.required or "default" in text:
            return text
        return f"{text} (default: {'none' if action.default in (None, []) else '%(default)s'})".strip()


class Version(argparse.Action):
    """Prints the installed version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import eyas

        print(f"eyas {eyas.__version__}")
        parser.exit(0)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command does, and what may have been meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Defaults, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # a command's own parser knows what may have been meant
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"eyas: {message}{self.meant(message)}; see `{self.prog} --help`\n")

    def meant(self, message: str) -> str:
        """`; did you mean ..?` where something like an unknown word is known."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)|invalid choice: '([^']*)'", message)
        if not unknown:
            return ""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if unknown[2] is not None:
            known = [str(name) for action in self._actions for name in action.choices or ()]
        near = difflib.get_close_matches(unknown[1] or unknown[2], known, 1)
        return f"; did you mean {near[0]}?" if near else ""


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


def writer(command: argparse.ArgumentParser) -> None:
    """Options about an engine that runs already and writes in the target's place."""
    told = "an OpenAI-compatible engine that serves the target (vLLM, SGLang, llama.cpp's server), which writes the text: http://HOST:PORT"
    command.add_argument("--writer", metavar="URL", help=told)
    command.add_argument("--writer-model", metavar="NAME", help="the target's name there (default: the only model that it serves)")
    command.add_argument(
        "--writer-requests",
        type=int,
        metavar="N",
        help="conversations that it writes at a time (default: as many as llama.cpp's server has slots; 32 for others)",
    )


def models(command: argparse.ArgumentParser, tree: bool = True, two: str = "") -> None:
    """`two`: what a second draft is for, where a command takes two: `draft` is then a list."""
    command.add_argument("--target", help="directory, .gguf file or hub name (default: the embedded SmolLM2-135M-Instruct)")
    draft = f"draft directory, or `bundled` (default: the bundled one for the embedded target){two}"
    command.add_argument("--draft", action="append" if two else "store", help=draft)
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of the weights (default %(default)s); int8, q4: smaller and faster, rounded",
    )
    command.add_argument("--device", default=None, help="cpu (default), cuda, or one CUDA device by its number: cuda:1")
    if tree:
        command.add_argument(
            "--tree", default=Request.tree, help="NODESxDEPTHxTOPK (60x7x10), chain:K, or auto (default): planned each round"
        )


def copy(command: argparse.ArgumentParser, usual: str) -> None:
    """`--copy` and `--no-copy`; `usual`: what holds without them."""
    told = f"let what followed the same tokens earlier join the draft's guesses, or not; it changes no text (default: {usual})"
    command.add_argument("--copy", action=argparse.BooleanOptionalAction, help=told)


def context_parallel(command: argparse.ArgumentParser) -> None:
    """Options of the commands that can share a text's keys out over processes."""
    command.add_argument(
        "--context-parallel",
        action="store_true",
        help="keys shared out over the processes that torchrun started; how many these are changes no bit of the text, but sharding does",
    )
    command.add_argument("--shards", type=int, help="virtual shards, a power of two (default 64); they decide rounding")
    command.add_argument(
        "--peer-timeout", type=float, metavar="S", help="seconds after which a process that does not answer is lost (default 60)"
    )


def generation(
    command: argparse.ArgumentParser,
    method: bool = True,
    copies: str = "with every method that drafts",
    new_tokens: int | None = None,
    generation_config: str = "none",
    two: str = "",
) -> None:
    """Options of the commands that write text. Those left out are None, so that a model's generation_config.json may have its say;
    `copies`, `new_tokens` and `generation_config`: a command's own defaults; `two`: what a second draft is for."""
    models(command, two=two)
    context_parallel(command)
    if method:
        command.add_argument("--method", default=None, help=f"{known_methods()} (default: the first of these that the draft serves)")
        command.add_argument("--plain", action="store_true", help="the same as --method plain")
    copy(command, copies)
    command.add_argument("--draft-model", help="a smaller model for method draft-model (default: the target's first third)")
    sampling(command)
    template_kwargs(command)
    command.add_argument(
        "--seed", type=int, default=None, help="the same seed gives the same text with any method (default: drawn and reported)"
    )
    tokens = f"of the answer at most (default {new_tokens or Request.max_new_tokens})"
    command.add_argument("--max-new-tokens", "--max-tokens", type=int, default=new_tokens, help=tokens)
    ends(command)
    command.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default=generation_config,
        help="auto: settings that are not given are as the model's generation_config.json says (default %(default)s)",
    )
    command.add_argument(
        "--verifier",
        choices=VERIFIERS,
        default=Request.verifier,
        help="the others are for comparison (EAGLE's rule; rejection of drawn guesses); traversal, with a static tree, suits hot sampling",
    )


def template_kwargs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        type=variables,
        help="variables of the chat template, say '{\"enable_thinking\": false}'",
    )


def variables(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{short(text)} is not JSON; write it like '{{\"enable_thinking\": false}}'") from None
    try:
        check_variables(found)
    except EyasError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


def conversation(command: argparse.ArgumentParser, messages: str) -> None:
    """Options of the commands that go on with a conversation; `messages`: what its file is for."""
    told = "(a list, or a request to a chat API with messages, tools and chat_template_kwargs)"
    command.add_argument("--messages", metavar="F.json", help=f"{messages} {told}")
    command.add_argument("--system", help="a system message to begin with")
    command.add_argument("--tools", metavar="F.json", help="functions on offer: a list, as chat APIs take it")


def sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperature", type=float, help="0 is greedy (default)")
    command.add_argument("--top-k", type=int, help="draw from so many likeliest tokens (default 0: all)")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold this probability (default 1: all)")
    command.add_argument("--min-p", type=float, help="draw from tokens this share as likely as the likeliest (default 0: all)")
    command.add_argument(
        "--repetition-penalty", type=float, help="divide logits of tokens in prompt and answer, multiply negative ones (default 1: off)"
    )
    command.add_argument("--presence-penalty", type=float, help="take this off the logit of a token in the answer (default 0)")
    command.add_argument("--frequency-penalty", type=float, help="the same, once for each time it is in the answer (default 0)")
    command.add_argument(
        "--logit-bias",
        metavar="ID=BIAS",
        action="append",
        default=[],
        help="add this to a token's logit (may be given several times)",
    )


def ids(text: str) -> list[int]:
    """Token ids with commas between them."""
    return [int(word) for word in text.split(",")]


def ends(command: argparse.ArgumentParser) -> None:
    command.add_argument("--min-new-tokens", "--min-tokens", type=int, help="nothing ends the answer before so many tokens (default 0)")
    command.add_argument("--stop", action="append", default=[], help="end at this string (may be given several times)")
    command.add_argument(
        "--stop-token-ids",
        metavar="ID,..",
        type=ids,
        action="extend",
        default=[],
        help="end at these token ids (may be given several times)",
    )
    command.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end-of-turn tokens")


def out_directory(command: argparse.ArgumentParser, text: str = "directory to write") -> None:
    """Add `out`, as a word of its own or, as other commands have it, as `--out`."""
    command.add_argument("out", nargs="?", default=argparse.SUPPRESS, help=text)
    command.add_argument("--out", metavar="DIR", help=f"the same: {text}")
