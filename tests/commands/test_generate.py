"""`eyas generate`: what it prints, and that every bad option is one line on stderr, status 2."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from eyas.decode import prompt
from eyas.methods import METHODS
from tests.commands.words import JSON_KEYS, generate, interrupt_round


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([""], "the prompt is empty; give some text"),
        (["  \n "], "the prompt is empty; give some text"),
        ([], "give a PROMPT, --messages F.json or --prompt-ids, one of the three"),
        (["hi", "--messages", "f.json"], "give a PROMPT, --messages F.json or --prompt-ids, one of the three"),
        (["hi", "--temperature", "-0.5"], "temperature must be 0 (greedy) or a positive number, not -0.5"),
        (["hi", "--temperature", "nan"], "temperature must be 0 (greedy) or a positive number, not nan"),
        (["hi", "--temperature", "inf"], "temperature must be 0 (greedy) or a positive number, not inf"),
        (["hi", "--top-p", "0"], "top-p must be above 0 and at most 1 (1 is off), not 0.0"),
        (["hi", "--top-p", "1.5"], "top-p must be above 0 and at most 1 (1 is off), not 1.5"),
        (["hi", "--top-k", "-1"], "top-k must be 0 (off) or a positive count, not -1"),
        (["hi", "--min-p", "2"], "min-p must be between 0 (off) and 1, not 2.0"),
        (["hi", "--max-new-tokens", "0"], "max-new-tokens must be at least 1, not 0"),
        (["hi", "--max-new-tokens", "-3"], "max-new-tokens must be at least 1, not -3"),
        (["hi", "--method", "magic"], f"method 'magic' is unknown; choose {', '.join(METHODS)}"),
        (["hi", "--device", "cuda"], "device cuda was asked for, but this PyTorch sees no CUDA device; use --device cpu"),
        (["hi", "--device", "toaster"], "device 'toaster' is unknown; use cpu or cuda"),
        (["hi", "--raw", "--system", "be brief"], "--system needs a chat template, --raw does without one; drop one of the two"),
        *(
            (
                ["hi", "--tree", tree],
                f"tree shape {tree!r} is not understood; write NODESxDEPTHxTOPK (60x7x10), "
                "chain:K (chain:3), static:CHILDREN (static:3.2.0.1) or auto",
            )
            for tree in ("60x7", "0x1x1", "5x2x0", "chain:0", "chain:x", "axbxc", "")
        ),
    ],
)
def test_a_bad_option_is_one_line(models, refused, monkeypatch, words, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(*generate(models, *words)) == line


BLOCK = "verifier block reads chains: --tree chain:K; for trees there is verifier traversal"
CONTRADICTIONS = [
    (["--plain", "--copy"], "copying joins the trees of a draft, and method plain has none; method lookup is copying alone"),
    (["--method", "eagle3-lookup", "--no-copy"], "method eagle3-lookup copies, and --no-copy was given too; drop one of the two"),
    (
        ["--copy", "--method", "eagle3", "--verifier", "traversal", "--temperature", "1", "--tree", "chain:2"],
        "copied guesses are not drawn, as this verifier needs them to be; drop --copy",
    ),
    (["--plain", "--method", "eagle3"], "--plain is the same as --method plain, and --method eagle3 was given too; drop one of the two"),
    (["--draft-model", "x"], "--draft-model is what method draft-model guesses with; ask for that method, or drop --draft-model"),
    (["--verifier", "block", "--tree", "auto"], BLOCK),
    (["--verifier", "block", "--tree", "8x2x3"], BLOCK),
    (["--verifier", "traversal", "--temperature", "1"], "verifier traversal needs a draft that draws its guesses"),
    (["--tree", "8x2x2/none"], "growth 'none' is unknown; there are none (register one with --plugin)"),
]


@pytest.mark.parametrize(("words", "line"), CONTRADICTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(models, refused, monkeypatch, words, line):
    monkeypatch.setattr("eyas.commands.common.load", lambda *_: pytest.fail("a model was loaded"))
    assert refused(*generate(models, "hi", *words)).startswith(line)


def test_a_verifier_that_does_not_fit_the_drafts_own_tree_is_refused_before_a_round(models, refused):
    words = [*generate(models, "hi", "--verifier", "traversal", "--temperature", "1", "--tree", "auto")]
    assert refused(*words).startswith("verifier traversal needs a draft that draws its guesses")


def test_without_a_draft_plain_decoding_is_said_once(models, run):
    for words in ([], ["--json"]):
        _, _, err = run(*generate(models, "hi", *words, draft=None))
        assert err.count("plain decoding: no draft for this target; give --draft") == 1
    for words in (["--plain"], ["--method", "lookup"]):
        assert "no draft" not in run(*generate(models, "hi", *words, draft=None))[2]
    assert "no draft" not in run(*generate(models, "hi"))[2]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["hi", "--temperature", "warm"], "argument --temperature: invalid float value: 'warm'; see `eyas generate --help`"),
        (["hi", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["hi", "--sead", "3"], "unrecognized arguments: --sead 3"),
    ],
)
def test_a_word_the_command_line_does_not_know_is_one_line(models, refused, words, reason):
    assert refused(*generate(models, *words)).startswith(reason)


def test_no_command_or_an_unknown_one_is_one_line(refused):
    assert refused() == "the following arguments are required: COMMAND; see `eyas --help`"
    assert "invalid choice: 'fly'" in refused("fly")


def test_a_prompt_longer_than_the_context_is_one_line(models, refused):
    """One line: the tokenizer's own warning about it is not let through."""
    for words in (["--raw", "x" * 64], ["--raw", "x" * 500], ["hello, how are you?"]):
        line = refused(*generate(models, *words, target="short", draft=None))
        assert re.fullmatch(r"the prompt has \d+ tokens, the model reads at most 64; shorten it", line)


