"""A server on this machine while it is needed: started, waited for, asked, and ended with all that it started.

Needs the standard library only, since it is imported by children in engines' own environments. Knows no engine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ENDING = 60  # seconds that a server has to end by itself


@contextmanager
def server(command: Callable[[int], Sequence[str]], log: Path, patience: float) -> Iterator[str]:
    """The address of what `command` starts at a port, once /health answers there; what it says goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "w") as out:
        process = subprocess.Popen(command(port), stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait(f"http://127.0.0.1:{port}", process, log, patience)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        with suppress(ProcessLookupError):  # its workers, should any have outlived it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(address: str, process: subprocess.Popen[bytes], log: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < until:
        try:
            fetch(f"{address}/health", patience=5)
            return
        except OSError:
            time.sleep(0.5)
    said = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the server did not answer within {patience:.0f} s (exit code {process.poll()}); the end of {log}:\n{said}")


def fetch(address: str, body: dict[str, Any] | None = None, patience: float = 300) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=patience) as reply:
        return reply.read().decode()


def ask(address: str, body: dict[str, Any] | None = None, patience: float = 300) -> dict[str, Any]:
    return json.loads(fetch(address, body, patience))
