"""Several processes of one test, forked: importing PyTorch anew in each would take longer than the test."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(count: int, work: Callable[[int], Any]) -> tuple[list[int], list[Connection]]:
    """Process ids, and where each process's result comes from. Each has the environment that `torchrun` would give it."""
    port, ids, ends = free_port(), [], []
    for rank in range(count):
        here, there = Pipe(duplex=False)
        process = os.fork()
        if process == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
            torch.set_num_threads(1)  # its other threads do not survive a fork
            try:
                found = work(rank)
            except BaseException as error:
                found = error
            try:
                there.send_bytes(pickle.dumps(found))
            finally:
                os._exit(0)
        there.close()
        ids.append(process)
        ends.append(here)
    return ids, ends


def result(end: Connection, seconds: float = 200.0) -> Any:
    """What a process found; an error it ended with; None where it was killed."""
    if not end.poll(seconds):
        return TimeoutError("a process neither ended nor answered")
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        return None


def run(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What each of `count` processes found."""
    ids, ends = start(count, work)
    found = [result(end) for end in ends]
    for process in ids:
        os.waitpid(process, 0)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
