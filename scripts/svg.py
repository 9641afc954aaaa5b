"""Boxes, words and arrows as an SVG that is readable on light and on dark pages.

Knows shapes and colours; knows nothing of what is drawn.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

LIGHT = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1d2126",
    "soft": "#59616b",
    "line": "#b9b3a6",
    "faint": "#e4e1d9",
    "g": "#cfdcf7",
    "g-edge": "#2f57a8",
    "a": "#f8d9bf",
    "a-edge": "#9a4d0c",
    "right": "#bfe3c8",
    "right-edge": "#2b7a48",
    "bonus": "#f7e3a6",
    "bonus-edge": "#8a6500",
    "seen": "#24506b",
}
DARK = {
    "paper": "#14171a",
    "card": "#1c2024",
    "ink": "#e8e6e1",
    "soft": "#a5abb3",
    "line": "#59616b",
    "faint": "#2a2f35",
    "g": "#24375f",
    "g-edge": "#8eb0f2",
    "a": "#5a3514",
    "a-edge": "#f0a25f",
    "right": "#1f4d31",
    "right-edge": "#6cc98e",
    "bonus": "#55420c",
    "bonus-edge": "#e0b94a",
    "seen": "#8fc3e0",
}


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height


class Drawing:
    def __init__(self, width: float, height: float, title: str) -> None:
        """`title`: what the picture says, for who cannot see it."""
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, lines: str = "", kind: str = "card", dashed: bool = False) -> Box:
        """A box with lines of words in its middle, the first in bold."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"{dash}/>')
        words = lines.split("\n") if lines else []
        for number, line in enumerate(words):
            self.words(x + width / 2, y + height / 2 + 4.5 + 15 * (number - (len(words) - 1) / 2), line, "middle", soft=number > 0)
        return Box(x, y, width, height)

    def words(self, x: float, y: float, line: str, anchor: str = "start", soft: bool = False) -> None:
        kind = ' class="soft"' if soft else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(line, quote=False)}</text>')

    def cell(self, x: float, y: float, size: float, kind: str) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{size - 1:g}" height="{size - 1:g}"/>')

    def arrow(self, start: tuple[float, float], end: tuple[float, float], kind: str = "", bend: bool = False, head: bool = True) -> None:
        """From `start` to `end`, straight or bent like an S that lies; `kind` adds a colour or dashes."""
        (x1, y1), (x2, y2) = start, end
        middle = (x1 + x2) / 2
        way = f"C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}" if bend else f"L{x2:g} {y2:g}"
        tip = ' marker-end="url(#tip)"' if head else ""
        self.parts.append(f'<path class="arrow {kind}" d="M{x1:g} {y1:g}{way}"{tip}/>')

    def text(self) -> str:
        names = [name.removesuffix("-edge") for name in LIGHT if name.endswith("-edge")]
        kinds = "".join(
            f".{name}{{fill:var(--{name});stroke:var(--{name}-edge)}}.arrow.{name}{{stroke:var(--{name}-edge)}}" for name in names
        )
        style = (
            f"svg{{{declared(LIGHT)}}}@media(prefers-color-scheme:dark){{svg{{{declared(DARK)}}}}}"
            "text{font:13px system-ui,sans-serif;fill:var(--ink);white-space:pre}.soft{font-size:11.5px;fill:var(--soft)}"
            ".paper{fill:var(--paper)}.card{fill:var(--card);stroke:var(--line)}.none{fill:none;stroke:var(--line)}"
            ".faint{fill:var(--faint)}.seen{fill:var(--seen)}"
            ".arrow,.tip{stroke:var(--soft)}.tip{fill:var(--soft)}"
            f"{kinds}.arrow{{fill:none;stroke-width:1.6}}.dashed{{stroke-dasharray:4 3}}"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" '
            f'height="{self.height:g}" role="img">\n<title>{escape(self.title)}</title>\n<style>{style}</style>\n'
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0L8 4L0 8z"/></marker>\n'
            f'<rect class="paper" width="{self.width:g}" height="{self.height:g}" rx="8"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def declared(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())
