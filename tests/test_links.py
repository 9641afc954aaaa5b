"""Every relative link of every Markdown page leads to a file that is there, and to a heading where it names one.

Looks at no address of the web.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
ADDRESS = re.compile(r"[a-z]+:|//")  # https:, mailto:


def pages(root: Path) -> list[Path]:
    """Markdown of the repository; folders that begin with a dot, and what a build leaves, are not of it."""
    apart = ("build", "dist", "node_modules", "site")
    found = sorted(root.rglob("*.md"))
    return [page for page in found if not any(part.startswith(".") or part in apart for part in page.relative_to(root).parts[:-1])]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as a link names them."""
    headings = re.findall(r"^#+ +(.*?)\s*$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> Iterator[str]:
    text = FENCED.sub("", page.read_text())
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if ADDRESS.match(link):
            continue
        path, _, heading = link.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (heading and there.suffix == ".md" and heading not in anchors(there)):
            yield link


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    assert list(dead_links(page)) == []


def test_a_dead_link_is_found_and_code_is_not_taken_for_one(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A heading, with *marks*\n\n```\n# not a heading\n```\n")
    page.write_text(
        "[good](other.md) [good](other.md#a-heading-with-marks) [web](https://example.org/x) [here](#title)\n\n# Title\n\n"
        "```\n[in code](nowhere.md)\n```\n\n"
        '[file](gone.md) [heading](other.md#gone) [heading](other.md#not-a-heading) ![picture](gone.png) <img src="gone.svg" width="3">\n'
    )
    assert list(dead_links(page)) == ["gone.md", "other.md#gone", "other.md#not-a-heading", "gone.png", "gone.svg"]
