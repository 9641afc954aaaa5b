"""What a request may be refused with: one line, and what OpenAI's clients read beside it.

Knows words and numbers; knows nothing of HTTP libraries.
"""

from __future__ import annotations

from typing import Any

from eyas.config import EyasError


class Refused(EyasError):
    """A request that is not served, in OpenAI's terms. `status`: HTTP's; `param`: the field at fault, if it is one."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        more: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.kind, self.code = param, status, kind, code
        self.more, self.headers = more or {}, headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**told, **self.more}}


def not_found(what: str) -> Refused:
    return Refused(what, status=404, kind="not_found_error")


def busy(at_most: int) -> Refused:
    """The queue is full."""
    words = f"the server has {at_most} requests in hand, which is all it takes; try again soon"
    return Refused(words, status=429, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "1"})


def unavailable(why: str) -> Refused:
    """The server is loading, draining or dead."""
    return Refused(why, status=503, kind="service_unavailable_error", headers={"Retry-After": "5"})
