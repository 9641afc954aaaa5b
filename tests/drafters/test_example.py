"""The tutorial's method (docs/add-a-method.md): it decodes plain's text, learns, has the whole command line, and is what the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from eyas import plugins
from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.methods import METHODS
from eyas.train.trainer import Budget
from tests.commands.words import eyas
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_target
from tests.tiny_family import tiny_network
from tests.train.training import SETTINGS, make_trainer, silent

EXAMPLE = Path(__file__).parents[2] / "examples" / "hydra.py"
IDEAS = EXAMPLE.with_name("ideas.py")
COPIED = 'register("mine", Method(__name__, __name__, draft="mine"))'
TUTORIAL = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def hydra(monkeypatch):
    """The example's module, its method known for the length of a test."""
    monkeypatch.setitem(METHODS, "hydra", METHODS["plain"])  # so that what the file registers goes again
    del METHODS["hydra"]
    return plugins.read(EXAMPLE)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", ["chain:6", "9x3x3"])
def test_its_text_is_plain_decodings(hydra, tree, temperature):
    network, vocab = tiny_network("hydra", tiny_target(prepare=False))
    network.prepare()
    prompts, sampling = [[3, 14, 15], [9, 2, 6, 5]], Sampling(temperature)

    def texts(drafter, shape):
        *_, found = Decoder(tiny_target(), drafter).run(prompts, shape, sampling, [0, 1], 20)
        return [text.tokens for text in found]

    assert texts(hydra.drafter(network, vocab), TreeShape.parse(tree)) == texts(None, PLAIN)


def test_it_learns(hydra, tmp_path):
    trainer = make_trainer(tmp_path / "draft", SETTINGS, method="hydra")
    trainer.run(Budget(steps=60), silent)
    assert trainer.progress.best() > 1.2


def test_the_whole_command_line_knows_it(tmp_path):
    target, data = save_tiny_target(tmp_path / "target", num_hidden_layers=7), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(6)))

    copy = tmp_path / "an idea of mine.py"  # under any name, in any place
    copy.write_text(EXAMPLE.read_text())

    def run(*words) -> str:
        done = eyas(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    own = ["--plugin", copy, "--target", target, "--method", "hydra"]
    run("train", *own, "--data", data, "--steps", "3", "--draft-vocab", "200", "--workers", "1", "--out", tmp_path / "draft")
    told = json.loads(run("generate", "hi", *own, "--draft", tmp_path / "draft", "--seed", "1", "--max-new-tokens", "8", "--json"))
    plain = json.loads(run("generate", "hi", "--target", target, "--plain", "--seed", "1", "--max-new-tokens", "8", "--json"))
    assert told["tokens"] == plain["tokens"]


def test_a_copy_under_another_name_trains_a_draft_that_its_next_step_finds(tmp_path, monkeypatch):
    """Only the line that registers is changed; the draft says the name that it was trained as."""
    target = save_tiny_target(tmp_path / "it's a target", num_hidden_layers=7)
    copy, data = tmp_path / "my own.v2.py", tmp_path / "data.jsonl"
    copy.write_text(EXAMPLE.read_text().replace('register("hydra", Method(__name__, __name__, draft="hydra"))', COPIED))
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "The nest is high up in the old tree."}]
    rows = [{"messages": [*turns[:1], {**turns[1], "content": f"{number}: {turns[1]['content']}"}]} for number in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--method", "mine", "--target", target, "--data", data, "--out", tmp_path / "draft", "--steps", "1", "--draft-vocab", "200"]
    trained = eyas("train", "--plugin", copy, *words, "--unroll", "2", "--workers", "1")
    assert trained.returncode == 0, trained.stderr
    following = shlex.split(trained.stdout.split("; try: ")[1])
    assert following[0] == "eyas" and following[-2:] == ["--plugin", str(copy)]
    written = eyas(*following[1:], "--max-new-tokens", "4", "--method", "mine")
    assert written.returncode == 0, written.stderr


def test_its_other_ideas_are_compared_and_used(tmp_path):
    """The loss in `ablate`, in one file with the growth; the growth's trees taper and its text is plain decoding's."""
    target, data = save_tiny_target(tmp_path / "target", num_hidden_layers=7), tmp_path / "data.jsonl"
    save_tiny_draft(tmp_path / "draft", target, taps=None)
    data.write_text("".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(6)))
    own, out = ["--plugin", IDEAS, "--target", target], tmp_path / "r.json"
    common = ["--common", "draft_vocab_size=200", "--steps", "2", "--workers", "1"]
    done = eyas("ablate", *own, "--data", data, *common, "--set", "loss=reverse-kl", "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["variants"]["loss=reverse-kl"]["acceptance"]
    words = ["--draft", tmp_path / "draft", "--seed", "1", "--max-new-tokens", "8", "--json"]
    told, plain = (json.loads(eyas("generate", "hi", *own, *words, *more).stdout) for more in (["--tree", "9x3x4/tapered"], ["--plain"]))
    assert told["tokens"] == plain["tokens"]
    done = eyas("generate", "hi", "--target", target, *words, "--tree", "9x3x4/tapered")
    assert (done.returncode, done.stderr) == (2, "eyas: growth 'tapered' is unknown; there are none (register one with --plugin)\n")


def test_every_piece_of_code_in_the_tutorial_is_the_examples():
    """Code told twice goes stale: each block of the page stands in an example, its lines in a row, docstrings aside."""
    source = bare(IDEAS.read_text()) + bare(EXAMPLE.read_text())
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.S)
    assert len(blocks) > 6
    for block in blocks:
        assert bare(block) in source, block


def talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello, how are you today? number {number}"}]


def bare(code: str) -> str:
    """Lines without indentation, blank ones and docstrings."""
    code = re.sub(r'"""(.|\n)*?"""', "", code)
    return "\n".join(line.strip() for line in code.splitlines() if line.strip()) + "\n"
