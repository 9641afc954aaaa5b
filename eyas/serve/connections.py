"""Connections that hold nothing up: a head that does not come, a reader that does not read, more of them than there is room for.

Knows uvicorn's protocol and clocks; knows nothing of paths or answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from eyas.serve.refusals import Refused

MOST_CONNECTIONS = 512  # at a time; the one that has been idle longest makes room for a new one
HEAD_SECONDS = 30.0  # for a request's head to come
WRITE_SECONDS = 30.0  # in which a client whose buffers are full must read some of them
KEEP_SECONDS = 75  # between two requests


class Connection(H11Protocol):
    """One client's connection."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.head: asyncio.TimerHandle | None = None  # ends a connection whose head does not come
        self.write: asyncio.TimerHandle | None = None  # ends one that is not read
        self.idle_since = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.wait()
        if len(self.connections) > MOST_CONNECTIONS:
            idle = [each for each in self.connections if isinstance(each, Connection) and not each.busy]
            min(idle, key=lambda each: each.idle_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.head, self.write):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy:
            self.stop_waiting()
        else:
            self.wait()

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # refused before its body has come
            self.wait()

    def wait(self) -> None:
        """Begin the time in which something whole must come, if it has not begun: a byte now and then does not begin it anew."""
        if self.head is None and not self.transport.is_closing():
            self.head = self.loop.call_later(HEAD_SECONDS, self.give_up)

    def stop_waiting(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None

    def give_up(self) -> None:
        """The head, or the rest of a body that is refused already, has not come in time."""
        self.head = None
        if self.busy or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.refuse(Refused(f"the request's head did not come within {HEAD_SECONDS:g} seconds", status=408))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(Refused("this is no HTTP request"))

    def refuse(self, refused: Refused) -> None:
        """Answer in place of the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refused.body()).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            head = h11.Response(status_code=refused.status, headers=headers, reason=b"")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.write is None:
            self.write = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write is not None:
            self.write.cancel()
            self.write = None
