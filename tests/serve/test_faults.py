"""Claims about faults: what breaks under one request is told, is nobody else's where it can be, and never a wrong text."""

from __future__ import annotations

import threading

import pytest

from eyas.decode.processors import Processor
from eyas.serve import jobs
from eyas.serve.app import MOST_BYTES
from tests.serve.serving import CHAT, TEXT, ask, events, served


def broken(*_, **__):
    raise RuntimeError("a part broke")


def in_the_prompt(decoder, monkeypatch):
    monkeypatch.setattr(decoder, "read_prompt", broken)


def in_the_draft(decoder, monkeypatch):
    monkeypatch.setattr(decoder.drafter, "propose", broken)


def in_the_walk(decoder, monkeypatch):
    monkeypatch.setattr(decoder, "advance", broken)


def in_a_law(decoder, monkeypatch):
    monkeypatch.setattr(Processor, "__call__", broken)


@pytest.mark.parametrize("place", [in_the_prompt, in_the_draft, in_the_walk, in_a_law])
def test_a_fault_in_a_pass_is_told_to_all_and_nobody_waits_for_ever(engine, monkeypatch, place):
    found = {}
    with served(engine, "--slots", "2") as (client, server):
        place(server.scheduler.decoder, monkeypatch)

        def one(number: int) -> None:
            found[number] = client.post(CHAT, json=ask(stream=number % 2 == 0, frequency_penalty=0.5))

        threads = [threading.Thread(target=one, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for answer in found.values():
            assert "a part broke" in answer.text and "[DONE]" not in answer.text
            assert answer.status_code in (500, 503) or answer.text.rsplit("\n\n", 2)[1].startswith("event: error")
        assert len(found) == 5 and server.scheduler.idle
        assert client.get("/health").status_code == 503 and client.get("/livez").status_code == 200


def test_a_fault_before_decoding_is_its_own_requests(engine, client, monkeypatch):
    wanted = client.post(CHAT, json=ask()).json()["choices"]
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "encoded", broken)
        answer = client.post(CHAT, json=ask())
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert client.post(CHAT, json=ask()).json()["choices"] == wanted and client.get("/health").status_code == 200


def test_a_grammar_that_gives_up_ends_its_own_answer_alone(engine, monkeypatch):
    """While others go on, to the same text."""
    body = {"prompt": "a hawk", "structured_outputs": {"regex": "[a-z]{200}"}, "max_tokens": 100, "seed": 1}
    with served(engine, "--slots", "4", "--plain") as (client, _):
        wanted = client.post(CHAT, json=ask(max_tokens=60)).json()["choices"]
    with served(engine, "--slots", "4") as (client, server):
        fails_at = {"left": 12}
        advance = server.scheduler.decoder.advance

        def failing(sequence, *more):
            if sequence.processors and (left := fails_at["left"]) >= 0:
                fails_at["left"] = left - 1
                if left == 0:
                    sequence.processors[-1].fail("it is too much")
            return advance(sequence, *more)

        monkeypatch.setattr(server.scheduler.decoder, "advance", failing)
        found = {}

        def one(name: str, path: str, what: dict) -> None:
            found[name] = client.post(path, json=what)

        threads = [
            threading.Thread(target=one, args=("form", TEXT, body)),
            threading.Thread(target=one, args=("other", CHAT, ask(max_tokens=60))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found["form"].status_code == 500 and "it is too much" in found["form"].json()["error"]["message"]
        assert found["other"].json()["choices"] == wanted
        fails_at["left"] = 12
        told = client.post(TEXT, json=body | {"stream": True})
        assert events(told.text)[-1]["error"]["type"] == "server_error" and "[DONE]" not in told.text
        assert server.scheduler.idle and client.get("/health").status_code == 200


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


TOO_MUCH = {
    "stops": {"stop": ["a"] * 100_000},
    "a deep schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(40)}}},
    "many values": {"response_format": {"type": "json_object", "schema": {"enum": list(range(100_000))}}},
    "biases": {"logit_bias": {str(number): 1 for number in range(2000)}},
    "a bias that is none": {"logit_bias": {"1": [1]}},
    "a digit of another script": {"logit_bias": {"\u0661": 1}},
    "a tree that is a list": {"eyas": {"tree": [1, 2]}},
    "huge numbers": {"max_tokens": 10**400},
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_much_is_refused_at_once(client, what):
    answer = client.post(CHAT, json=ask(**TOO_MUCH[what]))
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"] and answer.elapsed.total_seconds() < 5


def test_text_of_nul_and_other_odd_characters_is_text(client):
    odd = "\u0000\u200d\ufeff\U0001f600\u202e"
    for path, body in ((CHAT, ask(odd)), (TEXT, {"prompt": odd, "max_tokens": 4, "stop": ["\u0000"], "seed": 1})):
        whole = client.post(path, json=body)
        assert whole.status_code == 200
        told = events(client.post(path, json=body | {"stream": True}).text)[:-1]
        said = "".join(each["choices"][0]["delta"].get("content") or "" if path == CHAT else each["choices"][0]["text"] for each in told)
        choice = whole.json()["choices"][0]
        assert said == (choice["message"]["content"] if path == CHAT else choice["text"])


def test_a_body_of_the_largest_size_is_read_and_one_byte_more_is_not(client):
    for size, status in ((MOST_BYTES, 200), (MOST_BYTES + 1, 413)):
        body = b'{"prompt": "a"'.ljust(size - 1) + b"}"
        answer = client.post(TEXT, content=body, headers={"content-type": "application/json"})
        assert len(body) == size and answer.status_code == status
