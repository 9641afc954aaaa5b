"""What `eyas serve` makes of the library's rounds: tokens a second, seconds to the first token, and what is its own of a turn.

    python benchmarks/serving.py --prompts P.jsonl [--limit 32] [--at-once 1 4 16] [--max-new-tokens 100] [--temperature 0] [--out F.json]

A server runs in a process of its own; so many clients each keep one streamed request under way until all prompts are asked. Then the
library decodes the same prompts with a batch as large, in turn with the server `--repeats` times; the ratio is of the medians. All texts
must be the same. `own` is the share of the turns that neither rounds nor prompts took. Then prompts are asked alone and beside others that
decode, in turn: how long their first tokens take. And a conversation goes on: how much of a second turn's prompt is read. `--quick` runs it
on tiny random models.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from common import KINDS, options, parsed, tell, tiny

from eyas.bench.prompts import read_prompts
from eyas.bench.servers import serving
from eyas.engine import load


class Answered(NamedTuple):
    text: str
    tokens: int
    first: float  # seconds until the first piece of text
    whole: float


def asked(address: str, body: dict[str, Any], most: float = math.inf) -> Answered:
    """One streamed answer of the server at http://HOST:PORT, to messages or to a prompt. What comes after the first `most` pieces of it is
    not waited for."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
    began, first, text, usage, pieces = time.perf_counter(), 0.0, "", 0, 0
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices", []):
            if piece := choice.get("text") or choice.get("delta", {}).get("content"):
                first, text, pieces = first or time.perf_counter() - began, text + piece, pieces + 1
        usage = (event.get("usage") or {}).get("completion_tokens", usage)
        if pieces >= most:
            break
    connection.close()
    return Answered(text, usage, first, time.perf_counter() - began)


