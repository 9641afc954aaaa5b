"""What `eyas serve` is after thousands of requests from clients that leave, stall, send nonsense and die.

    python benchmarks/serving_soak.py [--requests 10000] [--at-once 64] [--embedded] [--minutes 40] [--log F.log] [--out F.json]

So many clients ask a server in a process of its own, one request after the other each. A third leave at a random moment; some read a byte
now and then, send half a head and wait, send too much or no JSON; processes with sixteen streams are killed. A tenth of the way the server
is asked to end while requests are under way, and starts again on the same port. Every whole answer must be the one that the same request
got alone, and every cut one the beginning of it. What the server holds at the end (memory, threads, files, slots) is compared with what
it held after the first thousand. The model is the tests' tiny one, or with `--embedded` the embedded target. `--quick` asks 40.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import DEV, KINDS, options, parsed, target_directory, tell, tiny
from serving_promise import CHAT, CONTEXT, TEXT, Asked, answered, requests_of, varied

from eyas.bench.prompts import read_prompts
from eyas.files.target import target_config

SLOTS, DISTINCT = 16, 60  # of the server; requests that are different
LEAVE, STALL, WRONG = 0.33, 0.02, 0.05  # shares of clients that leave, that are slow in some way, that send nonsense
ASIDE = 0.1  # of the requests come before the server is ended and started again
KILLED = 6  # client processes that are killed
TROUBLE = re.compile(r"Traceback|Task was destroyed|never retrieved|never awaited|Exception|Error")
STREAMS = """
import http.client, json, sys
connections = []
for body in json.load(sys.stdin):
    connections.append(http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])))
    connections[-1].request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
print("asked", flush=True)
for connection in connections:
    connection.getresponse().read()
