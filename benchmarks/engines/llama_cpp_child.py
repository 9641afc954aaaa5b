"""Plain and drafted text by llama-server, one request at a time, with what each round drafted and committed as its log tells it.

    LLAMA_SERVER=.. TARGET_GGUF=.. python llama_cpp_child.py JOB.json RESULT.json

The reply to a request holds token ids and totals; rounds are in the log alone, at verbosity 5 (debug). They are read after the server has
ended, since it writes its log late, and their totals must be those of the replies. Needs the standard library only; knows nothing of eyas.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from local_server import ask, server

# float32 throughout: otherwise the cache of keys and values is float16, and flash attention rounds to its type
EXACT = ("-ctk", "f32", "-ctv", "f32", "-ctkd", "f32", "-ctvd", "f32", "-fa", "off")
CACHE = "cache f16, flash attention auto"
NOTES = {
    "fp32": ["cache f32, no flash attention"],
    "bf16": [CACHE, "one row and several are multiplied by kernels that sum in other orders: text may leave plain text at a near tie"],
    "q4_1": [CACHE],
}
ROOM = 64  # positions behind the longest text, so that drafting never meets the end of the context
START = 120  # seconds of patience
THREADS = "1"  # two wait for one another at every barrier: ten times slower as soon as anything else runs, and speed is no question here

FIRST = re.compile(r"\| n_gen = 1, n_remaining")  # a request's first token, from the prompt's own pass
GUESS = re.compile(r"draft candidate +0, pos +(\d+): +(\d+) ")  # the likeliest token is the one drafted
ROUND = re.compile(r"add accepted tokens: sampled=\d+, ids\.size=(\d+), n_draft=(\d+)")


class Rounds(NamedTuple):
    steps: list[int]  # accepted tokens and the bonus, not yet cut by the text's end
    chains: list[list[int]]  # as many of the drafted tokens as were verified


def command(job: dict[str, Any], chain: int, port: int) -> list[str]:
    """llama-server's; `chain` 0: without the draft."""
    context = max(map(len, job["prompts"])) + job["max_tokens"] + ROOM
    words = [os.environ["LLAMA_SERVER"], "-m", os.environ["TARGET_GGUF"], "--host", "127.0.0.1", "--port", str(port)]
    words += ["-np", "1", "-c", str(context), "-t", THREADS, "-lv", "5", "--log-colors", "off", "--offline", "--cache-ram", "0"]
    if chain:
        words += ["-md", f"{job['draft']}/draft.gguf", "--spec-type", "draft-eagle3", "--spec-draft-n-max", str(chain), "-td", THREADS]
    return words + list(EXACT if job["precision"] == "fp32" else ())


def answers(job: dict[str, Any], chain: int, log: Path) -> list[dict[str, Any]]:
    """The replies to all prompts; each says `tokens`, and in `timings` how many tokens were drafted and accepted."""
    asked = {"n_predict": job["max_tokens"], "temperature": 0, "return_tokens": True, "cache_prompt": False}
    found = []
    with server(lambda port: command(job, chain, port), log, START) as address:
        for prompt in job["prompts"]:
            reply = ask(f"{address}/completion", asked | {"prompt": prompt})
            count, last = len(reply["tokens"]), reply["tokens"][-1]
            assert reply["tokens_evaluated"] == len(prompt) and not reply["truncated"], "the prompt is not what was sent"
            assert count == job["max_tokens"] or last in job["end_ids"], f"ended by token {last}, which is none of the job's end_ids"
            found.append(reply)
    return found


def read_rounds(log: Path) -> list[Rounds]:
    """Of each request, in order."""
    found, chain = [], []
    for line in log.read_text(errors="replace").splitlines():
        if guess := GUESS.search(line):
            chain = [*(chain if int(guess[1]) else []), int(guess[2])]
        elif FIRST.search(line):
            found.append(Rounds([], []))
        elif done := ROUND.search(line):
            found[-1].steps.append(int(done[1]))
            found[-1].chains.append(chain[: int(done[2])])
    return found


def cut(steps: list[int], total: int) -> list[int]:
    """Steps of `total` tokens: less where the answer ended inside the last round, one more where the last token was not drafted for."""
    missing = total - sum(steps)
    if missing == 1:
        return [*steps, 1]
    assert missing <= 0 and (missing == 0 or -missing < steps[-1]), f"{sum(steps)} tokens in rounds, {total} written"
    return [*steps[:-1], steps[-1] + missing] if missing else steps


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    place, chain = Path(sys.argv[2]).parent, job["tree"][0] - 1
    plain = answers(job, 0, place / "plain.txt")
    drafted, rounds = answers(job, chain, place / "drafted.txt"), read_rounds(place / "drafted.txt")
    assert len(rounds) == len(drafted), f"{len(rounds)} requests in the log, {len(drafted)} sent"
    for reply, one in zip(drafted, rounds):
        counted = [sum(map(len, one.chains)), sum(one.steps) - len(one.steps)]
        said = [reply["timings"].get("draft_n", 0), reply["timings"].get("draft_n_accepted", 0)]
        assert counted == said, f"the log tells {counted} drafted and accepted, the reply {said}"
    version = subprocess.run([os.environ["LLAMA_SERVER"], "--version"], capture_output=True, text=True)
    told = {
        "engine": "llama.cpp " + re.search(r"version: .*", version.stdout + version.stderr)[0].removeprefix("version: "),
        "notes": ["one request at a time, no prompt cache", *NOTES[job["precision"]]],
        "plain": [reply["tokens"] for reply in plain],
        "tokens": [reply["tokens"] for reply in drafted],
        "steps": [cut(one.steps, len(reply["tokens"]) - 1) for reply, one in zip(drafted, rounds)],
        "chains": [one.chains for one in rounds],  # a last token that was not drafted for has none
    }
    Path(sys.argv[2]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
