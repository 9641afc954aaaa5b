"""What tests of layouts run on: a tiny target of eight layers and drafts for it, written by eyas itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas.formats.portable import Draft, TargetFiles, own_draft
from tests.tiny import save_tiny_draft, save_tiny_target

LAYERS = 8


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    save_tiny_target(root / "target", num_hidden_layers=LAYERS)
    save_tiny_draft(root / "draft", root / "target", taps=None)
    return root


@pytest.fixture(scope="session")
def target(place) -> TargetFiles:
    return TargetFiles.of(place / "target")


@pytest.fixture(scope="session")
def draft(place) -> Draft:
    return own_draft(place / "draft")


@pytest.fixture
def make(place, tmp_path):
    """A draft with other settings, as a directory of eyas's own."""

    def made(**settings) -> Path:
        return save_tiny_draft(tmp_path / "made", place / "target", **{"taps": None, **settings})

    return made
