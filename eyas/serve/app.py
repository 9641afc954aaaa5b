"""The paths: requests in, answers out, whole or as they come.

Knows Starlette, the fields, jobs and answers, and the scheduler that it hands them to; knows nothing of decoding.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import eyas
from eyas.config import EyasError, short
from eyas.decode.prompt import render
from eyas.decode.sampling import NOISE_VERSION
from eyas.engine import Engine
from eyas.serve.answers import Answer, sse
from eyas.serve.fields import CHAT, TEXT, is_whole, parsed, read
from eyas.serve.forms import Forms
from eyas.serve.jobs import Ask, Usual, ask, ends_of
from eyas.serve.metrics import Metrics
from eyas.serve.openapi import openapi
from eyas.serve.recording import INDEX, PAGE, PAGE_HEADERS, page_file
from eyas.serve.refusals import Refused, busy, not_found, unavailable
from eyas.serve.scheduler import Job, Piece, Scheduler
from eyas.serve.state import settings_told, slots_told
from eyas.serve.streams import Events, Mailbox, Post, left
from eyas.serve.traces import Trace, Traces
from eyas.serve.watching import MOST_WATCHERS, Rounds, Watcher
from eyas.serve.words import Words

Turns: TypeAlias = "Mailbox[list[Piece] | Exception]"  # what a request's turns bring, or its fault
CALL = re.compile(r"[A-Za-z0-9_.-]{1,100}")  # what a request may call itself
MOST_BYTES = 4 << 20  # of a request's body
PING = 15.0  # seconds without a piece after which a stream says that it lives
BODY_SECONDS = 30.0  # for a request's body to come
OPEN_PATHS = ("/", "/health", "/livez", "/readyz", "/v1/health")  # served without a key
OWN_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # pages of this machine, for `--cors localhost`
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "testserver")


@dataclass(frozen=True)
class Open:
    """A request under way."""

    call: str  # what it goes by
    key: str  # whose it is
    turns: Turns


@dataclass
class Server:
    """What the paths share."""

    engine: Engine
    scheduler: Scheduler
    metrics: Metrics
    usual: Usual
    names: list[str]  # that the model goes by; the first is told
    fingerprint: str
    target_hash: str
    keys: list[str] = field(default_factory=list)
    strict: bool = False  # whether unknown fields are refused
    any_model: bool = False
    hang: float = 30.0  # seconds without a turn after which it counts as dead
    share_prefixes: bool = False  # whether what one key's prompts left serves another's: how fast an answer comes then tells of others
    traces: Traces | None = None
    watch_all: bool = False  # whether the rounds of all requests may be watched at once
    draining: bool = False

    def __post_init__(self) -> None:
        self.words = Words(self.engine.tokenizer)
        config = self.engine.target.config
        self.forms = Forms(self.engine.tokenizer, config.vocab_size, config.eos_token_ids)
        self.rounds = Rounds(lambda token: self.words.text_and_bytes(token)[0], self.watch_all)
        self.to_loop: Post | None = None
        self.open: dict[int, Open] = {}  # by the id of its job

    # ---- generation ----

    async def generate(self, request: Request, kind: str) -> Response:
        values, unknown = read(kind, parsed(await body_of(request)), self.strict)
        self.check_model(values["model"])
        self.check_ready()
        owner = key_of(request.headers) if self.keys and not self.share_prefixes else ""
        asked = await asyncio.to_thread(ask, self.engine, self.forms, kind, values, unknown, self.usual, owner)
        answer = Answer(asked, self.names[0], self.fingerprint, self.words)
        call = call_of(request) or answer.id
        for sequence in asked.sequences:
            sequence.call = call
        turns: Turns = Mailbox(self.post())
        job = Job(asked.sequences, turns.put, asked.stream)
        if asked.traced:
            answer.recorder = self.rounds.record(asked.sequences)
        if not self.scheduler.submit(job):
            self.check_ready()
            raise busy(self.scheduler.most)
        self.open[id(job)] = Open(call, key_of(request.headers), turns)
        headers = {"X-Request-Id": call}
        trace = self.traces and self.traces.request(kind, values, answer.id, request.headers)
        if asked.stream:
            return Events(self.streamed(job, answer, turns), lambda: self.leave(job, trace), headers)
        await self.finished(request, job, turns, trace)
        if failed := failure_of(asked):
            raise failed
        return JSONResponse(answer.whole(), headers=headers)

    def post(self) -> Post:
        """What takes pieces to this event loop."""
        if self.to_loop is None or self.to_loop.loop is not asyncio.get_running_loop():
            self.to_loop = Post()
        return self.to_loop

    async def streamed(self, job: Job, answer: Answer, turns: Turns) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        for chunk in answer.first():
            yield chunk
        left = len(job.sequences)
        while left:
            brought = await turns.read(PING)
            if not brought:
                yield b": ping\n\n"
            for found in brought:
                if isinstance(found, Exception):
                    yield sse(self.fault(found).body(), "error")
                    return
                left -= self.note_ends(job, found)
                if failed := failure_of(answer.ask):
                    yield sse(failed.body(), "error")
                    return
                if chunks := answer.pieces(found):
                    yield b"".join(chunks)
        yield b"".join(answer.end())

    async def finished(self, request: Request, job: Job, turns: Turns, trace: Trace | None) -> None:
        """Wait until all of a job's sequences have ended. Raises `Refused` for a fault, `ClientDisconnect` where the client left."""
        ending, gone = asyncio.ensure_future(self.ended(job, turns)), asyncio.ensure_future(left(request.receive))
        try:
            await asyncio.wait({ending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                raise ClientDisconnect
            ending.result()
        finally:
            self.leave(job, trace)
            ending.cancel()
            gone.cancel()

    async def ended(self, job: Job, turns: Turns) -> None:
        left = len(job.sequences)
        while left:
            for found in await turns.read():
                if isinstance(found, Exception):
                    raise self.fault(found)
                left -= self.note_ends(job, found)

    def note_ends(self, job: Job, found: list[Piece]) -> int:
        ended = [job.sequences[piece.choice] for piece in found if piece.finish_reason]
        for sequence in ended:
            self.metrics.ended(sequence, job.asked)
        return len(ended)

    def leave(self, job: Job, trace: Trace | None) -> None:
        """Nobody waits for a job any more."""
        self.open.pop(id(job), None)
        if trace:
            trace.ended(job)
        if job.open and not self.scheduler.failure:
            sequences = [sequence for sequence in job.sequences if not sequence.finish_reason]
            for sequence in sequences:
                stage = "queued" if sequence.slot < 0 else "prefill" if sequence.read < sequence.prompt_length else "decode"
                self.metrics.aborted.labels(self.metrics.model, stage).inc()
            self.scheduler.cancel(job)

    def fault(self, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, EyasError):
            return unavailable(str(error))
        return Refused(f"the server failed ({type(error).__name__}: {error})", status=500, kind="server_error")

    async def cancel(self, request: Request) -> Response:
        """End the requests of this name, if they are the asker's own."""
        name, key = request.path_params["name"], key_of(request.headers)
        found = [each for each in self.open.values() if each.call == name and self.may_see(key, each.key)]
        if not found:
            raise not_found(f"no request {name} is under way")
        for each in found:
            each.turns.take(Refused("the request was cancelled", kind="request_cancelled"))
        return JSONResponse({"id": name, "cancelled": len(found)})

    def may_see(self, asker: str, owner: str) -> bool:
        """Whether who has one key may see and end what came with another."""
        return not self.keys or hmac.compare_digest(asker.encode(), owner.encode())

    # ---- watching ----

    async def watch(self, request: Request) -> Response:
        """The rounds of one request, or of all, as they end."""
        wanted, draws = request.query_params.get("request", ""), request.query_params.get("draws", "path")
        if wanted != "all" and not CALL.fullmatch(wanted):
            raise Refused("say whose rounds: request=ID, the X-Request-Id that a request is sent with, or request=all", "request")
        if draws not in ("path", "all"):
            raise Refused("draws=path tells the target's draws on the walk's path, draws=all those at every row", "draws")
        if wanted == "all" and not self.rounds.everyone:
            raise Refused("all rounds may be watched on the server's own machine alone", "request", 403, "permission_error")
        watcher = self.rounds.watch(None if wanted == "all" else wanted, draws == "all")
        if watcher is None:
            raise Refused(f"{MOST_WATCHERS} watch already, which is all there may be", status=429, kind="rate_limit_error")
        return Events(self.watched(watcher), lambda: self.rounds.leave(watcher))

    async def watched(self, watcher: Watcher) -> AsyncGenerator[bytes, None]:
        """The events of a watcher, until it leaves or the server ends."""
        yield b": watching\n\n"
        silent = 0
        while not (self.scheduler.failure or (self.draining and self.scheduler.idle)):
            try:
                yield await asyncio.wait_for(watcher.rounds.get(), 1.0)
                silent = 0
            except asyncio.TimeoutError:
                silent += 1
                if silent % PING == 0:
                    yield b": ping\n\n"

    async def page(self, request: Request) -> Response:
        """The page, or a file of it."""
        name = request.path_params.get("name", INDEX)
        if name not in PAGE:
            raise not_found(f"the page has no file {name}")
        return Response(page_file(name), media_type=PAGE[name], headers=PAGE_HEADERS)

    # ---- checks ----

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names and not self.any_model:
            words = f"there is no model {name!r} here; this server has {', '.join(self.names)}"
            raise Refused(words, "model", 404, "not_found_error", "model_not_found")

    def check_ready(self) -> None:
        if why := self.trouble():
            raise unavailable(why)

    def trouble(self) -> str | None:
        """Why nothing can be asked now, if so."""
        if self.scheduler.failure:
            return f"the server has failed ({self.scheduler.failure})"
        if self.draining:
            return "the server is ending"
        if self.scheduler.stuck(self.hang):
            return f"no round has ended for {self.hang:g} seconds"
        return None

    # ---- paths ----

    async def chat(self, request: Request) -> Response:
        return await self.generate(request, CHAT)

    async def completions(self, request: Request) -> Response:
        return await self.generate(request, TEXT)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.model(name) for name in self.names]})

    async def one_model(self, request: Request) -> Response:
        self.check_model(name := request.path_params["name"])
        return JSONResponse(self.model(name))

    def model(self, name: str) -> dict[str, Any]:
        own = {"draft": str(self.engine.draft.name) if self.engine.draft else None, "method": self.usual.method}
        own |= {"precision": self.engine.precision, "system_fingerprint": self.fingerprint}
        own |= {"target_hash": self.target_hash, "noise_version": NOISE_VERSION}
        told = {"id": name, "object": "model", "created": 0, "owned_by": "eyas", "max_model_len": self.scheduler.settings.context}
        return {**told, "eyas": own}

    async def health(self, request: Request) -> Response:
        why = self.trouble()
        return JSONResponse({"status": "error", "reason": why} if why else {"status": "ok"}, 503 if why else 200)

    async def alive(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def props(self, request: Request) -> Response:
        return JSONResponse(settings_told(self.engine, self.scheduler, self.usual, self.names[0], self.fingerprint))

    async def slots(self, request: Request) -> Response:
        """What each slot does; under fail_on_no_slot=1 refused where none is free."""
        key, calls = key_of(request.headers), {each.call: each.key for each in self.open.values()}
        told = slots_told(self.scheduler, self.usual.method != "plain", lambda text: self.may_see(key, calls.get(text.call, "")))
        if request.query_params.get("fail_on_no_slot") == "1" and all(each["is_processing"] for each in told):
            raise unavailable("no slot is free")
        return JSONResponse(told)

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.text(self.scheduler, len(self.rounds.watchers)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def api(self, request: Request) -> Response:
        return JSONResponse(openapi(eyas.__version__))

    async def tokenize(self, request: Request) -> Response:
        given = parsed(await body_of(request))
        if "messages" in given:
            tokens = await asyncio.to_thread(self.engine.encode, read(CHAT, {"messages": given["messages"]})[0]["messages"])
        else:
            text = given.get("content", given.get("prompt"))
            if not isinstance(text, str):
                raise Refused("tokenize takes content or prompt, a string, or messages", "content")
            special = given.get("add_special", given.get("add_special_tokens", False))
            tokens = self.engine.tokenizer(text, add_special_tokens=bool(special))["input_ids"]
        shown = [{"id": token, "piece": self.words.piece(token)} for token in tokens] if given.get("with_pieces") else tokens
        return JSONResponse({"tokens": shown, "count": len(tokens), "max_model_len": self.scheduler.settings.context})

    async def input_tokens(self, request: Request) -> Response:
        """How many tokens a chat's prompt has."""
        values, _ = read(CHAT, parsed(await body_of(request)))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(await asyncio.to_thread(self.rendered, values))})

    def rendered(self, values: dict[str, Any]) -> list[int]:
        """The tokens of a chat's prompt. Raises `Refused` where there is none."""
        if values["messages"] is None:
            raise Refused("messages is missing: the conversation so far", "messages")
        engine, variables = self.engine, values["chat_template_kwargs"]
        return render(engine.tokenizer, values["messages"], False, engine.directory, values["tools"], variables, ends_of(values))

    async def detokenize(self, request: Request) -> Response:
        tokens = parsed(await body_of(request)).get("tokens")
        size = self.engine.target.config.vocab_size
        if not isinstance(tokens, list) or not all(is_whole(each) and 0 <= each < size for each in tokens):
            raise Refused(f"tokens must be a list of token ids below {size}", "tokens")
        text = self.engine.tokenizer.decode(tokens)
        return JSONResponse({"content": text, "prompt": text})

    async def template(self, request: Request) -> Response:
        values, _ = read(CHAT, parsed(await body_of(request)))
        return JSONResponse({"prompt": self.engine.tokenizer.decode(await asyncio.to_thread(self.rendered, values))})


