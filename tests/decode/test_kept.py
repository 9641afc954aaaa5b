"""Claims about a conversation whose decoder stays: a turn reads its new tokens alone, and writes what it would have written."""

from __future__ import annotations

import itertools

import pytest

from eyas.decode.generate import Decoder
from eyas.decode.kept import Kept
from eyas.engine import load
from tests.tiny import save_tiny_draft, save_tiny_target

QUESTIONS = ["How can a hawk see so far?", "And an owl?", "Which of them is larger, and why?"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    target = save_tiny_target(folder / "target", max_position_embeddings=1024)
    return load(target, save_tiny_draft(folder / "draft", target), precision="bf16")


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Rows of prompts that were read, a number a call."""
    found: list[int] = []
    read_prompt = Decoder.read_prompt

    def counted(self, *words):
        before = self.reading[0].read
        (sequence,) = read_prompt(self, *words)
        found.append(sequence.read - before)
        return [sequence]

    monkeypatch.setattr(Decoder, "read_prompt", counted)
    return found


def conversation(engine, kept, read, **settings) -> tuple[list[str], list[tuple[int, int]]]:
    """What is said turn by turn, and each time the tokens of the prompt and the rows of it that were read."""
    messages, said, counts = [], [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        read.clear()
        *pieces, result = engine.stream(messages, kept=kept, max_new_tokens=20, generation_config="none", seed=3, **settings)
        said.append("".join(pieces))
        counts.append((result.prompt_tokens, sum(read)))
        messages.append({"role": "assistant", "content": said[-1]})
    return said, counts


@pytest.mark.parametrize("method", ["plain", "eagle3", "lookup"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_turn_reads_its_new_tokens_alone_and_says_the_same(engine, read, method, temperature):
    if not engine.target.rows_stand_alone:
        pytest.skip("needs the native kernel")
    settings = {"method": method, "tree": "8x2x3", "temperature": temperature}
    wanted, whole = conversation(engine, None, read, **settings)
    said, counts = conversation(engine, Kept(), read, **settings)
    assert said == wanted and [prompt for prompt, _ in counts] == [prompt for prompt, _ in whole] == [rows for _, rows in whole]
    for (before, _), (prompt, rows) in itertools.pairwise(counts):
        assert rows <= prompt - before + 1  # the answer before may be written in other tokens than it was drawn in


def test_a_turn_that_is_broken_off_leaves_nothing_and_the_next_one_is_right(engine, read):
    kept, settings = Kept(), {"max_new_tokens": 20, "tree": "8x2x3", "generation_config": "none"}
    turn = engine.stream(QUESTIONS[0], kept=kept, **settings)
    next(turn)
    turn.close()
    assert kept.decoder is None
    found = list(engine.stream(QUESTIONS[0], kept=kept, **settings))[-1]
    assert kept.decoder is not None and found.tokens == engine.generate(QUESTIONS[0], **settings).tokens


def test_a_conversation_that_outgrows_its_room_gets_more(engine, read, monkeypatch):
    monkeypatch.setattr("eyas.decode.kept.LEAST_ROOM", 64)
    kept = Kept()
    assert conversation(engine, kept, read, tree="8x2x3")[0] == conversation(engine, None, read, tree="8x2x3")[0]
    assert 64 < kept.room <= 1024
