"""Claims about the server: what a request gets is what the engine writes, in OpenAI's form, and nothing is silently ignored."""

from __future__ import annotations

import json
import threading
import time

import pytest

from eyas.decode.sampling import derived_seed
from eyas.serve.fields import FIELDS
from tests.serve.serving import CHAT, TEXT, ask, events, served

LAWS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": -0.3, "logit_bias": {"65": 4.0}},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_p": 0.05, "stop": ["e", "zz"]},
    {"temperature": 1.0, "min_tokens": 12, "ignore_eos": True},
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_an_answer_is_what_the_engine_writes_whole_and_in_pieces(engine, client, law):
    named = {"min_tokens": "min_new_tokens"}
    settings = {named.get(name, name): value for name, value in law.items() if name != "logit_bias"}
    if "logit_bias" in law:
        settings["logit_bias"] = {int(token): bias for token, bias in law["logit_bias"].items()}
    wanted = engine.generate("How can a hawk see?", seed=5, max_new_tokens=20, method="plain", generation_config="none", **settings)
    whole = client.post(CHAT, json=ask(**law)).json()
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == wanted.text and choice["finish_reason"] == wanted.finish_reason
    assert whole["usage"]["completion_tokens"] == len(wanted.tokens) and whole["eyas"]["seed"] == 5
    assert whole["usage"]["prompt_tokens"] == wanted.prompt_tokens
    timings = whole["timings"]
    assert timings["draft_n"] >= timings["draft_n_accepted"] == len(wanted.tokens) - 1 - timings["draft_n_rounds"]
    told = events(client.post(CHAT, json=ask(**law, stream=True, stream_options={"include_usage": True})).text)
    assert told[-1] == "[DONE]" and told[-2]["choices"] == [] and told[-2]["usage"] == whole["usage"]
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in told[:-2]) == wanted.text
    assert told[-3]["choices"][0]["finish_reason"] == wanted.finish_reason and told[-3]["choices"][0]["delta"] == {}
    assert {each["system_fingerprint"] for each in told[:-1]} == {whole["system_fingerprint"]}


def test_text_goes_on_for_several_prompts_with_several_answers(engine, client):
    body = {"prompt": ["a hawk", [104, 105]], "n": 2, "max_tokens": 9, "seed": 4, "echo": True}
    told = client.post(TEXT, json=body).json()
    assert [each["index"] for each in told["choices"]] == [0, 1, 2, 3]
    wanted = []
    for number, prompt in enumerate(["a hawk", "a hawk", [104, 105], [104, 105]]):
        seed = derived_seed(4, number) if number else 4
        raw = not isinstance(prompt, list)
        text = engine.generate(prompt, seed=seed, max_new_tokens=9, temperature=1.0, method="plain", raw=raw).text
        wanted.append((prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)) + text)
    assert [each["text"] for each in told["choices"]] == wanted
    streamed = events(client.post(TEXT, json=body | {"stream": True}).text)[:-1]
    parts = [["", "", "", ""], [None] * 4]
    for event in streamed:
        for choice in event["choices"]:
            parts[0][choice["index"]] += choice["text"]
            parts[1][choice["index"]] = choice["finish_reason"] or parts[1][choice["index"]]
    assert parts[0] == wanted and parts[1] == [each["finish_reason"] for each in told["choices"]]


