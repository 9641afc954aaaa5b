"""The page's files, and the page with a recording inside: one file that opens from a disk.

Knows the package's own files; knows nothing of servers or rounds.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

INDEX, MODULE, STYLE, ICON = "index.html", "page.js", "page.css", "icon.svg"
PAGE = {INDEX: "text/html", MODULE: "text/javascript", STYLE: "text/css", ICON: "image/svg+xml"}  # kinds of text, in UTF-8
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ALONE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"  # of a file: it loads nothing at all
FORM = 1  # of recordings; page.js knows it too


@cache
def page_file(name: str) -> str:
    return (files("eyas.serve") / "page" / name).read_text(encoding="utf-8")


def turn(prompt: str, answer: str, rounds: list[dict[str, Any]], draft: str = "") -> dict[str, Any]:
    """One text of a recording. `rounds`: as view/rounds.py tells them; `draft`: whose guesses they have, where a recording has several."""
    return {"request": "", "choice": 0, "prompt": prompt, "answer": answer, "draft": draft, "rounds": rounds}


def recording(about: dict[str, Any], *turns: dict[str, Any]) -> dict[str, Any]:
    """A recording, as the page saves and opens it. `about`: what wrote its texts."""
    return {"recording": FORM, "about": about, "turns": list(turns)}


def page_with(told: dict[str, Any]) -> str:
    """The page as one file, with a recording inside."""
    inside = json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag of its own can end it
    parts = {
        f'<link rel="icon" type="image/svg+xml" href="static/{ICON}">\n': "",
        f'<link rel="stylesheet" href="static/{STYLE}">': f"<style>\n{page_file(STYLE)}</style>",
        f'<script type="module" src="static/{MODULE}"></script>': (
            f'<script type="application/json" id="recording">{inside}</script>\n<script type="module">\n{page_file(MODULE)}</script>'
        ),
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{ALONE}">',
    }
    page = page_file(INDEX)
    for mark, part in parts.items():
        assert page.count(mark) == 1, f"{INDEX} has {mark} once"
        page = page.replace(mark, part)
    return page
