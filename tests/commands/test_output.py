"""Where output goes: nothing is cut where nobody looks, nothing that is not ours is written over, bars say how much and how long."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.table import Table

import eyas
from eyas.commands import demo, output
from eyas.config import EyasError
from eyas.view.colour import write_coloured


def test_what_is_piped_is_cut_at_no_column(capsys):
    table = Table("name", "said")
    table.add_row("x" * 200, "y" * 200)
    output.terminal().print(table)
    output.terminal().print("a line of " + "words " * 80 + "end")
    out = capsys.readouterr().out
    assert "x" * 200 in out and "y" * 200 in out and "…" not in out and "words end\n" in out


def test_only_an_earlier_result_is_written_over(tmp_path):
    earlier, notes, bare = tmp_path / "r.json", tmp_path / "notes.json", tmp_path / "notes.txt"
    earlier.write_text('{"conditions": {}, "methods": {}}'), notes.write_text('{"mine": 1}'), bare.write_text("mine")
    assert output.result_file(str(earlier)) == earlier and output.result_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    assert not (tmp_path / "new.json").exists()
    for path in (notes, bare):
        with pytest.raises(EyasError, match="holds something else than an earlier result; it is not replaced"):
            output.result_file(str(path))
    with pytest.raises(EyasError, match=r"named like a picture; the result is JSON"):
        output.result_file(str(tmp_path / "r.png"))
    output.write_result(earlier, {"conditions": {"seed": 1}})
    assert json.loads(earlier.read_text()) == {"conditions": {"seed": 1}} and notes.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "--svg", "x.gif"], "--svg x.gif: a picture's name ends in .svg"),
        (["demo", "--svg", "no/x.svg"], "--svg no/x.svg cannot be written (No such file or directory)"),
        (["plan", "--picture", "x"], "--picture x: a picture's name ends in .png or .svg or .pdf"),
        (["plan", "--picture", "no/x.png"], "--picture no/x.png cannot be written"),
        (["demo", "--tree", "7x"], "tree shape '7x' is not understood"),
    ],
)
def test_where_a_picture_goes_is_checked_before_anything_is_loaded(refused, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(output, "can_draw", lambda: True)
    monkeypatch.setattr("eyas.commands.common.load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    assert refused(*words).startswith(said) and list(tmp_path.iterdir()) == []


def test_a_bar_says_how_much_is_done_and_where_no_terminal_is_a_line_now_and_then(monkeypatch):
    shown = output.terminal(stderr=True)
    shown.file = io.StringIO()
    monkeypatch.setattr(output, "SILENCE", 0.0)
    with output.progress(shown) as bar:
        bar.update(bar.add_task("writing", total=400_000, unit="answer tokens"), completed=1234)
        bar.update(bar.add_task("fetching", total=None, unit="MB"), completed=5_000_000)
        bar.update(bar.add_task("training", total=10), completed=5, told="3 steps")
    assert shown.file.getvalue().splitlines() == ["writing: 1,234 of 400,000 answer tokens", "fetching: 5 MB", "training: 3 steps"]


def test_the_demo_names_the_tree_behind_its_figures(models, run):
    words = ["demo", "--target", models / "target", "--draft", models / "draft", "--precision", "fp32", "--max-new-tokens", "12"]
    planned = run(*words)[1]
    assert re.search(r"\(fp32, greedy, tree auto: planned each round, \d+\.\d nodes on average, \d+ tokens, ", planned)
    assert "(fp32, greedy, tree chain:3, " in run(*words, "--tree", "chain:3")[1]
    assert "or copied" not in planned and "guessed by the draft or copied, and right" in run(*words, "--copy")[1]
    assert demo.tree_told("auto", [1, 4]) == "tree auto: planned each round, 2.5 nodes on average"


def test_the_nodes_are_those_that_the_rounds_had(models):
    engine = eyas.load(models / "target", draft=models / "draft", precision="fp32")
    records = []
    settings = {"method": "eagle3", "tree": "8x2x3", "max_new_tokens": 12}
    engine.generate("hi", watch=records.append, **settings)
    *_, nodes = write_coloured(engine, "hi", engine.request(**settings), output.terminal(quiet=True))
    assert nodes == [len(record.tree) for record in records] and nodes[0] > 1


def test_what_measures_a_draft_counts_the_tokens_that_the_target_writes(models, run, monkeypatch):
    """Where no terminal shows a bar, a line says how far it is."""
    monkeypatch.setattr(output, "SILENCE", 0.0)
    words = ["--target", models / "target"]
    for command in (["doctor", models / "draft", "--tokens", "8"], ["serve-command", models / "draft", "--engine", "vllm"]):
        _, out, err = run(*command, *words)
        assert re.search(r"the target answers: \d+ of \d+ tokens at most", err) and "the target answers" not in out
    assert re.search(r"the draft is measured: \d of 7 steps", run("serve-command", models / "draft", "--engine", "vllm", *words)[2])
    assert re.search(r"the draft is measured: \d+ of \d+ readings", run("doctor", models / "draft", "--tokens", "8", *words)[2])
    _, _, err = run("plan", *words, "--draft", models / "draft", "--precision", "fp32")
    assert re.search(r"practice: \d+ of 300 tokens at most", err)
