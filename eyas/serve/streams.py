"""What a turn brought, from the thread that decodes to whoever waits for it on the event loop, and from there to the client.

Knows the event loop and Starlette's responses; knows nothing of what is told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

EVENTS, NOT_KEPT = "text/event-stream", {"Cache-Control": "no-cache"}
Told = TypeVar("Told")


class Post:
    """Takes what is told to the event loop: all that a turn brings wakes it once."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.letters: deque[Callable[[], None]] = deque()
        self.on_its_way = False

    def send(self, letter: Callable[[], None]) -> None:
        """Have `letter` called on the loop; from one other thread."""
        self.letters.append(letter)
        if not self.on_its_way:
            self.on_its_way = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all who waited on it
                self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        self.on_its_way = False  # before the letters are taken: one that comes meanwhile wakes the loop again
        while self.letters:
            self.letters.popleft()()


class Mailbox(Generic[Told]):
    """What was told one request and is not read yet. Made and read on the event loop."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.found: list[Told] = []
        self.waiting: asyncio.Future[None] | None = None

    def put(self, told: Told) -> None:
        """From the thread that decodes."""
        self.post.send(lambda: self.take(told))

    def take(self, told: Told) -> None:
        self.found.append(told)
        self.wake()

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)

    async def read(self, seconds: float | None = None) -> list[Told]:
        """All that was told since the last call, at least one; none where nothing came for so many seconds."""
        if not self.found:
            self.waiting = self.post.loop.create_future()
            silence = None if seconds is None else self.post.loop.call_later(seconds, self.wake)
            try:
                await self.waiting
            finally:
                if silence is not None:
                    silence.cancel()
        found, self.found = self.found, []
        return found


class Events(Response):
    """A stream of server-sent events. When it ends, by itself or because the client left, `over` is called."""

    media_type = EVENTS

    def __init__(self, chunks: AsyncGenerator[bytes, None], over: Callable[[], None], headers: dict[str, str] | None = None) -> None:
        self.chunks, self.over = chunks, over
        self.status_code, self.background = 200, None
        self.init_headers({**(headers or {}), **NOT_KEPT})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, leaving = asyncio.ensure_future(self.sent(send)), asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.over()
            sending.cancel()
            leaving.cancel()
            await asyncio.wait({sending, leaving})
            await self.chunks.aclose()
        if not sending.cancelled():
            sending.result()

    async def sent(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