def turns_of(address: str) -> tuple[float, float]:
    """Seconds of the server's turns so far, and those that neither rounds nor prompts took."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET", "/metrics")
    found = dict(re.findall(r"^eyas:(\w+)\{[^}]*\} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE))
    connection.close()
    return float(found["turn_seconds_total"]), float(found["turn_own_seconds_total"])


def load_of(address: str, bodies: Sequence[dict[str, Any]], at_once: int) -> tuple[list[Answered], float]:
    """All answers, with so many requests under way, and the seconds that they took."""
    waiting, found = SimpleQueue[int](), dict[int, Answered]()
    for number in range(len(bodies)):
        waiting.put(number)

    def client() -> None:
        with contextlib.suppress(Empty):
            while True:
                number = waiting.get_nowait()
                found[number] = asked(address, bodies[number])

    clients = [threading.Thread(target=client) for _ in range(at_once)]
    began = time.perf_counter()
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return [found[number] for number in range(len(bodies))], time.perf_counter() - began


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--repeats", type=int, default=2)
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, limit=4, at_once=[1, 3], max_new_tokens=12, repeats=1)
    models = {"target": str(tiny().target), "draft": str(tiny().draft)} if given.quick else {}
    models["precision"] = given.precision
    items = [item.prompt for item in read_prompts(str(given.prompts))[0][: given.limit]]
    turns = [[{"role": "user", "content": item}] if isinstance(item, str) else list(item[:1]) for item in items]
    bodies = [
        {"messages": turn, "max_tokens": given.max_new_tokens, "temperature": given.temperature, "seed": number, "stream": True}
        | {"stream_options": {"include_usage": True}}
        for number, turn in enumerate(turns)
    ]
    engine = load(**models)
    found: dict[str, Any] = {"prompts": len(turns), "max_new_tokens": given.max_new_tokens, "temperature": given.temperature}
    words = [word for name, value in models.items() for word in (f"--{name}", value)]
    with serving(*words, "--slots", str(max(given.at_once)), "--queue", "1000") as address:
        load_of(address, bodies[:2], 1)  # what is made on first use is there
        for at_once in given.at_once:
            found[f"{at_once} at once"] = compared(engine, address, bodies, at_once, given)
        found["beside others"] = beside_others(address, bodies, max(given.at_once) - 1, given.repeats)
        found["second turn"] = second_turn(address, bodies)
    tell(found, given.out)


def compared(engine: Any, address: str, bodies: list[dict[str, Any]], at_once: int, given: Any) -> dict[str, Any]:
    settings = {"max_new_tokens": given.max_new_tokens, "generation_config": "none"}
    served, library, firsts, texts = [], [], [], list[str]()
    turns = own = 0.0
    for number in range(given.repeats):
        fresh = [body | {"cache_prompt": False} for body in bodies]
        before = turns_of(address)
        answers, seconds = load_of(address, fresh, at_once)
        turns, own = (mine + now - then for mine, now, then in zip((turns, own), turns_of(address), before, strict=True))
        served.append(sum(each.tokens for each in answers) / seconds)
        firsts += [each.first for each in answers]
        began = time.perf_counter()
        if given.temperature == 0:
            results = engine.generate([body["messages"] for body in bodies], batch=at_once, temperature=0.0, **settings)
            library.append(sum(len(each.tokens) for each in results) / (time.perf_counter() - began))
            texts = [each.text for each in results]
        elif number == 0:
            texts = [
                engine.generate(body["messages"], seed=body["seed"], temperature=given.temperature, **settings).text for body in bodies
            ]
        assert [each.text for each in answers] == texts, "the server writes another text than the library"
    told: dict[str, Any] = {"tokens_per_second": round(statistics.median(served), 1), "own": round(own / turns, 4)}
    if library:
        told |= {"library": round(statistics.median(library), 1)}
        told["over_library"] = round(statistics.median(served) / statistics.median(library), 3)
    firsts.sort()
    return told | {"first_token_ms": {"median": round(1e3 * firsts[len(firsts) // 2]), "most": round(1e3 * firsts[-1])}, "same_texts": True}


def beside_others(address: str, bodies: list[dict[str, Any]], others: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first tokens of the first eight prompts, alone and while `others` are written."""
    asked_for = [body | {"cache_prompt": False, "max_tokens": 4} for body in bodies[:8]]
    long = [bodies[number % len(bodies)] | {"max_tokens": 3000, "ignore_eos": True, "seed": number} for number in range(others)]
    alone, beside = list[float](), list[float]()
    for _ in range(repeats):
        alone += [asked(address, body, 1).first for body in asked_for]
        with decoding(address, long):
            beside += [asked(address, body, 1).first for body in asked_for]
    usual, held = statistics.median(alone), statistics.median(beside)
    told = {"alone_ms": round(1e3 * usual), f"beside_{others}_ms": round(1e3 * held), "most_ms": round(1e3 * max(beside))}
    return told | {"ratio": round(held / usual, 2)}


@contextlib.contextmanager
def decoding(address: str, bodies: Sequence[dict[str, Any]]) -> Iterator[None]:
    """While these are written: each has had its first token when the block begins, and is left at its end."""
    connections = [http.client.HTTPConnection(address.removeprefix("http://"), timeout=600) for _ in bodies]
    readers = list[threading.Thread]()
    for connection, body in zip(connections, bodies, strict=True):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    for connection in connections:
        response = connection.getresponse()
        while b'"content":"' not in response.readline():
            pass
        readers.append(threading.Thread(target=read_on, args=(response,)))
        readers[-1].start()
    try:
        yield
    finally:
        for connection in connections:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        for reader in readers:
            reader.join()
        for connection in connections:
            connection.close()


def read_on(response: http.client.HTTPResponse) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while response.readline():
            pass


def second_turn(address: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds to the first token of a conversation's second turn, with and without what the first one left."""
    body = bodies[0]
    said = asked(address, body).text
    turns = [*body["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "Tell me more."}]
    again = {"messages": turns, "max_tokens": 4, "temperature": 0}
    with_it, without = (asked(address, body | again | {"cache_prompt": cached}).first for cached in (True, False))
    return {"first_token_ms": round(1e3 * with_it), "without_ms": round(1e3 * without)}


if __name__ == "__main__":
    main()
