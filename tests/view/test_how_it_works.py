"""docs/how-it-works.md shows a real run: its pictures and what it quotes are made of the recording, and the recording is what the model
does."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from eyas.kernels import native
from eyas.reference import ancestor_mask, comb_parents
from tests.page_tables import script

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "how-it-works.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made():
    return script("how_it_works")


def test_what_the_page_quotes_is_what_the_recording_says(made):
    assert made.written(PAGE) == PAGE, "run: python scripts/how_it_works.py"
    assert [place for place in made.tables(made.read()) if f"<!-- table: {place} -->" not in PAGE] == []


def test_the_pictures_are_drawn_of_the_recording(made):
    for name, text in made.pictures().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, "run: python scripts/how_it_works.py"
        assert f"]({name})" in PAGE and len(text) < 60_000
        ElementTree.fromstring(text)


def cells(text: str, *kinds: str) -> int:
    """The dark squares of a mask."""
    return sum(
        part.get("class") in kinds and part.get("width") == part.get("height") == "19"
        for part in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")
    )


def test_the_masks_that_are_drawn_are_the_references(made):
    told = made.read()
    nodes = told["rounds"][0]["nodes"]
    assert cells(made.tree(told), "seen") == int(ancestor_mask([node[2] for node in nodes]).sum())
    assert cells(made.comb(told), "g", "a") == int(ancestor_mask(comb_parents(made.ANCHORS, made.STEPS)).sum())


def test_the_shapes_are_the_bundled_drafts(made):
    config = json.loads((DOCS.parent / "eyas" / "bundled" / "config.json").read_text(encoding="utf-8"))
    shapes = made.read()["shapes"]
    assert (shapes["draft"], shapes["draft_vocabulary"]) == (config["hidden_size"], config["draft_vocab_size"])
    assert (shapes["taps"], shapes["layers"]) == (config["eyas"]["taps_are_inputs_of_layers"], config["eyas"]["target_layers"])
    assert f"{shapes['draft_vocabulary']:,}" in PAGE
    assert f"[{3 * shapes['target']}]" in made.pipeline(made.read())


@pytest.mark.real
@pytest.mark.skipif(native.kernel() is None, reason="other kernels may round a near tie another way")
def test_the_recording_is_what_the_model_does(made, embedded):
    def settled(told):
        return [[[node[:4] for node in each["nodes"]], each["path"], each["bonus"], each["committed"]] for each in told["rounds"]]

    now, held = made.recorded(), made.read()
    assert settled(now) == settled(held) and (now["text"], now["shapes"]) == (held["text"], held["shapes"])
