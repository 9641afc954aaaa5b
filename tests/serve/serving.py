"""What the tests of the server share: a tiny model behind the real application, answered by the real thread."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from eyas.commands.parser import parser
from eyas.commands.serve import server_of
from eyas.engine import Engine, load
from eyas.serve.app import Server, make_app
from tests.tiny import save_tiny_draft, save_tiny_target

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def saved_engine(folder: Path, **changes: Any) -> Engine:
    target = save_tiny_target(folder / "target", **changes)
    return load(target, save_tiny_draft(folder / "draft", target), precision="fp32")


@contextlib.contextmanager
def served(engine: Engine, *words: str) -> Iterator[tuple[TestClient, Server]]:
    """A client of a server with these options, whose thread ends with the block."""
    options = parser().parse_args(["serve", "--tree", "8x2x3", *words])
    server = server_of(engine, options)
    server.scheduler.start()
    try:
        with TestClient(make_app(server, True, options.cors), raise_server_exceptions=False) as client:
            yield client, server
    finally:
        server.scheduler.stop()
        server.scheduler.thread.join(30)


@contextlib.contextmanager
def listening(engine: Engine, *words: str) -> Iterator[str]:
    """The address of a real server."""
    with served(engine, *words) as (_, server), at_an_address(server) as address:
        yield address


@contextlib.contextmanager
def at_an_address(server: Server) -> Iterator[str]:
    """The address at which a server listens for real; it takes nothing more in behind the block."""
    http = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.draining = http.should_exit = True
        thread.join(10)


def events(content: str) -> list[Any]:
    """What a stream told, [DONE] as text."""
    lines = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def ask(text: str = "How can a hawk see?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 20, "seed": 5, **more}
