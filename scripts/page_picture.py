"""Draws the README's picture of a round: the page of `eyas trace --html` in a browser, one round of it, down to the tree.

Run: eyas trace "How can a hawk see so well?" --temperature 0.7 --seed 1 --html rounds.html
     python scripts/page_picture.py rounds.html ROUND docs/page.png      (needs Playwright, and Chromium in the PATH)
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, EDGE = 740, 10  # of the window, at which the page has one column; left and right of what is cut out of it: in pixels


def main(page_file: Path, number: int, out: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.6)
        page.goto(page_file.resolve().as_uri())
        page.wait_for_function("document.querySelector('#where').textContent.startsWith('1 of ')")
        for _ in range(number - 1):
            page.keyboard.press("ArrowRight")
        page.wait_for_function(f"document.querySelector('#where').textContent.startsWith('{number} of ')")
        first, last = (page.locator(f"#strokes > li:nth-child({place})").bounding_box() for place in (1, 2))
        assert first and last
        top = first["y"] + page.evaluate("scrollY") + 1
        clip = {
            "x": first["x"] - EDGE,
            "y": top,
            "width": first["width"] + 2 * EDGE,
            "height": last["y"] + last["height"] - first["y"],
        }
        page.screenshot(path=out, full_page=True, clip=clip)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
