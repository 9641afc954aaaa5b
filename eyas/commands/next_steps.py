"""Commands that are printed as next steps: whole, quoted for a shell, with paths that hold wherever they are typed.

Knows options and paths; runs nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

PROMPT = "Tell me about hawks."


def shell(*words: str | Path) -> str:
    """These words as one line that a shell takes apart again."""
    return shlex.join(map(str, words))


def place(source: str | Path) -> str:
    """The absolute path of what lies on this machine; a hub name, or whatever else is not there, as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


def generate_with(options: argparse.Namespace, target: str | None, draft: Path, chat: bool) -> str:
    """A command that writes with a draft. `target`: as the user named it; `chat`: whether it has a chat template."""
    named = ["--target", place(target)] if target else []
    variables = getattr(options, "chat_template_kwargs", None)
    templated = ["--chat-template-kwargs", json.dumps(variables)] if variables else []
    return shell("eyas", "generate", PROMPT, *named, "--draft", place(draft), *([] if chat else ["--raw"]), *templated, *plugins(options))


def again(options: argparse.Namespace, *more: str) -> str:
    """The command that was given, once more, with `more` behind it."""
    return shell("eyas", *(word for word in options.arguments if word not in more), *more)


def plugins(options: argparse.Namespace) -> list[str]:
    """The options that name the user's plugins: what they registered is known to no other command."""
    return [word for file in dict.fromkeys([*options.first, *options.plugins]) for word in ("--plugin", place(file))]
