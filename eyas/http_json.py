"""A server that is asked over HTTP and answers in JSON: requests from several threads, and what goes wrong in one line.

Knows HTTP; knows nothing of what is asked.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from eyas.checks import EyasError, short

EXAMPLE = "http://127.0.0.1:8000"
TIMEOUT = 300.0  # seconds
TRIES = 10  # requests for one answer, where it may come later
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between the first two tries, which double, and between any two
LONGEST_WAIT = 600.0  # seconds that a server may ask for between two tries
LATE = 5  # tries that one without an answer in time counts for
LATER = (408, 425, 429, 500, 502, 503, 504)  # statuses of what may be answered when it is asked again
SAID = 200  # characters of a server's own words


class Unanswered(EyasError):
    """A request that was not answered. `status`: of the reply, 0 where there was none; `again`: whether it may be answered later; `wait`:
    seconds that the server asks to wait for; `late`: whether the time was over."""

    def __init__(self, message: str, status: int = 0, again: bool = False, wait: float = 0.0, late: bool = False) -> None:
        super().__init__(message)
        self.status, self.again, self.wait, self.late = status, again, wait, late


def checked_url(option: str, url: str) -> str:
    """The address of a server, without what the paths of OpenAI's API begin with. Raises `EyasError` for what is no such address."""
    try:
        parts = urlsplit(url)
        well = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        well = well and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        well = False
    if not well or not url.isprintable() or " " in url:
        raise EyasError(f"{option} {short(url)} is no address of an engine; give one like {EXAMPLE}")
    return url.rstrip("/").removesuffix("/v1")


class Api:
    """A server at a checked address. `key`: what it asks for as a bearer token, if anything; `timeout`: seconds for an answer."""

    def __init__(self, url: str, key: str = "", timeout: float = TIMEOUT) -> None:
        parts = urlsplit(url)
        self.url, self.prefix, self.timeout = url, parts.path, timeout
        self.kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.place = (parts.hostname or "", parts.port)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.closed = threading.Event()
        self.lock, self.under_way = threading.Lock(), set[HTTPConnection]()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers to one request: JSON, or text where it is none. Raises `Unanswered`."""
        where, connection = f"{self.url}{path}", self.kind(*self.place, timeout=self.timeout)
        with self.lock:
            self.under_way.add(connection)
        try:
            if self.closed.is_set():
                raise Unanswered(f"{where} is not asked any more")
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if data is None else "POST", self.prefix + path, data, self.headers)
            reply = connection.getresponse()
            text = reply.read().decode(errors="replace")
        except TimeoutError:
            raise Unanswered(f"{where} did not answer in {self.timeout:g} s", again=True, late=True) from None
        except (OSError, ValueError, HTTPException) as error:
            why = short(str(error) or type(error).__name__)
            raise Unanswered(f"{where} cannot be reached ({why}); give the address of a running engine, as {EXAMPLE}", again=True) from None
        finally:
            with self.lock:
                self.under_way.discard(connection)
            connection.close()
        if reply.status >= 300:
            said = words_of(text) or reply.getheader("Location") or reply.reason
            again = reply.status in LATER
            raise Unanswered(f"{where} answered {reply.status} ({said})", reply.status, again, seconds(reply.getheader("Retry-After")))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def patiently(self, path: str, body: dict[str, Any] | None = None, absent: bool = True) -> Any:
        """The same, asked again where it may be answered later. `absent`: also where nothing answers at all. Raises `Unanswered` after
        `TRIES` tries."""
        spent, pause = 0, PAUSE
        while True:
            try:
                return self.call(path, body)
            except Unanswered as error:
                spent += LATE if error.late else 1
                if not error.again or spent >= TRIES or not (error.status or absent):
                    raise
                wait = max(pause, min(error.wait, LONGEST_WAIT))
            self.closed.wait(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """End every request under way: who waits for one gets `Unanswered`, and no other is begun."""
        self.closed.set()
        with self.lock:
            for connection in self.under_way:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)


def words_of(text: str) -> str:
    """What a server says in the body of an error, in one line."""
    try:
        told = json.loads(text)
        inner = told.get("error", told) if isinstance(told, dict) else told
        said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    except (ValueError, RecursionError):
        said = text
    line = " ".join(str(said or "").split())
    return line if len(line) <= SAID else f"{line[: SAID - 3]}..."


def seconds(header: str | None) -> float:
    """What Retry-After asks for: seconds, or a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    except ValueError:
        return 0.0
