"""Whether the server keeps its promise: the same request gives the same bytes, whatever else the server does.

    python benchmarks/serving_promise.py [--requests 200] [--precision bf16] [--minutes 60] [--prompts P] [--keep K.json] [--out F.json]

Requests of random settings (laws of drawing, penalties, biases, ends, log probabilities, several answers, forms, calls, turns) are answered
one after the other by a server without draft, trees or kept prefixes. Then servers of other settings answer them in another order, 1 to 64
at once, at random moments, streamed or whole, while other clients leave in the middle. Every answer must be the first one, byte for byte,
but for what says when and how it came about (ids, times, rounds, cached tokens). `--minutes` bounds the run; `--keep` keeps the answers
that were given alone and what was compared, and a later run goes on there. `--quick` runs it on tiny random models.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import DEV, KINDS, options, parsed, save, target_for, tell, tiny

from eyas.bench.prompts import read_prompts
from eyas.bench.servers import serving
from eyas.files.target import target_config

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALONE = ("--slots", "1", "--method", "plain", "--no-prefix-cache")
SERVERS = (
    ("--slots", "64", "--prefix-cache"),
    ("--slots", "16", "--no-prefix-cache"),
    ("--slots", "3", "--prefix-cache", "--stall", "0.005"),
    ("--slots", "8", "--prefix-cache", "--tree", "16x3x4"),
    ("--slots", "24", "--prefix-cache", "--no-copy"),
)
TREES = ("auto", "16x3x4", "chain:5", "3x1x3")
MOST_AT_ONCE, LONGEST_WAIT = 64, 2.0  # requests of a batch; seconds among which their beginnings are spread
LEAVERS = 0.2  # clients that leave, a request
CONTEXT = 1024

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["one", "two", "three"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "tags"],
    "additionalProperties": False,
}
PLACE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}, "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("weather", "time_at")]


class Asked(NamedTuple):
    path: str
    body: dict[str, Any]


# ---- requests ----


def requests_of(count: int, prompts: Sequence[str], vocabulary: int, seed: int) -> list[Asked]:
    """Requests of random settings."""
    draw = random.Random(seed)
    return [request_of(draw, number, prompts, vocabulary) for number in range(count)]


def request_of(draw: random.Random, number: int, prompts: Sequence[str], vocabulary: int) -> Asked:
    path = draw.choice([CHAT, CHAT, TEXT])
    body: dict[str, Any] = {"seed": number, "max_tokens": draw.randint(1, 32), "temperature": draw.choice([0, 0, 0.3, 0.7, 1.0, 1.0, 1.5])}
    body |= draw.choice([{}, {}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.8, "top_k": 50, "min_p": 0.02}])
    body |= draw.choice([{}, {}, {"frequency_penalty": 0.8}, {"presence_penalty": -0.7}, {"repetition_penalty": 1.2}])
    if draw.random() < 0.2:
        body["logit_bias"] = {str(draw.randrange(vocabulary)): draw.choice([-100, -2.5, 3, 8]) for _ in range(draw.randint(1, 20))}
    form = draw.random() < 0.25
    if form:
        body |= form_of(draw, path)
    else:
        body |= draw.choice([{}, {}, {"stop": [" the", "\n"]}, {"stop": "e"}, {"min_tokens": 1}, {"ignore_eos": True}])
        body |= draw.choice([{}, {}, {}, {"stop_token_ids": [draw.randrange(vocabulary) for _ in range(8)]}])
    if "min_tokens" in body:
        body["min_tokens"] = draw.randint(0, body["max_tokens"])
    body |= draw.choice([{}, {}, {}, {"n": 2}, {"n": 3}])
    if path == CHAT:
        body |= draw.choice([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": draw.randint(1, 5)}])
        return Asked(path, body | {"messages": turns_of(draw, prompts)})
    body |= draw.choice([{}, {"logprobs": draw.randint(0, 5)}]) | draw.choice([{}, {"echo": True}])
    return Asked(path, body | {"prompt": prompt_of(draw, prompts, vocabulary)})


def form_of(draw: random.Random, path: str) -> dict[str, Any]:
    """What an answer's form is asked for with."""
    forms: list[dict[str, Any]] = [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": "[a-z ]{3,20}[.!]"}},
        {"structured_outputs": {"choice": ["yes", "no", "it may be so"]}},
        {"structured_outputs": {"grammar": 'start: "(" /[a-z]{1,8}/ ("," /[a-z]{1,8}/)* ")"'}},
    ]
    if path == CHAT:
        forms += [
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "told", "schema": SCHEMA}}},
            {"tools": TOOLS, "tool_choice": "required"},
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ]
    return {"max_tokens": draw.randint(8, 40)} | draw.choice(forms)


