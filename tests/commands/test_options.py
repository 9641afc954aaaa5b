"""One name for one thing, and help for whoever mistypes it."""

from __future__ import annotations

import argparse
import re

import pytest

import eyas
from eyas.commands.parser import parser
from tests.tiny import save_tiny_target

COMMANDS = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices


def test_the_version_is_said(run):
    assert run("--version") == (0, f"eyas {eyas.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate", "hi"], "did you mean generate?"),
        (["generate", "hi", "--sead", "3"], "unrecognized arguments: --sead 3; did you mean --seed?"),
        (["generate", "hi", "--presicion", "fp32"], "did you mean --precision?"),
        (["train", "--out", "x", "--learning-rat=3", "--leraning-rate", "3"], "did you mean --learning-rate?"),
        (["generate", "hi", "--precision", "fp23"], "did you mean fp32?"),
        (["generate", "hi", "--zzz"], "unrecognized arguments: --zzz; see `eyas generate --help`"),
    ],
)
def test_what_is_mistyped_is_told_what_may_have_been_meant(refused, words, said):
    assert said in refused(*words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_that_says_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    command = COMMANDS[name]
    for action in command._actions:
        assert action.help, f"{name}: {action.dest} has no help"
        if action.option_strings and action.nargs != 0 and not action.required:
            told = command._get_formatter()._expand_help(action)
            assert "default" in told or (action.default == [] and "default" not in told), f"{name}: {action.dest}: {told}"
    assert re.search(r"default:? ", command.format_help())


def test_one_name_serves_in_all_commands():
    """The names that were published, and those of other commands for the same thing."""
    named = {
        "generate": ("--max-new-tokens", "--max-tokens"),
        "demo": ("--max-new-tokens", "--max-tokens"),
        "doctor": ("--tokens", "--max-new-tokens"),
        "export": ("--to", "--engine", "--weights", "--precision", "--out", "--target"),
        "serve-command": ("--engine", "--to", "--target"),
        "import": ("--out", "--target"),
        "publish": ("--out", "--target"),
        "new-draft": ("--out", "--target"),
    }
    for name, options in named.items():
        assert set(options) <= set(COMMANDS[name]._option_string_actions), name
    read = parser().parse_args(["export", "d", "there", "--to", "vllm"])
    again = parser().parse_args(["export", "d", "--out", "there", "--engine", "vllm"])
    assert vars(read) == vars(again) and read.out == "there"
    for words in (["new-draft", "m"], ["new-draft", "--target", "m"]):
        assert parser().parse_args([*words, "--hours", "1", "--out", "x"]).model == "m"
    assert parser().parse_args(["new-draft", "--hours", "1", "--out", "x"]).model is None


@pytest.mark.parametrize("name", ["demo", "plan", "compare", "import", "serve-command", "doctor", "generate", "trace"])
def test_every_command_that_renders_a_template_hands_it_the_variables(models, refused_last, tmp_path, name):
    """The template says itself that it reads no such variable."""
    draft = {"import": [models / "draft", "--out", models / "no"], "doctor": [models / "draft"], "generate": ["hi"], "trace": ["hi"]}
    words = draft.get(name, [models / "draft", "--engine", "vllm"] if name == "serve-command" else [])
    drafted = ["--draft", models / "draft"] if name in ("demo", "plan", "trace") else []
    target = save_tiny_target(tmp_path / "deep", num_hidden_layers=7) if name == "compare" else models / "target"
    asked = ["--target", target, "--chat-template-kwargs", '{"mood": "calm"}']
    said = refused_last(name, *words, *drafted, *asked)
    assert said == "eyas: the chat template reads no variable mood; leave it out of chat-template-kwargs"


@pytest.fixture
def refused_last(run):
    """Run a command that must be refused, whatever it says of its progress before; its last line."""

    def command(*words) -> str:
        status, _, err = run(*words)
        assert status == 2
        return err.splitlines()[-1]

    return command
