"""`eyas chat` and `eyas trace`."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eyas.view.side_by_side import verdict
from tests.commands.words import generate, interrupt_round
from tests.tiny import save_tiny_draft


def chat(models: Path, *words) -> list:
    return ["chat", *generate(models, *words)[1:]]


def test_chat_answers_every_line_and_ends_with_its_input(models, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is the nest?\nAnd now?\n"))
    status, out, err = run(*chat(models, "--max-new-tokens", "12"))
    assert status == 0 and out.count("> ") == 3
    assert len(re.findall(r"\[\d+ tokens, \d+ rounds, tau \d\.\d\d", err)) == 2
    first = json.loads(run(*generate(models, "Where is the nest?", "--max-new-tokens", "12", "--json"))[1])["text"]
    assert out.startswith(f"> {first}")


def test_chat_survives_ctrl_c_and_a_full_context(models, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" + "x" * 300 + "\nand now\n\nnever read\n"))
    interrupt_round(monkeypatch, 3)
    status, _, err = run(*chat(models, "--max-new-tokens", "8", "--plain"))
    assert status == 0
    assert "\n[stopped]\n" in err and err.count("tokens/s") == 1
    assert re.search(r"^eyas: the prompt has \d+ tokens, the model reads at most 256; shorten it$", err, re.MULTILINE)


def test_trace_tells_the_rounds_in_order(models, run):
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "2"]
    status, out, err = run(*words)
    assert status == 0 and err == ""
    order = [
        "The target reads the prompt",
        "low l, middle m, high h",
        "fc (3 x 32 -> 32) fuses",
        "into one vector g: g_",
        "the target draws",
        "Round 1",
        "Step 1: the draft",
    ]
    order += ["reads g_", "makes a_", "its head guesses", "Step 2:", "does not exist", "stands in", "The tree", "target draws", "The walk"]
    order += ["bonus token", "Cache rows of the path stay", "Round 2", "Step 1", "The tree", "The walk", "Written in 2 rounds, seed "]
    place = 0
    for words in order:
        assert words in out[place:], f"{words!r} is missing behind {out[:place][-60:]!r}"
        place = out.index(words, place) + len(words)


def test_trace_writes_a_page_with_the_rounds_inside(models, run, tmp_path):
    page = tmp_path / "rounds.html"
    words = ["trace", "</script>abab" * 4, "--raw", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32"]
    status, out, err = run(*words, "--html", page, "--copy", "--temperature", "1", "--seed", "3")
    assert status == 0 and out == "" and re.search(r"rounds\.html: \d+ rounds, seed 3; open it in a browser\n$", err)
    text = page.read_text(encoding="utf-8")
    (held,) = re.findall(r'<script type="application/json" id="recording">(.*?)</script>', text)
    told = json.loads(held)
    (turn,) = told["turns"]
    assert turn["prompt"] == "</script>abab" * 4 and told["about"]["method"] == "eagle3+copy"
    assert [each["n"] for each in turn["rounds"]] == list(range(1, len(turn["rounds"]) + 1))
    wanted = json.loads(
        run(*generate(models, *words[1:3], "--copy", "--temperature", "1", "--seed", "3", "--max-new-tokens", "48", "--json"))[1]
    )
    ids = [turn["rounds"][0]["root"]["id"], *(token for each in turn["rounds"] for token, _ in each["committed"])]
    assert ids == wanted["tokens"] and turn["answer"] == wanted["text"]
    assert "static/" not in text and "default-src 'none'" in text
    _, _, err = run(*words, "--html", page, "--rounds", "2")
    assert ": 2 rounds" in err


def test_trace_refuses_a_page_that_cannot_be_written_before_anything_is_loaded(models, refused, tmp_path):
    line = refused("trace", "hi", "--html", tmp_path / "no" / "t.html", "--target", "nowhere", "--draft", models / "draft")
    assert line.startswith(f"--html {tmp_path / 'no' / 't.html'} cannot be written")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["", "--rounds", "2"], "the prompt is empty; give some text"),
        (["hi", "--rounds", "0"], "rounds must be at least 1, not 0"),
        (
            ["hi", "--tree", "7x"],
            "tree shape '7x' is not understood; write NODESxDEPTHxTOPK (60x7x10), "
            "chain:K (chain:3), static:CHILDREN (static:3.2.0.1) or auto",
        ),
    ],
)
def test_trace_refuses_in_one_line(models, refused, words, line):
    assert refused("trace", *words, "--target", models / "target", "--draft", models / "draft") == line


def test_trace_shows_the_draws_that_penalties_leave(models, run):
    """In every round the first draw that the tree shows is the round's first token."""
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "6"]
    _, out, _ = run(*words, "--frequency-penalty", "2", "--repetition-penalty", "1.5")
    rounds = out.split("\nRound ")[1:]
    for told in rounds:
        drawn = re.findall(r"target draws ('.*)", told)[0]
        kept = re.search(r"keeps ('.*?')[ ,]|keeps no guess, and the draw that left the tree, (.*), is the bonus", told)
        assert kept and drawn in (kept[1], kept[2])
    assert len(rounds) == 6