def failure_of(asked: Ask) -> Refused | None:
    """What became of a grammar that gave up; it is this request's own fault, and others go on."""
    for grammar in asked.grammars:
        if grammar.failed:
            return Refused(
                f"the answer's form became too much to follow ({grammar.failed}); make it simpler", status=500, kind="server_error"
            )
    return None


def call_of(request: Request) -> str | None:
    """What a request calls itself, if that can be used."""
    given = request.headers.get("x-request-id", "")
    return given if CALL.fullmatch(given) else None


async def body_of(request: Request) -> bytes:
    """A request's body. Raises `Refused` where it is too large, or says that it is no JSON."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind not in ("application/json", ""):
        raise Refused(f"the body must be JSON, not {short(kind)}; send it with content-type: application/json", status=415)
    try:
        return await asyncio.wait_for(content_of(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(f"the request's body did not come within {BODY_SECONDS:g} seconds", status=408) from None


async def content_of(request: Request) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MOST_BYTES:
            raise Refused(f"the body is larger than {MOST_BYTES} bytes", status=413)
    return bytes(found)


class Gate:
    """Who may come in: a host by which a loopback server is meant, and who has a key. Answers errors that are nobody's else."""

    def __init__(self, app: ASGIApp, server: Server, loopback: bool) -> None:
        self.app, self.server, self.loopback = app, server, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if (refused := self.refusal(scope, headers)) is not None:
            return await refusal_response(refused)(scope, receive, send)
        began = False

        async def noting(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except ClientDisconnect:
            return None
        except Exception as error:
            if began:
                raise
            await refusal_response(self.server.fault(error))(scope, receive, send)

    def refusal(self, scope: Scope, headers: Headers) -> Refused | None:
        host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
        if self.loopback and host and host not in LOOPBACK:
            return Refused(f"this server answers on this machine alone, not as {host}", status=403, kind="permission_error")
        opened = scope["path"] in OPEN_PATHS or scope["path"].startswith("/static/")
        if not self.server.keys or opened or scope["method"] == "OPTIONS":
            return None
        key = key_of(headers)
        if any([hmac.compare_digest(key.encode(), each.encode()) for each in self.server.keys]):  # all compared: none is told by time
            return None
        return Refused(
            "no API key, or a wrong one; send it as a bearer token", status=401, kind="authentication_error", code="invalid_api_key"
        )


def key_of(headers: Headers) -> str:
    """The key that a client sends, if any."""
    given = headers.get("authorization", "")
    return given[7:] if given[:7].lower() == "bearer " else headers.get("x-api-key", "")


def refusal_response(refused: Refused) -> JSONResponse:
    return JSONResponse(refused.body(), refused.status, headers=refused.headers)


def make_app(server: Server, loopback: bool = True, cors: list[str] | None = None) -> Starlette:
    """The application."""
    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/chat/completions": server.chat,
        "/chat/completions/input_tokens": server.input_tokens,
        "/completions": server.completions,
        "/tokenize": server.tokenize,
        "/detokenize": server.detokenize,
        "/apply-template": server.template,
        "/requests/{name}/cancel": server.cancel,
    }
    gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/models": server.models,
        "/models/{name:path}": server.one_model,
        "/health": server.health,
        "/props": server.props,
        "/slots": server.slots,
        "/eyas/rounds": server.watch,
    }
    routes = [Route(prefix + path, call, methods=["POST"]) for path, call in posts.items() for prefix in ("/v1", "")]
    routes += [Route(prefix + path, call) for path, call in gets.items() for prefix in ("/v1", "")]
    routes += [Route("/readyz", server.health), Route("/livez", server.alive), Route("/metrics", server.metrics_page)]
    routes += [Route("/openapi.json", server.api), Route("/", server.page), Route("/static/{name}", server.page)]

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        server.metrics.failures.labels(server.metrics.model, str(error.status)).inc()
        return refusal_response(error)

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, EyasError)
        return await refuse(request, Refused(str(error)))

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            return await refuse(request, not_found(f"eyas serves /v1/chat/completions and /v1/completions; {path} is not served"))
        headers = dict(error.headers or {})
        instead = f"; it takes {headers['Allow']}" if "Allow" in headers else ""
        words = f"{request.method} {path}: {error.detail}{instead}"
        return await refuse(request, Refused(words, status=error.status_code, headers=headers))

    middleware = [Middleware(Gate, server=server, loopback=loopback)]
    if cors:
        own = OWN_ORIGINS if "localhost" in cors else None
        middleware.append(Middleware(CORSMiddleware, allow_origins=cors, allow_origin_regex=own, allow_methods=["*"], allow_headers=["*"]))
    handlers: dict[Any, Any] = {Refused: refuse, EyasError: other, HTTPException: unknown}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
