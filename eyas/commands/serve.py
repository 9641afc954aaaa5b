"""`eyas serve`: answers OpenAI's clients on this machine, many at a time, with the draft underneath."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import eyas
from eyas import launched
from eyas.commands.common import engine_from, method_from
from eyas.config import EyasError, Request, Sampling, TreeShape
from eyas.decode.plan.planner import MAX_TREE
from eyas.decode.sampling import NOISE_VERSION
from eyas.engine import Engine
from eyas.files.disk import directory_hash
from eyas.files.target import reading_hash
from eyas.kernels import native
from eyas.kernels.linear import capability
from eyas.methods import COPY
from eyas.model.exactness import why_texts_may_part
from eyas.parallel.target import ShardedTarget

if TYPE_CHECKING:
    import uvicorn

    from eyas.decode.sequence import RoundRecord
    from eyas.serve.app import Server

KEYS = "EYAS_API_KEYS"  # of the environment: keys with commas between them
USUAL_CONTEXT = 4096  # tokens of a prompt and its answer, where the model has more and nothing is said
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FAILED = 1
LAST_TURN_SECONDS = 5  # for the thread that decodes to end
GONE_SECONDS = 60  # without a sign from the other side after which a connection's client counts as gone


def run(options: argparse.Namespace) -> int:
    try:
        import prometheus_client
        import starlette
        import uvicorn
    except ImportError as error:
        raise EyasError(f"serving needs {error.name}: pip install 'eyas[serve]'") from None
    del prometheus_client, starlette, uvicorn
    check(options)
    launched.patience = options.drain
    listening = bound(options.host, options.port) if launched.rank() == 0 else None  # before a model is loaded
    engine = engine_from(options)
    assert listening is not None, "the other processes follow the first one's passes until it ends"
    server = server_of(engine, options)
    keep_plans(engine)  # what passes cost, timed just now where nothing was known
    try:
        return asyncio.run(served(server, listening, options))
    finally:
        server.scheduler.thread.join(LAST_TURN_SECONDS)
        if not server.scheduler.thread.is_alive():
            keep_plans(engine)


def keep_plans(engine: Engine) -> None:
    """Keep what planners have learned for the next start."""
    if engine.plans:
        engine.plans.save()


def check(options: argparse.Namespace) -> None:
    """Raise `EyasError` for options that cannot be."""
    for name, least in (("slots", 1), ("queue", 0)):
        if getattr(options, name) < least:
            raise EyasError(f"--{name} must be at least {least}, not {getattr(options, name)}")
    if options.context is not None and options.context < 2:
        raise EyasError(f"--context must be at least 2, not {options.context}")
    for name in ("stall", "drain", "hang_seconds"):
        if not getattr(options, name) > 0:
            raise EyasError(f"--{name.replace('_', '-')} must be above 0 seconds, not {getattr(options, name)}")
    if options.host not in LOOPBACK and not keys_of(options):
        print(f"eyas: anybody who reaches {options.host} may use this server; --api-key asks for a key", file=sys.stderr)


def keys_of(options: argparse.Namespace) -> list[str]:
    return [*options.api_key, *filter(None, os.environ.get(KEYS, "").split(","))]


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `EyasError` where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        words = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error  # Python's own tells the address again
        raise EyasError(f"cannot listen at {host}, port {port} ({words}); choose another --port or --host") from None
    watch_for_the_gone(listening)
    return listening


def watch_for_the_gone(listening: socket.socket) -> None:
    """Have the system end connections whose other side has vanished, or has not read for long, where it can."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", GONE_SECONDS), ("TCP_USER_TIMEOUT", 1000 * GONE_SECONDS)):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def server_of(engine: Engine, options: argparse.Namespace) -> Server:
    from eyas.serve.app import Server
    from eyas.serve.jobs import MOST_CHILDREN, Usual
    from eyas.serve.metrics import Metrics
    from eyas.serve.scheduler import Scheduler, Settings
    from eyas.serve.traces import Traces

    method = method_from(options) or engine.default_method
    request = Request(method=method, copy=options.copy, tree=options.tree, sampling=Sampling(temperature=1.0))
    if engine.copies(request) and not method.endswith(COPY):
        method += COPY
    most = engine.target.config.max_position_embeddings
    context = min(options.context or USUAL_CONTEXT, most)
    names = options.served_model_name or [engine.directory.name]
    metrics = Metrics(names[0], options.metrics_prefix)
    decoder = engine.decoder(request)
    decoder.lower = "lower --slots, --context or --tree"
    shape = engine.shape(options.tree, method)
    shapes = {shape, TreeShape(MAX_TREE.nodes, MAX_TREE.depth, MOST_CHILDREN)} if method != "plain" else {shape}
    keeps = options.prefix_cache if options.prefix_cache is not None else engine.target.rows_stand_alone
    metrics.about(version=eyas.__version__, precision=engine.precision, method=method, draft=engine.draft.name if engine.draft else "")
    scheduler = Scheduler(decoder, shapes, Settings(options.slots, context, options.queue, keeps, options.stall))
    weights = directory_hash(engine.directory)
    server = Server(
        engine,
        scheduler,
        metrics,
        Usual(method, context, options.tree),
        names,
        fingerprint(engine, weights),
        weights,
        keys_of(options),
        options.strict_fields,
        options.any_model,
        options.hang_seconds,
        options.share_prefixes,
        Traces(names[0]) if options.traces else None,
        watch_all=options.host in LOOPBACK,
    )

    def watch(record: RoundRecord) -> None:
        metrics.round(record)
        server.rounds.heard(record, decoder)

    decoder.watch = watch
    return server


