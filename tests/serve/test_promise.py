"""The promise: the same request body gives the same bytes whatever else the server does."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from tests.serve.serving import CHAT, TEXT, events, served

COUNT = 24
SERVERS = [
    ("--slots", "1"),
    ("--slots", "3", "--stall", "0.0001"),
    ("--slots", "16", "--tree", "20x3x4", "--prefix-cache"),
    ("--slots", "4", "--plain"),
]
SCHEMA = {"type": "object", "properties": {"bird": {"enum": ["hawk", "owl"]}, "sees": {"type": "boolean"}}, "required": ["bird", "sees"]}


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Requests of random settings."""
    draw, found = random.Random(7), []
    for number in range(COUNT):
        words = " ".join(draw.choice(["hawk", "owl", "sees", "how", "and", "the", "flies"]) for _ in range(draw.randint(1, 40)))
        body: dict[str, Any] = {"max_tokens": draw.randint(1, 40), "seed": number, "temperature": draw.choice([0, 0.7, 1.0, 1.3])}
        laws: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"frequency_penalty": 0.8}, {"stop": ["a", "hawk"]}]
        laws += [{"min_p": 0.1, "ignore_eos": True}, {"structured_outputs": {"regex": "[a-z ]{3,12}[.!]"}}]
        body |= draw.choice([*laws, {"structured_outputs": {"json": SCHEMA}}])
        if draw.random() < 0.5:
            found.append((CHAT, body | {"messages": [{"role": "user", "content": words}], "n": draw.choice([1, 1, 2])}))
        else:
            found.append((TEXT, body | {"prompt": words, "logprobs": draw.choice([None, 2])}))
    return found


def said(client, path: str, body: dict[str, Any]) -> tuple[str | None, ...]:
    """The texts and their ends, in order."""
    count = body.get("n") or 1
    if not body.get("stream"):
        choices = client.post(path, json=body).json()["choices"]
        return tuple(
            part for each in choices for part in ((each["message"]["content"] if path == CHAT else each["text"]), each["finish_reason"])
        )
    texts, ends = [""] * count, [None] * count
    for event in events(client.post(path, json=body).text)[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += (choice["delta"].get("content") or "") if path == CHAT else choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    return tuple(part for pair in zip(texts, ends) for part in pair)


@pytest.fixture(scope="module")
def alone(engine):
    """Each request's answer where nothing else is asked, without a draft."""
    with served(engine, "--plain") as (client, _):
        return [said(client, path, body) for path, body in requests()]


@pytest.mark.parametrize("options", SERVERS, ids=" ".join)
def test_an_answer_is_the_same_whatever_else_the_server_does(engine, alone, options):
    """Other slots, other trees or none, another order, at once with others, some of whom leave; streamed or whole."""
    draw = random.Random(str(options))
    asked = list(enumerate(requests()))
    draw.shuffle(asked)
    found: dict[int, tuple[str | None, ...]] = {}
    with served(engine, "--queue", "1000", *options) as (client, server):

        def one(number: int, path: str, body: dict[str, Any]) -> None:
            time.sleep(draw.random() / 4)
            found[number] = said(client, path, body | ({"stream": True} if number % 2 else {}))

        def leaves(body: dict[str, Any]) -> None:
            with client.stream("POST", CHAT, json=body | {"stream": True, "max_tokens": 300, "ignore_eos": True}) as answer:
                next(answer.iter_lines())

        threads = [threading.Thread(target=one, args=(number, *each)) for number, each in asked]
        gone = {"messages": [{"role": "user", "content": "go"}], "seed": 1}
        threads += [threading.Thread(target=leaves, args=(gone,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until = time.monotonic() + 30
        while not server.scheduler.idle and time.monotonic() < until:
            time.sleep(0.05)
        assert server.scheduler.idle and len(server.scheduler.decoder.free) == server.scheduler.settings.slots
    assert [found[number] for number in range(COUNT)] == alone
