"""An engine for tests: a real HTTP server on this machine whose answers are a tiny target's, in the words of vLLM, of llama.cpp's server,
or of one that knows OpenAI's API alone; and with the faults that servers have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch

from eyas.config import PLAIN, Sampling
from eyas.decode.generate import Decoder
from tests.train.writing import END, template

CUT = 0  # in the place of a status: the connection ends within the answer


class Reply(NamedTuple):
    status: int
    body: Any
    headers: tuple[tuple[str, str], ...] = ()


class Engine:
    """`kind`: vllm, llamacpp, plain (text alone) or chat (no completions). `fault(number, path)`: a reply in place of the right one to the
    number-th request, counted from 1, or None."""

    def __init__(self, target, kind: str = "vllm", fault: Callable[[int, str], Reply | None] = lambda number, path: None) -> None:
        self.target, self.kind, self.fault, self.template = target, kind, fault, template()
        self.models = [{"id": "tiny", "owned_by": kind, "max_model_len": 200}]
        self.says: str | None = None  # this text, in place of the target's
        self.slow = 0.0  # seconds for an answer
        self.gone = threading.Event()  # nobody waits for answers any more
        self.lock = threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.under_way = self.most_under_way = 0

    def reply(self, path: str, body: dict[str, Any] | None) -> Reply:
        with self.lock:
            self.asked.append((path, body or {}))
            number = len(self.asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if (wrong := self.fault(number, path)) is not None:
                return wrong
            page = self.page(path, body or {})
            return Reply(404, {"error": {"message": f"no {path} here"}}) if page is None else Reply(200, page)
        finally:
            with self.lock:
                self.under_way -= 1

    def page(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": self.models}
        if path == "/props" and self.kind == "llamacpp":
            return {"total_slots": 3}
        if path == "/tokenize" and self.kind in ("vllm", "llamacpp"):
            text = body.get("content" if self.kind == "llamacpp" else "prompt") or self.rendered(body["messages"])
            return {"tokens": self.template.tokens(text)}
        if path == "/apply-template" and self.kind == "llamacpp":
            return {"prompt": self.rendered(body["messages"])}
        if path == "/v1/completions" and self.kind != "chat":
            return self.completion(body)
        if path == "/v1/chat/completions":
            tokens = self.template.tokens(self.rendered(body["messages"]))
            said = self.said(tokens, body)
            choice = {"message": {"content": self.template.text_of(said)}, "finish_reason": self.why(said)}
            return {"choices": [choice], "usage": {"prompt_tokens": len(tokens)}}
        return None

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"] if isinstance(body["prompt"], list) else self.template.tokens(body["prompt"])
        said = self.said(prompt, body)
        choice: dict[str, Any] = {"text": self.template.text_of(said), "finish_reason": self.why(said)}
        if self.kind == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = said
        verbose = {"__verbose": {"tokens": said}} if self.kind == "llamacpp" and body.get("verbose") and body.get("return_tokens") else {}
        return {"choices": [choice], **verbose}

    def rendered(self, messages: list[dict[str, str]]) -> str:
        return self.template.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def said(self, prompt: list[int], body: dict[str, Any]) -> list[int]:
        self.gone.wait(self.slow)
        if self.says is not None:
            return [*self.template.tokens(self.says), END][: body["max_tokens"]]
        with self.lock, torch.inference_mode():
            *_, (found,) = Decoder(self.target).run(
                [prompt], PLAIN, Sampling(body.get("temperature", 1.0)), [len(prompt)], body["max_tokens"]
            )
        return found.tokens[len(prompt) :]

    def why(self, said: list[int]) -> str:
        return "stop" if said and said[-1] == END else "length"

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)


@cache
def continued(target, prompt: tuple[int, ...], temperature: float, length: int) -> list[int]:
    with torch.inference_mode():
        *_, (found,) = Decoder(target).run([prompt], PLAIN, Sampling(temperature), [len(prompt)], length)
    return found.tokens[len(prompt) :]


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The address at which an engine answers meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body go in one packet: the second would wait for the first's acknowledgement

        def do_GET(self) -> None:
            self.send(engine.reply(self.path, None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.keys.add(self.headers.get("Authorization"))
            self.send(engine.reply(self.path, body))

        def send(self, reply: Reply) -> None:
            held = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
            self.close_connection = True
            self.send_response(reply.status or 200)
            for header in (("Content-Length", str(len(held) + 9 * (reply.status == CUT))), *reply.headers):
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(held)

        def log_message(self, *words) -> None:
            return None

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            return None  # who asked has gone

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        engine.gone.set()
        server.shutdown()
        server.server_close()
        while engine.under_way:  # a thread within the target's products may not be there when the process ends
            time.sleep(0.01)