def fingerprint(engine: Engine, weights: str) -> str:
    """What settles the bytes of an answer beside the request: weights (their hash), tokenizer, precision, noise, and the kernel that
    computes; neither draft nor trees, neither batch nor order."""
    told: dict[str, Any] = {
        "eyas": eyas.__version__,
        "target": weights,
        "read": reading_hash(engine.directory),
        "precision": engine.precision,
        "noise": NOISE_VERSION,
        "device": str(engine.target.device),
        "kernel": [native.kernel() is not None, capability()],
    }
    if isinstance(engine.target, ShardedTarget):
        told["shards"] = engine.target.arrangement if engine.target.together else str(engine.target.layout)
    return "fp_" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def http_of(server: Server, options: argparse.Namespace) -> uvicorn.Server:
    """What speaks HTTP for a server. Signals are not its business."""
    import uvicorn

    from eyas.serve.app import make_app
    from eyas.serve.connections import KEEP_SECONDS, Connection

    app = make_app(server, options.host in LOOPBACK, options.cors)
    log = {"log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, http=Connection, ws="none", timeout_keep_alive=KEEP_SECONDS, lifespan="off", **log)
    http = uvicorn.Server(config)
    http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]  (its own would give the signal back at the end)
    return http


async def served(server: Server, listening: socket.socket, options: argparse.Namespace) -> int:
    """Serve until a signal, or until the thread that decodes has failed; the exit status."""
    http = http_of(server, options)
    signals = asyncio.Queue[int]()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    if why := why_texts_may_part(server.engine.target):
        print(f"eyas: other requests may change an answer's rounding: {why}", file=sys.stderr)
    server.scheduler.start()
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"eyas serves {server.names[0]} with {server.usual.method} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    status = await until_the_end(server, serving, signals, options.drain)
    http.should_exit = True
    server.scheduler.stop()
    for seconds in (5, 1):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), seconds)
        for connection in list(http.server_state.connections):  # of clients that have not sent all, or do not read
            connection.transport.abort()
    http.force_exit = True
    await serving
    return status


async def until_the_end(server: Server, serving: asyncio.Task[None], signals: asyncio.Queue[int], drain: float) -> int:
    """Wait for a signal, then for what is under way, but no longer than `drain` seconds and until a second signal."""
    scheduler, deadline = server.scheduler, None
    loop = asyncio.get_running_loop()
    while not serving.done():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(signals.get(), 0.2)
            if deadline is not None:
                break
            deadline, server.draining = loop.time() + drain, True
            scheduler.drain()
        if scheduler.failure:
            print(f"eyas: the server has failed: {type(scheduler.failure).__name__}: {scheduler.failure}", file=sys.stderr)
            return FAILED
        if deadline is not None and (scheduler.idle or loop.time() > deadline):
            break
    return 0