def test_a_text_ends_where_the_context_does(models, run):
    status, out, _ = run(*generate(models, "--raw", "x" * 60, "--json", target="short", draft=None))
    assert status == 0 and json.loads(out)["finish_reason"] in ("length", "stop") and len(json.loads(out)["tokens"]) <= 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a list of messages like"),
        ('{"messages": []}', "must hold a list of messages like"),
        ('[{"role": "user"}]', "message 1 has no content"),
        ('[{"role": 3, "content": "hi"}]', "message 1 has the unknown role 3"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "message 1 has a part of type 'image_url'; only text is read"),
        ('{"messages": [{"role": "user", "content": "hi"}], "tools": [3]}', '"tools" is not a list of functions with names'),
        ('{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": []}', "chat-template-kwargs must be an object"),
        ('"hi"', "must hold a list of messages like"),
    ],
)
def test_messages_that_cannot_be_read_are_one_line(models, refused, tmp_path, content, reason):
    path = tmp_path / "messages.json"
    if content is not None:
        path.write_text(content)
    line = refused(*generate(models, "--messages", path))
    assert str(path) in line and reason in line


def test_messages_are_a_conversation(models, run, tmp_path):
    """A list or an object that holds one; a system message goes before it; the same text as the string it amounts to."""
    turns = [{"role": "user", "content": "Where is the nest?"}]
    paths = [tmp_path / "list.json", tmp_path / "object.json"]
    paths[0].write_text(json.dumps(turns))
    paths[1].write_text(json.dumps({"messages": turns}))
    plain = ["--plain", "--json"]
    wanted = json.loads(run(*generate(models, turns[0]["content"], *plain))[1])["tokens"]
    for path in paths:
        assert json.loads(run(*generate(models, "--messages", path, *plain))[1])["tokens"] == wanted
    asked = json.loads(run(*generate(models, turns[0]["content"], "--system", "Be brief.", *plain))[1])["tokens"]
    assert asked == json.loads(run(*generate(models, "--messages", paths[0], "--system", "Be brief.", *plain))[1])["tokens"] != wanted


TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{{ ' (calm)' if calm }}:{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.fixture
def with_tools(models, tmp_path) -> Path:
    """A target whose template shows tools, calls and thinking."""
    target = tmp_path / "with-tools"
    shutil.copytree(models / "target", target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


def test_messages_are_taken_as_servers_take_them(models, run, with_tools, tmp_path, monkeypatch):
    """Content in parts, an answer that only calls, a tool's turn, tools on offer and variables; what is no part of them is named."""
    path, prompts = tmp_path / "request.json", []
    render = prompt.written
    monkeypatch.setattr(prompt, "written", lambda *given, **more: prompts.append(render(*given, **more)) or prompts[-1])
    turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "12", "tool_call_id": "1"}]
    path.write_text(json.dumps({"messages": turns, "tools": TOOLS, "chat_template_kwargs": {"calm": True}, "max_tokens": 5, "model": "m"}))
    words = ["generate", "--target", with_tools, "--plain", "--precision", "fp32", "--max-new-tokens", "2"]
    status, _, err = run(*words, "--messages", path)
    assert status == 0 and f'eyas: {path}: not read, give options instead: "max_tokens"' in err
    assert prompts[-1].text == f"TOOLS {json.dumps(TOOLS)}\nuser: hi\nassistant: CALL weather {{}}\ntool: 12\nassistant (calm):"
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    given = ["--tools", tools, "--chat-template-kwargs", '{"calm": true}']
    assert run(*words, "hi", *given)[0] == 0
    asked = prompts[-1].text
    assert asked == f"TOOLS {json.dumps(TOOLS)}\nuser: hi\nassistant (calm):"
    path.write_text(json.dumps(turns[:1]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("and now\n\n"))
    assert run("chat", *words[1:], "--messages", path, *given)[0] == 0
    assert prompts[-1].text == asked.replace("\nassistant", "\nuser: and now\nassistant")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["hi", "--chat-template-kwargs", "{"], "argument --chat-template-kwargs: '{' is not JSON"),
        (["hi", "--chat-template-kwargs", "[1]"], "must be an object of variables"),
        (["hi", "--chat-template-kwargs", '{"tokenize": true}'], "'tokenize' is no variable that a chat template can be given"),
        (["hi", "--chat-template-kwargs", '{"enable_thinkng": false}'], "the chat template reads no variable enable_thinkng"),
        (["hi", "--raw", "--chat-template-kwargs", '{"a": 1}'], "--tools and --chat-template-kwargs are for a chat template"),
        (["hi", "--tools", "none.json"], "--tools none.json cannot be read"),
    ],
)
def test_tools_and_variables_that_cannot_be_used_are_one_line(models, refused, words, reason):
    assert reason in refused(*generate(models, *words))


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_method_gives_the_same_tokens(models, run, temperature):
    found = {}
    for method, *more in (["plain"], ["eagle3"], ["eagle3", "--no-copy"], ["lookup"], ["draft-model"], ["draft-model", "--no-copy"]):
        words = ["Tell me", "--seed", "7", "--temperature", temperature, "--json", "--method", method, *more]
        status, out, err = run(*generate(models, *words))
        assert status == 0 and err == ""
        found[" ".join([method, *more])] = told = json.loads(out)
        assert list(told) == JSON_KEYS and told["seed"] == 7
        assert (told["method"], told["copy"]) == (method, method not in ("plain", "lookup") and not more)
    assert len({tuple(result["tokens"]) for result in found.values()}) == len({result["text"] for result in found.values()}) == 1
    assert found["plain"]["tau"] == 1.0 and found["eagle3"]["rounds"] <= found["plain"]["rounds"]
    short = json.loads(run(*generate(models, "Tell me", "--seed", "7", "--temperature", temperature, "--json", "--plain"))[1])
    assert short["tokens"] == found["plain"]["tokens"]


def test_copying_is_on_unless_it_is_switched_off(models, run):
    def rounds(*words):
        told = json.loads(run(*generate(models, "Tell me", "--temperature", "0", "--json", "--max-new-tokens", "60", *words))[1])
        return told["method"], told["copy"], told["rounds"]

    usual = rounds()
    assert (
        usual
        == rounds("--copy")
        == rounds("--method", "eagle3")
        == rounds("--method", "eagle3-lookup")
        == rounds("--method", "eagle3+copy")
    )
    assert usual[:2] == ("eagle3", True) and rounds("--no-copy")[:2] == ("eagle3", False) and rounds("--no-copy")[2] != usual[2]


def test_generate_streams_the_text_of_the_json_object(models, run):
    words = ["Tell me", "--seed", "3", "--temperature", "1"]
    result = json.loads(run(*generate(models, *words, "--json"))[1])
    status, out, err = run(*generate(models, *words))
    assert status == 0 and out == result["text"] + "\n", "what is piped ends its last line"
    assert re.fullmatch(r"\[\d+ tokens, \d+ rounds, tau \d\.\d\d, [\d.]+ tokens/s, seed 3\]\n", err)