def test_a_completion_has_16_tokens_where_nothing_is_said_and_chat_what_fits(engine):
    with served(engine, "--context", "96") as (client, _):
        assert client.post(TEXT, json={"prompt": "a", "seed": 1, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16
        for limit in ({}, {"max_tokens": -1}):
            told = client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "seed": 1, "ignore_eos": True, **limit}).json()
            assert told["usage"]["total_tokens"] == 96 and told["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_are_the_targets_own(engine, client):
    wanted = engine.generate(
        "How can a hawk see?", seed=5, max_new_tokens=8, temperature=1.0, logprobs=3, generation_config="none"
    ).logprobs
    for stream in (False, True):
        answer = client.post(CHAT, json=ask(max_tokens=8, logprobs=True, top_logprobs=3, stream=stream))
        if stream:
            parts = [each["choices"][0]["logprobs"] for each in events(answer.text)[:-1]]
            told = [each for part in parts if part for each in part["content"]]
        else:
            told = answer.json()["choices"][0]["logprobs"]["content"]
        assert [each["logprob"] for each in told] == pytest.approx([each.logprob for each in wanted])
        assert [[top["logprob"] for top in each["top_logprobs"]] for each in told] == [
            pytest.approx([logprob for _, logprob in each.top]) for each in wanted
        ]
        assert [engine.tokenizer.decode(list([each.token])) for each in wanted if each.token < 95] == [
            entry["token"] for entry, each in zip(told, wanted) if each.token < 95
        ]
    text = client.post(TEXT, json={"prompt": "a hawk", "max_tokens": 4, "logprobs": 2, "seed": 1}).json()["choices"][0]
    assert [len(text["logprobs"][name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4


BAD = [
    ({"temperature": -1}, "temperature must be from 0 to 2"),
    ({"temperature": True}, "temperature must be a number"),
    ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, or -1"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"n": 17}, "n must be a whole number from 1 to 16"),
    ({"n": 0}, "n must be"),
    ({"stop": [""]}, "stop must be a string or up to 16"),
    ({"stop": list("abcdefghijklmnopq")}, "stop must be"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
    ({"stop_token_ids": [9999]}, "stop_token_ids: 9999 is no token of this model"),
    ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id"),
    ({"logit_bias": {"9999": 1}}, "logit_bias: 9999 is no token of this model"),
    ({"logit_bias": {"1": 101}}, "a bias is a number from -100 to 100"),
    ({"seed": 2**63}, "seed must be a whole number"),
    ({"seed": 1.0}, "seed must be a whole number"),
    ({"stream_options": {"include_usage": True}}, "stream_options are for a stream"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    ({"logprobs": 3}, "logprobs must be true or false"),
    ({"min_tokens": 21}, "min_tokens 21 is more than max_tokens 20"),
    ({"response_format": {"type": "yaml"}}, "is not served"),
    ({"store": True}, "store True is not served"),
    ({"messages": []}, "messages must be a list of messages"),
    ({"messages": [{"content": "hi"}]}, "messages[0] must be an object with a role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]},
        "messages[1] has the unknown role 'robot'",
    ),
    ({"messages": None, "prompt": "a"}, "messages is missing: the conversation so far; prompt is for /v1/completions"),
    ({"eyas": {"tree": "bad"}}, "tree shape 'bad' is not understood"),
    ({"eyas": {"tree": "500x9x9"}}, "has 500 nodes"),
    ({"eyas": {"lossy": 1}}, "eyas has no lossy"),
    ({"eyas": {"method": "medusa"}}, "this server decodes with eagle3+copy"),
    ({"chat_template_kwargs": {"thinking": True}}, "thinking"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "shorten it"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=lambda each: str(each)[:40])
def test_bad_values_get_one_line_that_says_what_is_wrong(client, wrong, words):
    answer = client.post(CHAT, json=ask() | wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"] and "\n" not in error["message"], error
    assert error["type"] in ("invalid_request_error", "exceed_context_size_error")


def test_a_prompt_that_is_too_long_is_told_in_numbers(client):
    error = client.post(CHAT, json=ask("a" * 490)).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["n_ctx"] == 512 and error["n_prompt_tokens"] >= 512


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the body is no JSON: Expecting property name enclosed in double quotes, at character 1"),
        (b'{"messages": []}', "prompt is missing: the text to go on with; messages are for /v1/chat/completions"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "given twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b"\xff", "no UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ""}', "not empty"),
        (b'{"prompt": []}', "prompt must be"),
        (b'{"prompt": [[]]}', "not empty"),
        (b'{"prompt": [true]}', "prompt must be"),
        (b'{"prompt": [99999]}', "99999"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": "a", "temperature": 1e400}', "temperature must be a number"),
    ],
)
def test_bodies_that_are_none_are_refused(client, content, words):
    answer = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_what_is_not_served_says_so(client):
    assert client.post("/v1/responses", json={}).status_code == 404
    asked_for = client.get(CHAT)
    assert asked_for.status_code == 405 and "it takes POST" in asked_for.json()["error"]["message"]
    form = client.post(CHAT, content=b"a=1", headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415 and "send it with content-type: application/json" in form.json()["error"]["message"]
    assert client.post(CHAT, content=b" " * (5 << 20), headers={"content-type": "application/json"}).status_code == 413
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    answer = client.post(CHAT, json=ask(model="gpt-9"))
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_unknown_fields_are_named_in_the_answer_or_refused(engine, client):
    assert "no_such_field" in client.post(CHAT, json=ask(no_such_field=1)).json()["eyas"]["warning"]
    with served(engine, "--strict-fields", "--api-key", "secret", "--served-model-name", "hawk") as (strict, _):
        assert strict.post(CHAT, json=ask()).status_code == 401 and strict.get("/health").status_code == 200
        strict.headers["authorization"] = "Bearer secret"
        assert strict.post(CHAT, json=ask(no_such_field=1)).json()["error"]["param"] == "no_such_field"
        assert strict.post(CHAT, json=ask(model="hawk")).status_code == 200
        assert [each["id"] for each in strict.get("/v1/models").json()["data"]] == ["hawk"]


def test_tokens_and_templates_are_told(engine, client):
    tokens = client.post("/tokenize", json={"content": "a hawk"}).json()["tokens"]
    assert tokens == engine.encode("a hawk", raw=True) and client.post("/detokenize", json={"tokens": tokens}).json()["content"] == "a hawk"
    prompt = client.post("/apply-template", json=ask()).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n") and "How can a hawk see?" in prompt
    assert client.post("/tokenize", json=ask()).json()["tokens"] == engine.encode("How can a hawk see?")
    assert client.post("/detokenize", json={"tokens": ["a"]}).status_code == 400


def test_a_chats_tokens_are_counted_and_told_piece_by_piece(engine, client):
    counted = client.post(CHAT + "/input_tokens", json=ask()).json()["input_tokens"]
    assert counted == len(engine.encode("How can a hawk see?")) == client.post(CHAT, json=ask()).json()["usage"]["prompt_tokens"]
    assert client.post(CHAT + "/input_tokens", json={}).status_code == 400
    pieces = client.post("/tokenize", json={"content": "a \N{OWL}", "with_pieces": True}).json()["tokens"]
    assert [each["id"] for each in pieces] == engine.encode("a \N{OWL}", raw=True)
    assert b"".join(bytes(each["piece"]) if isinstance(each["piece"], list) else each["piece"].encode() for each in pieces) == (
        "a \N{OWL}".encode()
    )


def test_a_conversation_ends_where_it_is_told_to(client):
    turns = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a hawk <|im"}]}
    prompt = client.post("/apply-template", json=turns).json()["prompt"]
    assert prompt.endswith("a hawk <|im<|im_end|>\n<|im_start|>assistant\n")
    closed = client.post("/apply-template", json=turns | {"add_generation_prompt": False}).json()["prompt"]
    assert closed + "<|im_start|>assistant\n" == prompt
    going_on = client.post("/apply-template", json=turns | {"continue_final_message": True}).json()["prompt"]
    assert closed == going_on + "<|im_end|>\n" and going_on.endswith("a hawk <|im")
    told = client.post(CHAT, json=turns | {"continue_final_message": True, "max_tokens": 6, "seed": 1}).json()
    same = client.post(
        TEXT, json={"prompt": client.post("/tokenize", json={"content": going_on}).json()["tokens"], "max_tokens": 6, "seed": 1}
    )
    assert told["choices"][0]["message"]["content"] == same.json()["choices"][0]["text"]
    both = client.post(CHAT, json=turns | {"continue_final_message": True, "add_generation_prompt": True})
    assert both.status_code == 400 and "leave one out" in both.json()["error"]["message"]


def test_pages_of_this_machine_may_be_let_in(engine):
    with served(engine, "--cors", "localhost") as (client, _):
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        for origin, allowed in (
            ("http://localhost:3000", True),
            ("http://[::1]", True),
            ("http://localhost.evil.example", False),
            ("http://127.0.0.1.evil.example", False),
        ):
            answer = client.options(CHAT, headers=asked | {"origin": origin})
            assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_a_servers_own_tree_is_what_requests_get(engine):
    with served(engine, "--tree", "5x2x2") as (client, server):
        seen = []
        server.scheduler.decoder.watch = lambda record: seen.append(len(record.tree))
        client.post(CHAT, json=ask(max_tokens=30, ignore_eos=True))
        assert 1 < max(seen) <= 5
        client.post(CHAT, json=ask(max_tokens=30, ignore_eos=True, eyas={"tree": "20x3x4"}))
        assert 5 < max(seen) <= 20


def test_more_than_fits_is_refused_with_a_time_to_come_again(engine):
    with served(engine, "--slots", "1", "--queue", "1") as (client, server):
        given = {"json": ask(max_tokens=300, ignore_eos=True), "headers": {"X-Request-Id": "long"}}
        threads = [threading.Thread(target=client.post, args=(CHAT,), kwargs=given) for _ in range(2)]
        for thread in threads:
            thread.start()
        while server.scheduler.in_hand < 2:
            time.sleep(0.01)
        answer = client.post(CHAT, json=ask())
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert client.post(CHAT, json=ask(n=4)).status_code == 429
        assert client.post("/v1/requests/long/cancel").json()["cancelled"] == 2
        for thread in threads:
            thread.join()
        until = time.monotonic() + 30
        while server.scheduler.in_hand and time.monotonic() < until:  # their room is free when the turn under way has ended
            time.sleep(0.01)
        assert client.post(CHAT, json=ask()).status_code == 200


def test_a_fault_in_a_round_is_everybodys_and_health_says_so(engine):
    with served(engine) as (client, server):
        assert client.get("/health").json() == {"status": "ok"}
        server.scheduler.decoder.round = lambda sequences: 1 / 0
        answer = client.post(CHAT, json=ask())
        assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 503 and client.post(CHAT, json=ask()).status_code == 503


def test_counts_add_up(engine):
    with served(engine, "--slots", "2") as (client, _):
        for number in range(3):
            client.post(CHAT, json=ask(seed=number, temperature=0.9))
        client.post(CHAT, json=ask(temperature=9))
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("eyas:")]
        told = {line.split("{")[0] + line[line.index("}") + 1 :].rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

        assert told["eyas:generation_tokens_total"] == 3 + told["eyas:committed_tokens_total"]
        assert told["eyas:spec_decode_num_accepted_tokens_total"] == told["eyas:committed_tokens_total"] - told["eyas:rounds_total"]
        assert told["eyas:num_requests_running"] == told["eyas:num_requests_waiting"] == 0


def test_the_api_is_described_by_the_table_that_validates(client):
    told = client.get("/openapi.json").json()
    named = set()
    for path in (CHAT, TEXT):
        named |= set(told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"])
    assert named == {field.name for field in FIELDS} and json.dumps(told)