def turns_of(draw: random.Random, prompts: Sequence[str]) -> list[dict[str, str]]:
    """A conversation of one to three turns; many begin alike."""
    system = draw.choice([None, None, "Answer in one sentence.", " ".join(prompts[:3])])
    turns = [{"role": "system", "content": system}] if system else []
    begins = draw.choice([prompts, prompts[:4]])
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        turns += [{"role": "user", "content": draw.choice(begins)}, {"role": "assistant", "content": "Yes. " + draw.choice(prompts[:4])}]
    return [*turns, {"role": "user", "content": draw.choice(begins)}]


def prompt_of(draw: random.Random, prompts: Sequence[str], vocabulary: int) -> Any:
    text = draw.choice(prompts)
    ids = [draw.randrange(vocabulary) for _ in range(draw.randint(1, 30))]
    return draw.choice([text, text, prompts[0] + " " + text, ids, [text, text[: len(text) // 2]], [ids, ids[:3]]])


# ---- answers ----


def answered(address: str, asked: Asked) -> dict[str, Any]:
    """The answer's part that is promised: choices, ends, counts, seed and fingerprint. What is no answer is told as it came."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=900)
    try:
        connection.request("POST", asked.path, json.dumps(asked.body), {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        return {"status": response.status, "body": content}
    return joined(asked, content) if asked.body.get("stream") else whole(asked, json.loads(content))


def whole(asked: Asked, told: dict[str, Any]) -> dict[str, Any]:
    choices = [blank() for _ in told["choices"]]
    for choice in told["choices"]:
        said = choice["message"] if asked.path == CHAT else {"content": choice["text"]}
        add(choices[choice["index"]], said, choice["logprobs"], choice["finish_reason"])
    return promised(choices, told, told["usage"])


def joined(asked: Asked, content: str) -> dict[str, Any]:
    """What a stream's events come to."""
    lines = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]" or "event: error" in content:
        return {"status": "cut", "body": content[-500:]}
    found = [json.loads(line) for line in lines[:-1]]
    numbers = {choice["index"] for each in found for choice in each["choices"]}
    choices = [blank() for _ in range(max(numbers) + 1)]
    for choice in (choice for each in found for choice in each["choices"]):
        said = choice["delta"] if asked.path == CHAT else {"content": choice["text"]}
        add(choices[choice["index"]], said, choice["logprobs"], choice["finish_reason"])
    last = next(each for each in reversed(found) if "eyas" in each)
    return promised(choices, last, found[-1]["usage"])


def blank() -> dict[str, Any]:
    return {"content": "", "calls": [], "logprobs": {}, "finish_reason": None}


def add(choice: dict[str, Any], said: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> None:
    choice["content"] += said.get("content") or ""
    choice["calls"] += [call["function"] for call in said.get("tool_calls") or []]
    for name, values in (logprobs or {}).items():
        choice["logprobs"][name] = choice["logprobs"].get(name, []) + (values or [])
    choice["finish_reason"] = reason or choice["finish_reason"]


def promised(choices: list[dict[str, Any]], told: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    return {"choices": choices, "usage": counts, "seed": told["eyas"]["seed"], "fingerprint": told["system_fingerprint"]}


def leave(address: str, asked: Asked, after: float) -> None:
    """Ask, and go away before the answer's end."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=900)
    with contextlib.suppress(OSError):
        connection.request("POST", asked.path, json.dumps(asked.body), {"content-type": "application/json"})
        time.sleep(after)
    connection.close()


# ---- the comparison ----


class Compared:
    """What was answered alone, and what came of the same requests elsewhere. Kept in a file between runs."""

    def __init__(self, asked: Sequence[Asked], kept: Path | None) -> None:
        self.kept = kept
        self.mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self.alone: list[dict[str, Any]] = []
        self.same: dict[str, list[int]] = {}  # numbers of requests, by the server's settings
        self.different: list[dict[str, Any]] = []
        self.left = 0
        if kept and kept.exists() and (told := json.loads(kept.read_text()))["mark"] == self.mark:
            self.alone, self.same, self.different, self.left = told["alone"], told["same"], told["different"], told["left"]

    def keep(self) -> None:
        names = ("mark", "alone", "same", "different", "left")
        save({name: getattr(self, name) for name in names}, self.kept)

    def take(self, settings: str, number: int, told: dict[str, Any], asked: Asked) -> None:
        if json.dumps(told, sort_keys=True) == json.dumps(self.alone[number], sort_keys=True):
            self.same.setdefault(settings, []).append(number)
        else:
            self.different.append({"server": settings, "request": asked, "alone": self.alone[number], "told": told})


def varied(draw: random.Random, asked: Asked) -> Asked:
    """The same request with what no answer hangs on drawn anew."""
    body = asked.body | {"cache_prompt": draw.random() < 0.7, "eyas": {"tree": draw.choice(TREES)} if draw.random() < 0.3 else {}}
    return Asked(asked.path, body | ({"stream": True, "stream_options": {"include_usage": True}} if draw.random() < 0.5 else {}))


def batches(draw: random.Random, numbers: Sequence[int]) -> Iterator[list[int]]:
    left = list(numbers)
    draw.shuffle(left)
    while left:
        size = draw.choice([1, 2, 4, 8, 16, 32, MOST_AT_ONCE])
        yield left[:size]
        left = left[size:]


def batch(address: str, asked: Sequence[Asked], numbers: Sequence[int], compared: Compared, settings: str) -> None:
    """Ask these requests at random moments, while others come and leave."""
    draw = random.Random(f"{settings} {numbers}")
    found = dict[int, dict[str, Any]]()

    def one(number: int, wanted: Asked, wait: float) -> None:
        time.sleep(wait)
        try:
            found[number] = answered(address, wanted)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            found[number] = {"status": "none", "body": repr(error)}

    clients = [threading.Thread(target=one, args=(number, varied(draw, asked[number]), draw.random() * LONGEST_WAIT)) for number in numbers]
    for number in draw.sample(range(len(asked)), round(LEAVERS * len(numbers))):
        more = Asked(asked[number].path, varied(draw, asked[number]).body | {"max_tokens": 100})
        clients.append(threading.Thread(target=leave, args=(address, more, draw.random() * LONGEST_WAIT)))
        compared.left += 1
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for number, told in found.items():
        compared.take(settings, number, told, asked[number])
    compared.keep()


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=Path, default=DEV)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seed", type=int, default=1, help="of the requests")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--keep", type=Path, help="what is compared so far; a run that finds it goes on there")
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, requests=12)
    models = {"target": str(tiny().target), "draft": str(tiny().draft)} if given.quick else {}
    models |= {"precision": given.precision, "context": str(CONTEXT), "queue": "1000"}
    own = [word for name, value in models.items() for word in (f"--{name}", value)]
    prompts = [str(item.prompt)[:160] for item in read_prompts(str(given.prompts))[0]]
    asked = requests_of(given.requests, prompts, target_config(target_for(given)).vocab_size, given.seed)
    until, compared = time.monotonic() + 60 * given.minutes, Compared(asked, given.keep)
    with serving(*own, *ALONE) as address:
        while len(compared.alone) < len(asked) and time.monotonic() < until:
            compared.alone.append(answered(address, asked[len(compared.alone)]))
            compared.keep()
    refused = [each for each in compared.alone if "status" in each]
    assert not refused, f"requests that a server alone does not answer: {refused[:3]}"
    for settings in SERVERS[: 1 if given.quick else None]:
        name = " ".join(settings)
        missing = [number for number in range(len(compared.alone)) if number not in compared.same.get(name, [])]
        if missing and time.monotonic() < until:
            with serving(*own, *settings) as address:
                for numbers in batches(random.Random(f"{given.seed} {name}"), missing):
                    if time.monotonic() < until:
                        batch(address, asked, numbers, compared, name)
    tell(told(compared), given.out)


def told(compared: Compared) -> dict[str, Any]:
    alone = [each for each in compared.alone if "choices" in each]
    return {
        "requests alone": len(alone),
        "texts": sum(len(each["choices"]) for each in alone),
        "tokens": sum(each["usage"]["completion_tokens"] for each in alone),
        "fingerprints": sorted({each["fingerprint"] for each in alone}),
        "same, by server": {name: len(numbers) for name, numbers in compared.same.items()},
        "clients that left": compared.left,
        "different": len(compared.different),
        "the first of these": compared.different[:3],
    }


if __name__ == "__main__":
    main()