def test_a_seed_is_drawn_and_reported(models, run):
    first, second = (json.loads(run(*generate(models, "hi", "--temperature", "1", "--json"))[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = json.loads(run(*generate(models, "hi", "--temperature", "1", "--json", "--seed", first["seed"]))[1])
    assert again["tokens"] == first["tokens"]


def test_ctrl_c_in_generate_keeps_the_text_so_far(models, run, monkeypatch):
    words = generate(models, "Tell me", "--plain")
    whole = run(*words)[1]
    interrupt_round(monkeypatch, 12)
    status, out, err = run(*words)
    assert status == 130 and err == "\neyas: interrupted\n"
    assert len(out) > 3 and out.endswith("\n") and whole.startswith(out[:-1]) and len(out) < len(whole)


def test_ctrl_c_under_json_prints_what_was_written(models, run, monkeypatch):
    whole = json.loads(run(*generate(models, "Where?", "--json"))[1])
    interrupt_round(monkeypatch, 3)
    status, said, _ = run(*generate(models, "Where?", "--json"))
    found = json.loads(said)
    assert status == 130 and list(found) == JSON_KEYS and found["finish_reason"] == "interrupted"
    assert 0 < len(found["tokens"]) < len(whole["tokens"]) and found["tokens"] == whole["tokens"][: len(found["tokens"])]


# ---- what users of plain decoding ask for ----


def test_token_ids_are_a_prompt(models, run):
    ids = "257 5, 6 7"
    found = json.loads(run(*generate(models, "--prompt-ids", ids, "--json"))[1])
    assert found["tokens"] == json.loads(run(*generate(models, "--prompt-ids", "257,5,6,7", "--json", "--plain"))[1])["tokens"]


def test_several_answers_are_a_line_each(models, run):
    words = ["Tell me", "--n", "3", "--seed", "4", "--temperature", "1"]
    status, out, err = run(*generate(models, *words, "--json"))
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and err == "" and len({each["seed"] for each in found}) == 3 and all(list(each) == JSON_KEYS for each in found)
    alone = json.loads(run(*generate(models, "Tell me", "--temperature", "1", "--seed", found[1]["seed"], "--json", "--plain"))[1])
    assert alone["tokens"] == found[1]["tokens"]
    status, out, err = run(*generate(models, *words))
    assert status == 0 and out == "".join(each["text"] + "\n" for each in found) and err.count("tokens/s") == 3


def test_settings_reach_the_text(models, run):
    def tokens(*words) -> list[int]:
        return json.loads(run(*generate(models, "Tell me", "--json", *words))[1])["tokens"]

    whole = tokens("--ignore-eos")
    assert tokens("--ignore-eos", "--stop-token-ids", f"{whole[4]},262") == whole[: whole.index(whole[4]) + 1]
    assert len(tokens("--ignore-eos", "--stop-token-ids", whole[4], "--min-new-tokens", "12")) >= 12
    assert tokens("--logit-bias", "42=100", "--ignore-eos") == [42] * 24
    for words in (["--repetition-penalty", "1.5"], ["--presence-penalty", "2"], ["--frequency-penalty", "2"]):
        assert tokens(*words, "--ignore-eos") == tokens(*words, "--ignore-eos", "--plain") != whole


def test_log_probabilities_are_in_the_json_object(models, run):
    found = json.loads(run(*generate(models, "Tell me", "--json", "--logprobs", "2"))[1])
    assert [told["token"] for told in found["logprobs"]] == found["tokens"]
    for told in found["logprobs"]:
        assert told["logprob"] == told["top"][0]["logprob"] <= 0 and set(told["top"][0]) == {"token", "text", "logprob"}, "greedy"
        assert len(told["top"]) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hi", "--logprobs", "2"], "--logprobs are part of the JSON object; add --json"),
        (["hi", "--n", "0"], "n must be at least 1, not 0"),
        (["hi", "--logit-bias", "42"], "--logit-bias takes ID=BIAS, a token id and a number, like 42=-100; not 42"),
        (["hi", "--logit-bias", "42=101"], "the logit-bias of token 42 must be a number from -100 to 100, not 101.0"),
        (["hi", "--stop-token-ids", "9999"], "stop-token-ids must be token ids from 0 to 262, not 9999"),
        (["--prompt-ids", "5 six"], "--prompt-ids takes token ids with blanks or commas between them, not '5 six'"),
        (["--prompt-ids", "5", "--raw"], "--prompt-ids are read as they are; drop --system, --raw, --tools and --chat-template-kwargs"),
        (["hi", "--prompt-ids", "5"], "give a PROMPT, --messages F.json or --prompt-ids, one of the three"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(models, refused, words, line):
    assert refused(*generate(models, *words)) == line


def test_a_models_own_defaults_are_used_and_told(models, run, tmp_path):
    """In one line on stderr, or in the object; with `none` nothing of the file is."""
    shutil.copytree(models / "target", tmp_path / "qwen")
    fields = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    (tmp_path / "qwen" / "generation_config.json").write_text(json.dumps(fields))
    words = ["generate", "hi", "--target", tmp_path / "qwen", "--plain", "--precision", "fp32", "--seed", "1", "--max-new-tokens", "12"]
    found = json.loads(run(*words, "--json")[1])
    used = {"temperature": 0.6, "repetition_penalty": 1.3}
    assert found["generation_config"] == {"used": used, "not_done": {"no_repeat_ngram_size": 2}}
    given = ["--temperature", "0.6", "--repetition-penalty", "1.3"]
    own = json.loads(run(*words, *given, "--json")[1])
    assert own["tokens"] == found["tokens"] and own["generation_config"]["used"] == {}
    _, out, err = run(*words)
    assert out.removesuffix("\n") == found["text"].removesuffix("\n")
    told = "[generation_config.json: repetition_penalty 1.3, temperature 0.6; not done here: no_repeat_ngram_size 2; "
    assert err.startswith(told + "--generation-config none passes over it]\n")
    passed_over = run(*words, "--generation-config", "none")
    assert "generation_config" not in passed_over[2]
    assert passed_over[1] != out
