"""A server of ours in a process of its own, for whoever measures it or checks it from outside.

Knows a command line and the address that it tells; knows nothing of what is asked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from eyas.config import EyasError

ADDRESS = re.compile(r"http://[^\s/]+(?=/v1)")
ENDING = 60  # seconds that it has to end by itself


@contextmanager
def serving(*words: str, environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address, as http://HOST:PORT, of `eyas serve` with these options at a free port of this machine, while the block runs. Raises
    `EyasError`, with the server's own words, where it does not start."""
    command = [sys.executable, "-m", "eyas", "serve", "--port", "0", *words]
    said: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(environ or {})) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if told := ADDRESS.search(line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never waits for a reader
                    yield told[0]
                    return
            raise EyasError(f"the server did not start: {' '.join(''.join(said).split())}")
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
