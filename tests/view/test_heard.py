"""What is heard of a drafter is what its head said, and hearing it changes no tree."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import eyas
from eyas.view.heard import Listener
from eyas.view.trace import row_at
from tests.tiny import save_tiny_draft, save_tiny_target


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> eyas.Engine:
    root: Path = tmp_path_factory.mktemp("models")
    save_tiny_target(root / "target", 0)
    save_tiny_draft(root / "draft", root / "target")
    return eyas.load(root / "target", draft=root / "draft", precision="fp32")


@pytest.mark.parametrize(("temperature", "bias"), [(0.0, {}), (0.7, {}), (1.0, {}), (1.0, {5: 3.0})])
def test_the_heads_own_probability_is_the_score_without_the_noise(engine, monkeypatch, temperature, bias):
    """log score = log q + noise - a constant of the node; greedy, the score is q itself. Trees and text are those of nobody listening."""
    settings = {"method": "eagle3", "temperature": temperature, "seed": 3, "tree": "20x3x4", "max_new_tokens": 20, "raw": True}
    settings |= {"logit_bias": bias, "copy": False}
    silent, records, checked = [], [], 0
    alone = engine.generate("How can", watch=silent.append, **settings)
    listener = Listener(engine.drafter("eagle3"))
    monkeypatch.setitem(engine.makers, "eagle3", lambda: listener)
    for (text,) in engine.rounds("How can", engine.request(**settings), records.append):
        heard = listener.heard
        if not records or heard is None or not heard.levels:
            continue
        tree, position = records[-1].tree, len(text.tokens) - len(records[-1].committed) - 1
        assert heard.noisy == (temperature > 0)
        for path in (path for level in heard.levels for path in level):
            row = row_at(tree, path)
            constants = []
            for token, child in tree.children[row].items() if row is not None else ():
                noise = float(text.noise.at(position + tree.depths[child])[token]) if temperature else 0.0
                constants.append(math.log(heard.own(path, token)) + noise - (tree.scores[child] - tree.scores[row]))
            checked += len(constants) > 1
            assert all(value == pytest.approx(constants[0] if temperature else 0.0, abs=1e-4) for value in constants)
    assert checked > 10
    for record, wanted in zip(
        records, silent, strict=True
    ):  # whoever listens needs logits, which the kernel's own ranking rounds otherwise
        assert (record.tree.tokens, record.tree.parents) == (wanted.tree.tokens, wanted.tree.parents)
        assert record.tree.scores == pytest.approx(wanted.tree.scores, abs=1e-4)
    assert text.tokens[text.prompt_length :] == alone.tokens
