"""The version stands in pyproject.toml alone: the package says the one it was installed with, and the changelog has its entry."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import eyas

ROOT = Path(__file__).parents[1]


def test_the_version_is_what_was_installed(monkeypatch):
    monkeypatch.setattr(metadata, "version", {"eyas": "7.8.9"}.__getitem__)
    assert eyas.__version__ == "7.8.9"


def test_a_source_tree_that_is_not_installed_has_a_version_too(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert eyas.__version__ == "0+unknown"


def test_the_changelog_has_an_entry_for_the_version_and_one_for_what_is_coming():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version, "pyproject.toml holds no version"
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert entries[0] == "Unreleased"
    assert version[1] in entries