"""
NONSENSE: tuple[tuple[bytes, tuple[int, ...]], ...] = (
    (b"{", (400,)),
    (b'{"prompt": "a", "temperature": 1e400}', (400,)),
    (b'{"prompt": "\\ud800"}', (400,)),
    (b'{"prompt": ' + b"[" * 20_000, (400,)),
    (b'{"prompt": "a", "stop": [' + b'"a",' * 100_000 + b'"b"]}', (400,)),
    (b'{"prompt": "a", "stop_token_ids": [999999999]}', (400,)),
    (b'{"prompt": "a", "structured_outputs": {"regex": "("}}', (400,)),
    (b'{"prompt": "a", "n": 1000}', (400,)),
    (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', (413,)),
)


# ---- the server ----


@dataclass
class Server:
    """A server in a process of its own, that can be ended and started again on its port."""

    words: list[str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.port = self.port or free_port()
        command = [sys.executable, "-m", "eyas", "serve", "--port", str(self.port), "--slots", str(SLOTS), "--queue", "1000", *self.words]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        until = time.monotonic() + 120
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {self.log.read_text()[-500:]}")
            time.sleep(0.2)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/health")[0] == 200
        return False

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def end(self) -> tuple[int, float]:
        """Ask it to end: its exit status, and the seconds that it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(180), time.monotonic() - began

    def held(self) -> dict[str, float]:
        """What the process holds, once nothing is under way."""
        assert self.process is not None
        until = time.monotonic() + 60
        while (counts := self.counts())["running"] + counts["waiting"] and time.monotonic() < until:
            time.sleep(0.2)
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
        return {"memory_mb": round(int(found["VmRSS"]) / 1024, 1), "threads": int(found["Threads"]), "files": files, **counts}

    def counts(self) -> dict[str, float]:
        _, text = self.get("/metrics")
        found = dict(re.findall(r"^eyas:(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE))
        names = {"running": "num_requests_running", "waiting": "num_requests_waiting", "slots free": "slots_free"}
        return {said: float(found[name]) for said, name in names.items()}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# ---- clients ----


class Ending(Exception):
    """The server refuses, for it is being ended."""


@dataclass
class Soak:
    """The clients, and what came of their requests."""

    server: Server
    asked: list[Asked]
    until: float
    alone: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ending: bool = False  # the server is being ended and started again: what is refused meanwhile is asked once more
    open: list[socket.socket] = field(default_factory=list)  # of clients that say nothing more

    def count(self, what: str, wrong: Any = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if wrong is not None:
                self.wrong.append(f"{what}: {str(wrong)[:600]}")

    def run(self, numbers: Iterator[int], at_once: int) -> None:
        """All these requests, so many under way."""

        def client() -> None:
            while time.monotonic() < self.until:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                self.one(random.Random(number))

        clients = [threading.Thread(target=client) for _ in range(at_once)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()

    def one(self, draw: random.Random) -> None:
        share, number = draw.random(), draw.randrange(len(self.asked))
        asked = varied(draw, self.asked[number])
        if share < LEAVE:
            way = partial(self.leaves, draw, number, asked)
        elif share < LEAVE + STALL:
            way = partial(self.stalls, draw, asked)
        elif share < LEAVE + STALL + WRONG:
            way = partial(self.nonsense, draw)
        else:
            way = partial(self.whole, number, asked)
        while time.monotonic() < self.until:
            began_while = self.ending
            try:
                return way()
            except Ending:
                self.count("asked again, as the server was ending")
            except (OSError, http.client.HTTPException) as error:
                if not (self.ending and (began_while or isinstance(error, ConnectionRefusedError))):
                    return self.count("lost", repr(error))
                self.count("asked again, as the server was ending")
            time.sleep(0.3)

    def whole(self, number: int, asked: Asked) -> None:
        told = answered(self.server.address, asked)
        if told.get("status") == 503 and "ending" in told["body"]:
            raise Ending
        if "status" in told:
            kind = str(told["status"])
            return self.count(f"status {kind}" + (", 5xx" if kind.startswith("5") else ""), told)
        same = json.dumps(told, sort_keys=True) == json.dumps(self.alone[number], sort_keys=True)
        self.count("the answer given alone" if same else "another answer", None if same else (asked, self.alone[number], told))

    def leaves(self, draw: random.Random, number: int, asked: Asked) -> None:
        """Ask, read a part of the answer if it is a stream, and leave: politely, or with a reset."""
        until, reset = time.monotonic() + draw.choice([0, 0.01, 0.1, 0.5, 3]) * draw.random(), draw.random() < 0.5
        ending = self.ending
        with self.server.connected() as connection:
            connection.sendall(request_text(asked))
            found = b""
            while (left := until - time.monotonic()) > 0:
                connection.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    if not (part := connection.recv(4096)):
                        break
                    found += part
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        refused = found.startswith(b"HTTP/1.1 503") and (ending or self.ending)  # perhaps no more than the head has come
        if found.startswith(b"HTTP/1.1 5") and not refused:
            return self.count("5xx to one who leaves", found)
        parts = beginnings(asked, found)
        wanted = self.alone[number]["choices"]
        foreign = [(each, wanted[index]) for index, each in parts.items() if not wanted[index]["content"].startswith(each)]
        self.count("foreign text" if foreign else "left", foreign or None)

    def stalls(self, draw: random.Random, asked: Asked) -> None:
        """Hold a connection and do little with it."""
        connection = self.server.connected()
        with self.lock:
            self.open.append(connection)
        kind = draw.choice(["half a head", "half a body", "nothing", "a byte now and then"])
        text = request_text(asked)
        head = text.index(b"\r\n\r\n") + 4
        sent = {"half a head": text[: head // 2], "half a body": text[: head + 5], "nothing": b""}.get(kind, text)
        connection.sendall(sent)
        self.count(kind)
        for _ in range(5 if kind == "a byte now and then" else 0):
            connection.recv(1)
            time.sleep(0.2)

    def nonsense(self, draw: random.Random) -> None:
        body, wanted = draw.choice(NONSENSE)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        try:
            connection.request("POST", TEXT, body, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
        except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            return self.count("nonsense, cut")
        finally:
            connection.close()
        if response.status == 503 and self.ending:
            raise Ending
        if response.status in wanted:
            self.count("nonsense refused")
        else:
            self.count(f"status {response.status} for nonsense", body[:80])

    def kill_one(self, draw: random.Random) -> None:
        """A process with sixteen streams, killed in the middle."""
        chats = [each.body | {"stream": True, "max_tokens": 300} for each in self.asked if each.path == CHAT]
        command = [sys.executable, "-c", STREAMS, str(self.server.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            json.dump([draw.choice(chats) for _ in range(16)], process.stdin)
            process.stdin.close()
            process.stdout.readline()
            time.sleep(draw.random())
            process.kill()
        self.count("processes killed")


def request_text(asked: Asked) -> bytes:
    body = json.dumps(asked.body).encode()
    head = f"POST {asked.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def beginnings(asked: Asked, found: bytes) -> dict[int, str]:
    """For each choice of a stream, the text that came."""
    parts = dict[int, str]()
    for line in re.findall(rb"^data: (\{.*\})\r?$", found, re.MULTILINE) if asked.body.get("stream") else []:
        with contextlib.suppress(ValueError):  # a piece of the transfer's own that ran through an event
            for choice in json.loads(line).get("choices", []):
                said = choice["delta"].get("content") if asked.path == CHAT else choice["text"]
                parts[choice["index"]] = parts.get(choice["index"], "") + (said or "")
    return parts


# ---- the whole ----


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=Path, default=DEV)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--embedded", action="store_true", help="the embedded target in place of a tiny one")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--log", type=Path, help="what the server says (default: a temporary file)")
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, requests=40, at_once=8)
    target = target_directory(None) if given.embedded else tiny().target
    models = [] if given.embedded else ["--target", str(tiny().target), "--draft", str(tiny().draft)]
    prompts = [str(item.prompt)[:200] for item in read_prompts(str(given.prompts))[0]]
    asked = requests_of(8 if given.quick else DISTINCT, prompts, target_config(target).vocab_size, 2)
    with tempfile.TemporaryDirectory() as folder:
        log = given.log or Path(folder) / "log"
        log.write_bytes(b"")
        server = Server([*models, "--context", str(CONTEXT)], log)
        server.start()
        try:
            tell(soaked(Soak(server, asked, time.monotonic() + 60 * given.minutes), given), given.out)
        finally:
            if server.process is not None:
                server.process.kill()
                server.process.wait()


def soaked(soak: Soak, given: Any) -> dict[str, Any]:
    server = soak.server
    soak.alone = [answered(server.address, each) for each in soak.asked]
    refused = [each for each in soak.alone if "status" in each]
    assert not refused, f"requests that are not answered alone: {refused[:3]}"
    aside = round(ASIDE * given.requests)
    first = threading.Thread(target=soak.run, args=(iter(range(aside)), given.at_once))
    first.start()
    while sum(soak.counts.values()) < aside / 2 and first.is_alive():
        time.sleep(0.02)
    soak.ending = True
    status, seconds = server.end()
    server.start()
    soak.ending = False
    first.join()
    drained = {"exit status": status, "seconds": round(seconds, 1)}
    left = iter(range(aside, given.requests))
    soak.run(iter([next(left) for _ in range(min(aside, 1000))]), given.at_once)
    before = settled(soak)
    killer = threading.Thread(target=kill_some, args=(soak, 1 if given.quick else KILLED))
    killer.start()
    soak.run(left, given.at_once)
    killer.join()
    after = settled(soak)
    status, seconds = server.end()
    said = server.log.read_text(errors="replace")
    return {
        "requests": sum(count for what, count in soak.counts.items() if not what.startswith(("processes", "asked again"))),
        **dict(sorted(soak.counts.items())),
        "5xx": sum(count for what, count in soak.counts.items() if "5xx" in what),
        "ended in the middle": drained,
        "ended at last": {"exit status": status, "seconds": round(seconds, 1)},
        "after the first tenth": before,
        "at the end": after,
        "memory": round(after["memory_mb"] / before["memory_mb"], 3),
        "trouble in the log": TROUBLE.findall(said),
        "wrong": soak.wrong[:5],
    }


def kill_some(soak: Soak, times: int) -> None:
    draw = random.Random(5)
    for _ in range(times):
        soak.kill_one(draw)
        time.sleep(2)


def settled(soak: Soak) -> dict[str, float]:
    """What the server holds once the slow have gone, too."""
    time.sleep(1)
    for connection in soak.open:
        connection.close()
    soak.open.clear()
    time.sleep(1)
    return soak.server.held()


if __name__ == "__main__":
    main()
