"""Claims about a server whose surroundings fail it: nothing can be kept, the clock is set back, too many watch, its thread breaks."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from eyas.commands import serve
from eyas.commands.parser import parser
from eyas.config import cache_dir
from eyas.decode.plan import store
from eyas.engine import load
from eyas.kernels import native
from eyas.serve import watching
from eyas.serve.watching import MOST_WATCHERS
from tests.serve.serving import CHAT, ask, at_an_address, events, saved_engine, served

PAGES = 50


@pytest.fixture
def nowhere_to_keep(tmp_path, monkeypatch):
    """A cache directory that nobody can make, whoever they are; and a compiler that is quick."""
    compiled = native.kernel() and native.kernel()._name  # type: ignore[union-attr]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(store, "cache_dir", cache_dir)

    def compile_it(command, **_):
        shutil.copyfile(compiled, command[command.index("-o") + 1])

    monkeypatch.setattr(native.subprocess, "run", compile_it)
    native.kernel.cache_clear()
    yield compiled
    monkeypatch.undo()
    native.kernel.cache_clear()


def test_a_server_answers_where_nothing_can_be_kept(tmp_path, nowhere_to_keep, capsys):
    """With the kernel, which is then built for this process alone, and with prices that are timed anew each time."""
    engine = saved_engine(tmp_path / "models")
    if nowhere_to_keep:
        assert native.kernel_name() == Path(nowhere_to_keep).stem
    settings = {"seed": 5, "max_new_tokens": 20, "temperature": 1.0, "method": "plain", "generation_config": "none"}
    wanted = engine.generate("How can a hawk see?", **settings).text
    with served(engine, "--tree", "auto") as (client, _):
        serve.keep_plans(engine)
        assert client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] == wanted
    said = capsys.readouterr().err
    assert said.count("cannot be kept") == 1 and said.count("timing passes") == 1


def test_what_passes_cost_is_timed_once_on_a_machine(tmp_path, capsys):
    engine = saved_engine(tmp_path)
    for _ in range(2):
        with served(load(engine.directory, engine.draft, precision="fp32"), "--tree", "auto") as (_, server):
            serve.keep_plans(server.engine)
    assert capsys.readouterr().err.count("timing passes") == 1


def test_a_clock_that_is_set_back_changes_nothing(engine, monkeypatch):
    """Deadlines, rates and times to wait hang on clocks that only go on; the wall clock says when an answer was made, and no more."""
    back = itertools.count()
    with served(engine, "--slots", "1", "--queue", "0", "--hang-seconds", "5") as (client, _):
        wanted = client.post(CHAT, json=ask()).json()["choices"]
        monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(back))
        first, second = (client.post(CHAT, json=ask()).json() for _ in range(2))
        assert first["choices"] == second["choices"] == wanted and second["created"] < first["created"] <= 1e9
        assert all(told["timings"][name] > 0 for told in (first, second) for name in ("prompt_ms", "predicted_ms", "predicted_per_second"))
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=ask(n=2)).headers["retry-after"] == "1"
        told = client.get("/metrics").text
        lines = [line for line in told.splitlines() if line.startswith("eyas:") and ("_sum{" in line or "turn" in line)]
        seconds = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "seconds_" in line and "_created" not in line}
        assert len(seconds) > 5 and all(0 <= value < 60 for value in seconds.values())


def test_fifty_pages_that_watch_cost_a_round_no_more_than_one(engine, monkeypatch):
    """Eight watch, the others are told that these are all; a round is told once however many hear it, and who leaves is forgotten."""
    told = []
    own = watching.round_told
    monkeypatch.setattr(watching, "round_told", lambda *given: told.append(given[0].text.rounds) or own(*given))
    with served(engine) as (client, server), at_an_address(server) as address:
        place = urlsplit(address)
        pages = [socket.create_connection((place.hostname, place.port), timeout=30) for _ in range(PAGES)]
        for page in pages:
            page.sendall(b"GET /v1/eyas/rounds?request=all HTTP/1.1\r\nHost: localhost\r\n\r\n")
        heads = [page.recv(4096).split(b"\r\n")[0] for page in pages]
        assert heads.count(b"HTTP/1.1 200 OK") == MOST_WATCHERS == len(server.rounds.watchers)
        assert heads.count(b"HTTP/1.1 429 Too Many Requests") == PAGES - MOST_WATCHERS
        answer = client.post(CHAT, json=ask()).json()
        assert told == list(range(1, answer["eyas"]["rounds"][0] + 1))
        for page in pages:
            page.close()
        until = time.monotonic() + 20
        while len(server.rounds.watchers) and time.monotonic() < until:
            time.sleep(0.01)
        assert not list(server.rounds.watchers)
        told.clear()
        assert client.post(CHAT, json=ask()).json()["choices"] == answer["choices"] and told == []


def test_a_thread_that_breaks_ends_the_server_with_status_1_and_one_line(engine, capsys):
    """Who waits is told, whole or in a stream; a supervisor then starts it anew."""
    options = parser().parse_args(["serve", "--tree", "8x2x3", "--port", "0", "--slots", "1"])
    server = serve.server_of(engine, options)
    listening = serve.bound(options.host, 0)
    port, found = listening.getsockname()[1], {}

    def broken(_):
        while server.scheduler.in_hand < 2:
            time.sleep(0.005)
        raise RuntimeError("a part broke")

    server.scheduler.decoder.round = broken

    def one(stream: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", CHAT, json.dumps(ask(stream=stream)), {"content-type": "application/json"})
        response = connection.getresponse()
        found[stream] = response.status, response.read().decode()

    clients = [threading.Thread(target=one, args=(stream,)) for stream in (False, True)]
    for each in clients:
        each.start()
    assert asyncio.run(serve.served(server, listening, options)) == 1
    for each in clients:
        each.join(30)
    assert found[False][0] == 500 and "a part broke" in found[False][1]
    assert events(found[True][1])[-1]["error"]["type"] == "server_error" and "[DONE]" not in found[True][1]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "failed" in line] == ["eyas: the server has failed: RuntimeError: a part broke"]
    assert len(said) <= 3 and not any("Traceback" in line for line in said)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