def test_trace_tells_or_counts_every_expanded_node(models, run):
    """A tree 2 wide and 4 deep expands the root and then two nodes a level: of each level one is told, one is counted and named."""
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "3"]
    _, out, _ = run(*words, "--tree", "12x4x2")
    told, counted = len(re.findall(r"^  Step \d", out, re.M)), re.findall(r"(\d) more nodes? of this level expanded, at '", out)
    assert told == 3 * 5 and counted == ["1"] * (3 * 4)


def test_trace_tells_the_heads_own_distribution_from_the_noise(models, run):
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "1"]
    _, greedy, _ = run(*words)
    assert "noise" not in greedy
    _, out, _ = run(*words, "--temperature", "1", "--seed", "3")
    own, noisy = re.findall(r"its head guesses (.*); with the noise the target draws with: (.*)", out)[0]
    split = re.compile(r"('.*?'|\".*?\") (\d\.\d\d)")
    assert [token for token, _ in split.findall(own)] == [token for token, _ in split.findall(noisy)] != []
    assert own != noisy and "each path's chance given the target's noise" in out


def test_trace_says_where_the_draft_is_not_asked(models, run):
    words = ["trace", "How can", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--rounds", "1"]
    _, out, _ = run(*words, "--max-new-tokens", "2")
    assert "The draft is not asked: there is room for one token alone." in out and "Step 1" not in out


def test_trace_tells_what_copying_says_beside_the_head(models, run):
    models = ["--target", models / "target", "--draft", models / "draft", "--precision", "fp32"]
    words = ["trace", "abab" * 6, "--raw", *models, "--rounds", "8"]
    assert "before came" not in run(*words)[1]
    _, out, _ = run(*words, "--copy")
    _, noisy, _ = run(*words, "--copy", "--temperature", "1", "--seed", "3")
    assert re.search(r"; after the same \d+ tokens? before came '.*' \d\.\d\d.*; both together: ", out)
    assert re.search(r"; both together, with the noise the target draws with: ", noisy)
    _, repeated, _ = run("trace", "a" * 30, "--raw", *models, "--rounds", "2", "--copy", "--logit-bias", "64=100")
    assert "The draft is not asked: copying is sure of what follows." in repeated


def test_trace_without_a_draft_says_how_to_get_one(models, refused):
    assert refused("trace", "hi", "--target", models / "target") == (
        "no draft for target; name one with --draft, train one with `eyas train`, or use --method plain"
    )


@pytest.fixture(scope="module")
def two(models, tmp_path_factory) -> list:
    """Options that name two drafts, the second of other weights."""
    other = save_tiny_draft(tmp_path_factory.mktemp("two") / "other", models / "target", seed=5)
    return ["--target", models / "target", "--draft", models / "draft", "--draft", other, "--precision", "fp32"]


def test_trace_tells_two_drafts_side_by_side_on_one_text(models, run, two):
    status, out, err = run("trace", "How can", *two, "--rounds", "3", "--temperature", "1", "--seed", "4", "--max-new-tokens", "20")
    assert status == 0, err
    assert re.search(r"┃ behind +┃ draft +┃ other +┃", out)
    taus = re.findall(r"^(\w+): (\d+) tokens in (\d+) rounds, tau (\d\.\d\d)$", out, re.M)
    assert [name for name, *_ in taus] == ["draft", "other"] and {tokens for _, tokens, *_ in taus} == {"20"}
    assert all(abs(19 / int(rounds) - float(tau)) < 0.01 for _, _, rounds, tau in taus)
    alone = json.loads(
        run(*generate(models, "How can", "--plain", "--temperature", "1", "--seed", "4", "--max-new-tokens", "20", "--json"))[1]
    )
    assert f"The same 20 tokens of the target with both, seed 4: {alone['text']!r}" in out
    assert re.search(r"\d in both trees, \d in this one alone", out) and "bonus" in out


def test_trace_writes_two_drafts_into_one_page(run, two, tmp_path):
    page = tmp_path / "two.html"
    status, _, err = run("trace", "How can", *two, "--temperature", "1", "--seed", "4", "--html", page)
    assert status == 0 and re.search(r"two\.html: \d+ and \d+ rounds, seed 4; open it in a browser\n$", err)
    (held,) = re.findall(r'<script type="application/json" id="recording">(.*?)</script>', page.read_text(encoding="utf-8"))
    told = json.loads(held)
    one, other = told["turns"]
    assert [one["draft"], other["draft"]] == ["draft", "other"] and told["about"]["draft"] == "draft beside other"
    assert one["answer"] == other["answer"] and one["rounds"][0]["root"] == other["rounds"][0]["root"]


def test_trace_compares_two_drafts_and_no_more(refused, two):
    assert refused("trace", "hi", *two, "--draft", "bundled").startswith("two drafts are compared at a time")
    assert refused("trace", "hi", "--draft", "a", "--draft", "a") == "both drafts are a; name two different ones"


def test_where_texts_part_is_said():
    parted = [SimpleNamespace(text=SimpleNamespace(tokens=[9, 1, last], prompt_length=1, seed=0)) for last in (2, 3)]
    assert verdict(*parted, None).startswith("The texts part behind 1 token:")
