"""Claims about the server as a process: real sockets, a real client, signals, and one line where it cannot start."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.tiny import save_tiny_draft, save_tiny_target

QUESTION = [{"role": "user", "content": "How can a hawk see?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("process")
    save_tiny_draft(folder / "draft", save_tiny_target(folder / "target", max_position_embeddings=4096))
    return folder


def command(models: Path, *words: str) -> list[str]:
    named = ["--target", str(models / "target"), "--draft", str(models / "draft"), "--tree", "8x2x3", "--precision", "fp32"]
    return [sys.executable, "-m", "eyas", "serve", *named, *words]


@contextlib.contextmanager
def running(models: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    with subprocess.Popen(command(models, "--port", "0", *words), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = iter(process.stderr.readline, "")
            address = next(found[0] for line in said if (found := re.search(r"http://\S+/v1", line)))
            yield process, openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        finally:
            process.kill()


def test_openais_client_is_answered_whole_and_streamed(models):
    with running(models, "--served-model-name", "hawk") as (_, client):
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
    with running(models) as (process, client):
        thread, found = stream_in_background(client, 400)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert found[-1] == "length" and process.wait(30) == 0


def test_an_end_does_not_wait_for_ever(models):
    with running(models, "--drain", "0.3") as (process, client):
        thread, found = stream_in_background(client, 4000)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert process.wait(30) == 0 and time.monotonic() - began < 20
        assert isinstance(found[-1], openai.APIError) and "ending" in str(found[-1])


def test_a_second_signal_ends_at_once(models):
    with running(models, "--drain", "600") as (process, client):
        thread, found = stream_in_background(client, 4000)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        thread.join(60)
        assert process.wait(30) == 0 and isinstance(found[-1], openai.APIError)


def test_a_client_that_leaves_frees_its_slot(models):
    with running(models, "--slots", "1", "--queue", "0") as (_, client):
        for _ in range(3):
            answer = client.chat.completions.create(
                model="target", messages=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(answer))
            answer.close()
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    client.chat.completions.create(model="target", messages=QUESTION, max_tokens=2)
                    break
                except openai.RateLimitError:
                    time.sleep(0.05)
            else:
                pytest.fail("the slot was not freed")


def test_a_port_in_use_and_bad_options_are_one_line(models):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = subprocess.run(command(models, "--port", port), capture_output=True, text=True, timeout=60)
        assert told.returncode == 2 and told.stderr.startswith(f"eyas: cannot listen at 127.0.0.1, port {port} (")
        assert told.stderr.count("\n") == 1
    for words, said in ((["--slots", "0"], "--slots must be at least 1"), (["--stall", "0"], "--stall must be above 0 seconds")):
        told = subprocess.run(command(models, "--port", "0", *words), capture_output=True, text=True, timeout=60)
        assert told.returncode == 2 and said in told.stderr
