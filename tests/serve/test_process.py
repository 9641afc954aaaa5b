"""Claims about the server as a process: real sockets, a real client, signals, and one line where it cannot start."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import openai
import pytest

from eyas import cli
from tests.parallel import processes
from tests.tiny import save_tiny_draft, save_tiny_target

QUESTION = [{"role": "user", "content": "How can a hawk see?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("process")
    save_tiny_draft(folder / "draft", save_tiny_target(folder / "target", max_position_embeddings=4096))
    return folder


def command(models: Path, *words: str) -> list[str]:
    named = ["--target", str(models / "target"), "--draft", str(models / "draft"), "--tree", "8x2x3", "--precision", "fp32"]
    return ["serve", *named, *words]


def client_at(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(models) -> Iterator[openai.OpenAI]:
    """A client of a server that was started from a shell: one slot, and no room to wait."""
    words = command(models, "--port", "0", "--served-model-name", "hawk", "--slots", "1", "--queue", "0")
    with subprocess.Popen([sys.executable, "-m", "eyas", *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield client_at(next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/v1", line))))
        finally:
            process.kill()


@dataclass
class Running:
    """A server in a process of its own, which a fork of this one is; what it ends with comes through `end`."""

    process: int
    end: Connection
    client: openai.OpenAI

    def signal(self, number: int) -> None:
        os.kill(self.process, number)

    def status(self) -> int:
        return processes.result(self.end, 30)


@contextlib.contextmanager
def running(models: Path, *words: str) -> Iterator[Running]:
    port = processes.free_port()
    (process,), (end,) = processes.start(1, lambda _: cli.main(command(models, "--port", str(port), *words)))
    client, until = client_at(f"http://127.0.0.1:{port}/v1"), time.monotonic() + 60
    try:
        while time.monotonic() < until:
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(0.05)
        yield Running(process, end, client)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_openais_client_is_answered_whole_and_streamed(client):
    assert [each.id for each in client.models.list()] == ["hawk"]
    settings = {"model": "hawk", "messages": QUESTION, "max_tokens": 30, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**settings)
    pieces = [each.choices[0].delta.content or "" for each in client.chat.completions.create(**settings, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 4
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    text = client.completions.create(model="hawk", prompt="a hawk", max_tokens=8, seed=1, echo=True).choices[0].text
    assert text.startswith("a hawk")
    with pytest.raises(openai.BadRequestError, match="temperature must be from 0 to 2"):
        client.chat.completions.create(model="hawk", messages=QUESTION, temperature=7)
    with pytest.raises(openai.NotFoundError, match="there is no model 'owl' here"):
        client.chat.completions.create(model="owl", messages=QUESTION)


def stream_in_background(client: openai.OpenAI, tokens: int) -> tuple[threading.Thread, list]:
    """A stream under way, and what comes of it: pieces, then the reason of its end or an error."""
    found: list = []

    def read() -> None:
        try:
            more = {"extra_body": {"ignore_eos": True}}
            for each in client.chat.completions.create(model="target", messages=QUESTION, max_tokens=tokens, stream=True, **more):
                found.append(each.choices[0].finish_reason or each.choices[0].delta.content)
        except openai.APIError as error:
            found.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    until = time.monotonic() + 60
    while len(found) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    return thread, found


def test_a_polite_end_lets_answers_finish(models):
    with running(models) as server:
        thread, found = stream_in_background(server.client, 150)
        server.signal(signal.SIGTERM)
        thread.join(60)
        assert found[-1] == "length" and server.status() == 0


def test_an_end_does_not_wait_for_ever(models):
    with running(models, "--drain", "0.3") as server:
        thread, found = stream_in_background(server.client, 4000)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        thread.join(60)
        assert server.status() == 0 and time.monotonic() - began < 20
        assert isinstance(found[-1], openai.APIError) and "ending" in str(found[-1])


def test_a_second_signal_ends_at_once(models):
    with running(models, "--drain", "600") as server:
        thread, found = stream_in_background(server.client, 4000)
        for _ in range(2):
            server.signal(signal.SIGINT)
            time.sleep(0.5)
        thread.join(60)
        assert server.status() == 0 and isinstance(found[-1], openai.APIError)


def test_a_client_that_leaves_frees_its_slot(client):
    for _ in range(3):
        more = {"extra_body": {"ignore_eos": True}}
        answer = client.chat.completions.create(model="hawk", messages=QUESTION, max_tokens=4000, stream=True, **more)
        next(iter(answer))
        answer.close()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                client.chat.completions.create(model="hawk", messages=QUESTION, max_tokens=2)
                break
            except openai.RateLimitError:
                time.sleep(0.05)
        else:
            pytest.fail("the slot was not freed")


def test_a_port_in_use_and_bad_options_are_one_line(models, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(command(models, "--port", port)) == 2
        said = capsys.readouterr().err
        assert said == f"eyas: cannot listen at 127.0.0.1, port {port} (Address already in use); choose another --port or --host\n"
    for words, told in ((["--slots", "0"], "--slots must be at least 1"), (["--stall", "0"], "--stall must be above 0 seconds")):
        assert cli.main(command(models, "--port", "0", *words)) == 2 and told in capsys.readouterr().err
    assert cli.main(command(models, "--port", "0", "--slots", "10000000")) == 2
    assert capsys.readouterr().err.endswith("lower --slots, --context or --tree\n")
