"""Claims about the benchmark: what is counted, what is compared, and what a broken file or option says. Nothing is downloaded."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from eyas.bench import speed as bench_speed
from eyas.bench.figures import (
    Generation,
    Round,
    acceptance,
    acceptance_by_step,
    estimate,
    figures_of,
    first_difference,
    first_repeat,
    ratio,
    speedup,
)
from eyas.bench.prompts import PromptItem, fitting, read_prompts
from eyas.bench.speed import Method, parse_methods, round_of, run_bench
from eyas.cli import main
from eyas.commands import bench as command
from eyas.commands.output import result_file
from eyas.config import EyasError, Request, Sampling
from eyas.decode.sampling import derived_seed
from eyas.decode.sequence import RoundRecord
from eyas.decode.tree import Tree
from eyas.decode.verify import Accepted
from eyas.engine import Engine
from eyas.files.eagle3_files import save_draft
from tests.tiny import byte_tokenizer, save_tiny_draft, save_tiny_target, tiny_draft, tiny_target

PROMPTS = [PromptItem(line, text) for line, text in enumerate(("Hello there", "One, two", "A hawk"), start=1)]
SPECS = "plain,eagle3@chain:3,eagle3@8x2x3,lookup,eagle3@chain:2+accept-reject"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("draft")
    target = tiny_target(prepare=False, vocab_size=len(tokenizer), max_position_embeddings=512)
    save_draft(folder, *tiny_draft(target, draft_vocab_size=120), target.config.num_hidden_layers)
    return Engine(target, tokenizer, folder.parent, folder, "fp32")


def bench(engine: Engine, methods: str = SPECS, report=lambda *_: None, **settings):
    request = Request(**{"seed": 5, "max_new_tokens": 24, "verifier": "walk"} | settings)
    return run_bench(engine, PROMPTS, parse_methods(methods), request, report)


def generation(tokens, seconds=1.0, lengths=()) -> Generation:
    return Generation(list(tokens), seconds, [Round(length, 3, length - 1) for length in lengths])


@pytest.fixture
def lines(tmp_path):
    def write(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


# ---- what is counted ----


def test_tau_is_a_hand_count():
    runs = [generation(range(8), lengths=[3, 1, 3]), generation(range(100, 103), lengths=[2])]
    found = acceptance(runs)
    assert found["tau"] == (3 + 1 + 3 + 2) / 4
    assert found["accepted_lengths"] == {"1": 1, "2": 1, "3": 2}
    assert found["tau_before_loop"] == found["tau"] and found["looped_share"] == 0


def test_tau_of_a_run_is_what_its_rounds_committed(engine):
    for figures in bench(engine)["methods"].values():
        lines = figures["prompts"]
        assert figures["tau"] == sum(line["committed"] for line in lines) / sum(line["rounds"] for line in lines)
        assert all(line["committed"] == line["tokens"] - 1 for line in lines)  # the first token is prefill's
        assert sum(int(length) * rounds for length, rounds in figures["accepted_lengths"].items()) == sum(x["committed"] for x in lines)
        assert figures["tokens"] == sum(line["tokens"] for line in lines)


def test_acceptance_by_step_is_a_hand_count():
    rounds = [Round(1, 2, 0), Round(2, 2, 1), Round(3, 2, 2), Round(3, 3, 2), Round(1, 0, 0)]
    assert acceptance_by_step(rounds) == [3 / 4, 2 / 3, 0.0]  # the last round guessed nothing; only one guessed three deep
    assert acceptance_by_step([Round(1, 0, 0)]) == []


def test_a_cut_round_does_not_count_as_a_miss():
    """Four guesses in a row, three right; if the text ends at the second, the deeper ones were never tried."""
    tree = Tree([0, 1, 2, 3, 4], [-1, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0.0] * 5)
    path = Accepted([0, 1, 2, 3], bonus=9)
    assert round_of(RoundRecord(0, tree, path, [1, 2, 3, 9], torch.empty(0))) == Round(committed=4, tried=4, right=3)
    assert round_of(RoundRecord(0, tree, path, [1, 2], torch.empty(0))) == Round(committed=2, tried=2, right=2)


def test_the_loop_cut_finds_the_first_repeated_16_gram():
    fresh, loop = list(range(100, 120)), list(range(16))
    assert first_repeat(fresh) == 20
    assert first_repeat(fresh + loop + loop) == 36
    assert first_repeat(fresh + loop + loop[:15]) == 51  # fifteen are no loop
    assert first_repeat(fresh + [7] * 17) == 21  # overlap counts
    assert first_repeat([]) == 0


def test_tau_before_loops_counts_only_rounds_wholly_before_it():
    tokens = [*range(100, 104), *range(16), *range(16)]  # loops from 20 on; prefill wrote the first
    found = acceptance([generation(tokens, lengths=[2] * 9 + [4] * 4 + [1])])
    assert found["tau_before_loop"] == 2.0  # the tenth round ends at 23
    assert found["looped_share"] == 16 / 36
    assert found["tau"] == 35 / 14


def test_intervals_contain_the_point_and_shrink_where_prompts_agree():
    spread, [low, high] = estimate(ratio([4, 9, 5, 12, 8, 6], [4, 4, 4, 4, 4, 4]), 6)
    assert low < spread < high
    agreed, [low, high] = estimate(ratio([2, 4, 6], [1, 2, 3]), 3)
    assert low == agreed == high == 2.0
    assert estimate(ratio([3], [2]), 1) == (1.5, [1.5, 1.5])
    assert estimate(ratio([0, 0], [0, 0]), 2) == (None, None)


def test_speedup_is_a_ratio_of_seconds_per_token_over_paired_prompts():
    plain = [generation(range(10), 10.0), generation(range(20), 40.0)]  # a slow moment hit both methods in the second prompt
    fast = [generation(range(10), 5.0), generation(range(20), 20.0)]
    assert speedup(fast, plain) == {"speedup": 2.0, "speedup_interval": [2.0, 2.0]}


# ---- what is compared ----


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_methods_of_a_prompt_share_a_seed_so_texts_are_plain_s(engine, temperature):
    methods = bench(engine, sampling=Sampling(temperature))["methods"]
    for text, figures in methods.items():
        if temperature and "accept-reject" in text:  # other draws by design: not compared
            assert figures["same_text"] is None and figures["prompts"][0]["same_as_plain"] is None
        else:
            assert figures["same_text"] == len(PROMPTS) and figures["divergences_per_1000_tokens"] == 0


def test_prompts_have_seeds_of_their_own_and_methods_take_turns(engine, monkeypatch):
    seen = []

    def generate(prompt, request, watch=None):
        seen.append(request)
        return Engine.generate(engine, prompt, request, watch=watch)

    monkeypatch.setattr(engine, "generate", generate)
    bench(engine, "plain,lookup", max_new_tokens=2)
    assert [request.seed for request in seen[2:]] == [derived_seed(5, index) for index in (0, 0, 1, 1, 2, 2)]  # two warmed up
    assert [request.method for request in seen[2:]] == ["plain", "lookup", "lookup", "plain", "plain", "lookup"]


def test_a_difference_is_counted_up_to_where_it_is():
    rows = [{"plain": generation([1, 2, 3, 4]), "m": generation([1, 2, 9, 9])}, {"plain": generation([5] * 7), "m": generation([5] * 7)}]
    found = figures_of("m", rows, True)
    assert found["same_text"] == 1 and found["divergences_per_1000_tokens"] == 1000 / (3 + 7)
    assert [line["first_difference"] for line in found["prompts"]] == [2, None]
    assert [line["same_as_plain"] for line in found["prompts"]] == [False, True]
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_without_plain_there_is_no_speedup(engine):
    figures = bench(engine, "lookup", max_new_tokens=4)["methods"]["lookup"]
    assert figures["speedup"] is None and figures["speedup_interval"] is None and figures["same_text"] is None


def test_each_method_has_the_tree_it_names(engine):
    result = bench(engine, tree="chain:1", max_new_tokens=4)
    assert result["conditions"]["trees"] == {text: result["methods"][text]["tree"] for text in SPECS.split(",")}
    assert list(result["conditions"]["trees"].values()) == ["none", "chain:3", "8x2x3", "chain:1", "chain:2"]
    assert [figures["verifier"] for figures in result["methods"].values()] == ["walk"] * 4 + ["accept-reject"]


# ---- methods as written ----


def test_a_method_may_name_its_tree_and_verifier():
    assert Method.parse("eagle3@chain:3") == ("eagle3@chain:3", "eagle3", "chain:3", None, False)
    for text in ("eagle3+copy@chain:3+accept-reject", "eagle3@chain:3+copy+accept-reject", "eagle3-lookup@chain:3+accept-reject"):
        assert Method.parse(text) == (text, "eagle3", "chain:3", "accept-reject", True)
    assert Method.parse("draft-model@60x7x10+accept-reject")[1:] == ("draft-model", "60x7x10", "accept-reject", False)
    assert Method.parse("eagle3+accept-reject")[1:] == ("eagle3", None, "accept-reject", False)


def test_a_tables_method_copies_where_it_says_so_or_the_options_do(engine):
    methods = parse_methods("plain,lookup,eagle3,eagle3+copy")
    for asked, copies in ((None, [False, True]), (False, [False, True]), (True, [True, True])):
        requests = [method.request(Request(copy=asked)) for method in methods]
        assert [request.copy for request in requests] == [False, False, *copies]
        assert [engine.copies(request) for request in requests] == [False, False, *copies]
    found = bench(engine, "eagle3,eagle3+copy,lookup", tree="8x2x3")["methods"]
    assert {text: figures["copy"] for text, figures in found.items()} == {"eagle3": False, "eagle3+copy": True, "lookup": False}
    assert found["eagle3"]["accepted_lengths"] != found["eagle3+copy"]["accepted_lengths"]


def test_a_method_that_another_draft_serves_is_refused_in_one_line(lines, tmp_path, capsys):
    target = save_tiny_target(tmp_path / "target")
    models = ["--target", str(target), "--draft", str(save_tiny_draft(tmp_path / "draft", target)), "--precision", "fp32"]
    assert main(["bench", *models, "--prompts", str(lines({"prompt": "x"})), "--methods", "medusa"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("eyas: ") and "is no medusa draft, which medusa needs" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["eagle3@", "eagle3@big", "eagle3+luck", "plain@chain:2", "lookup+copy", "plain+copy", "plain,plain", ",", "@chain:3"]
)
def test_a_method_that_is_none_is_refused_in_one_line(text, lines, capsys):
    assert main(["bench", "--prompts", str(lines({"prompt": "x"})), "--methods", text]) == 2
    said = capsys.readouterr().err
    assert said.startswith("eyas: ") and said.count("\n") == 1


# ---- prompt files ----


def test_all_forms_of_a_prompt_are_read(lines):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "e"}, {"role": "assistant", "content": "no"}]
    shared = [{"from": "human", "value": "f"}, {"from": "gpt", "value": "no"}, {"from": "human", "value": "later"}]
    rows = ({"turns": ["a", "b"]}, {"prompt": "c"}, {"question": "d\u2028"}, {"messages": chat}, {"conversations": shared})
    items, complaints = read_prompts(lines(*rows))
    assert [item.prompt for item in items] == ["a", "c", "d\u2028", chat[:2], [{"role": "user", "content": "f"}]]
    assert not complaints
    assert len(read_prompts(lines(*rows), 2)[0]) == 2


def test_broken_lines_are_counted_and_the_rest_goes_on(lines):
    broken = ("{", "[]", {}, {"turns": []}, {"prompt": " "}, {"messages": [{"role": "assistant", "content": "x"}]}, '{"prompt": "\\ud800"}')
    items, complaints = read_prompts(lines(*broken, "", {"prompt": "good"}))
    assert items == [PromptItem(9, "good")]
    assert [complaint.split(":")[0] for complaint in complaints] == [f"line {number}" for number in range(1, 8)]
    with pytest.raises(EyasError, match=r"no prompt could be read \(line 1"):
        read_prompts(lines(*broken))


def test_a_prompt_longer_than_the_context_is_left_out(engine):
    items, complaints = fitting(engine, [PromptItem(1, "x" * 600), *PROMPTS])
    assert items == PROMPTS and complaints[0].startswith("line 1: the prompt has")


# ---- the command ----


@pytest.fixture
def options(engine, lines, monkeypatch):
    monkeypatch.setattr(command, "engine_from", lambda options: engine)
    path = lines({"prompt": "Hello"}, "broken", {"turns": ["Again"]})
    return ["bench", "--prompts", str(path), "--methods", "plain,eagle3@chain:3", "--max-new-tokens", "6", "--seed", "3"]


def test_the_json_has_exactly_the_promised_shape(options, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main([*options, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result) == ["conditions", "methods"] and list(result["methods"]) == ["plain", "eagle3@chain:3"]
    for figures in result["methods"].values():
        assert {"tau", "tau_interval", "speedup", "speedup_interval", "tokens_per_second", "prompts"} <= set(figures)
        assert len(figures["tau_interval"]) == len(figures["speedup_interval"]) == len(figures["prompts"]) == 2
    given = result["conditions"]
    assert (given["prompt_file"], given["prompt_count"], given["skipped_lines"], given["seed"]) == ("prompts.jsonl", 2, 1, 3)
    shown = capsys.readouterr()
    assert "eagle3@chain:3" in shown.out and "2/2" in shown.out and "temperature 0" in shown.out
    assert "line 2: not JSON" in shown.err and "1 line skipped" in shown.err


def test_an_interrupt_shows_and_writes_what_is_done(options, tmp_path, capsys, monkeypatch):
    def impatient(engine, items, methods, request):
        def stop_in_the_second_prompt(done, total, text):
            if done == 3:
                raise KeyboardInterrupt

        return run_bench(engine, items, methods, request, stop_in_the_second_prompt)

    monkeypatch.setattr(command, "with_progress", impatient)
    out = tmp_path / "r.json"
    assert main([*options, "--out", str(out)]) == 130
    result = json.loads(out.read_text())
    assert result["complete"] is False and result["conditions"]["prompt_count"] == 1
    assert all(len(figures["prompts"]) == 1 for figures in result["methods"].values())
    assert "INTERRUPTED" in capsys.readouterr().out


@pytest.mark.parametrize(("deadline", "measured"), [(0.0, 1), (25.0, 2), (29.9, 2), (30.0, 3), (math.inf, 3)])
def test_what_would_not_end_by_the_deadline_is_not_begun(engine, monkeypatch, deadline, measured):
    """Each prompt takes ten seconds of a clock that stands still otherwise; the first is measured in any case."""
    now = [0.0]

    def ten_seconds(engine, prompt, request):
        now[0] += 5.0
        return generation(range(10), lengths=[1] * 9)

    monkeypatch.setattr(bench_speed, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(bench_speed, "measure", ten_seconds)
    result = run_bench(engine, PROMPTS, parse_methods("plain,lookup"), Request(seed=1, max_new_tokens=4), deadline=deadline)
    assert result["conditions"]["prompt_count"] == measured and "complete" not in result
    assert result.get("left_out", 0) == 3 - measured and now[0] == 10 * measured


@pytest.mark.parametrize("place", [".", "missing/r.json"])
def test_an_unwritable_out_is_refused_before_a_model_is_loaded(place, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "engine_from", lambda options: pytest.fail("a model was loaded"))
    assert main([*options, "--out", str(tmp_path / place)]) == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said and said.count("\n") == 1


def test_checking_out_leaves_an_earlier_result_alone(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    result_file(str(old)), result_file(str(new))
    assert old.read_text() == "{}" and not new.exists()
