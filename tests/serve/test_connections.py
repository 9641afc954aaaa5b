"""Claims about connections as such: whoever is slow, silent, gone or one too many holds neither the server nor others up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from eyas.commands.parser import parser
from eyas.commands.serve import bound, http_of
from eyas.serve import app, connections
from eyas.serve.app import Server
from tests.serve.serving import CHAT, ask, served

Address = tuple[str, int]


@pytest.fixture(scope="module")
def server(engine) -> Iterator[Server]:
    with served(engine, "--slots", "3", "--queue", "20") as (_, server):
        yield server


@pytest.fixture
def address(server, monkeypatch, caplog) -> Iterator[Address]:
    """A real socket before the application, with short patience; nothing is said in the log by the end."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.4)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 8)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.4)
    listening = bound("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what a client does not read stays here
    where = listening.getsockname()
    http = http_of(server, parser().parse_args(["serve"]))
    thread = threading.Thread(target=asyncio.run, args=(http.serve(sockets=[listening]),))
    thread.start()
    with caplog.at_level(logging.WARNING):
        yield where
        http.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and not caplog.records


def connected(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=20)


def request(body: dict | bytes, length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length or len(content)}\r\n\r\n"
    return head.encode() + content


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def answer(address: Address) -> bytes:
    """A whole answer, to somebody who behaves."""
    with connected(address) as connection:
        connection.sendall(request(ask(max_tokens=3)).replace(b"host:", b"connection: close\r\nhost:"))
        return all_of(connection)


def test_a_head_that_comes_a_byte_at_a_time_is_given_up(address):
    with connected(address) as slow:
        sent, head = 0, request(b"")
        with contextlib.suppress(OSError):
            for byte in head:
                slow.sendall(bytes([byte]))
                sent += 1
                time.sleep(0.05)
        told = all_of(slow)
        assert b" 408 " in told and b"head did not come" in told and 5 < sent < len(head)


def test_who_says_nothing_is_let_go_and_a_body_that_does_not_come_is_refused(address):
    with connected(address) as silent, connected(address) as half:
        half.sendall(request(b'{"messages"', 200))
        assert all_of(silent) == b""
        told = all_of(half)  # nor is the rest waited for
        assert b" 408 " in told and b"body did not come" in told


def test_what_is_no_http_is_refused_in_openais_form(address):
    for nonsense in (b"\x16\x03\x01\x02\x00\x01", b"GET / SPDY/9\r\n\r\n", b"A" * 100_000):
        with connected(address) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(nonsense + b"\r\n\r\n")
            told = all_of(connection)
            assert not told or (b" 400 " in told and b'"invalid_request_error"' in told)


def test_idle_connections_make_room(address):
    idle = [connected(address) for _ in range(12)]
    assert b" 200 " in answer(address)
    for each in idle:
        each.close()


def test_who_does_not_read_is_let_go_and_others_go_on(server, address):
    with connected(address) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = ask(max_tokens=400, ignore_eos=True, stream=True, n=3, logprobs=True, top_logprobs=20)
        deaf.sendall(request(body))
        assert b"200 OK" in deaf.recv(20)
        assert b" 200 " in answer(address)
        until = time.monotonic() + 20
        while not server.scheduler.idle and time.monotonic() < until:
            time.sleep(0.02)
        assert server.scheduler.idle and len(server.scheduler.decoder.free) == 3
        assert b"[DONE]" not in all_of(deaf)


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reset_ends_what_is_under_way(server, address, moment, stream):
    for _ in range(4):
        with connected(address) as gone:
            gone.sendall(request(ask(max_tokens=400, ignore_eos=True, stream=stream, n=3)))
            time.sleep(moment)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until = time.monotonic() + 20
    while not server.scheduler.idle and time.monotonic() < until:
        time.sleep(0.02)
    assert server.scheduler.idle and b" 200 " in answer(address)
