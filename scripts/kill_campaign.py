"""Kill a run of `eyas train` at random moments, twenty times over, and compare what it ends with to a run that was left alone.

    python scripts/kill_campaign.py --work DIR [--target T] [--tokens N] [--steps N] [--kills 20] [--seed 0] [--more --draft-vocab 200]

Both runs have caches of their own, so each writes its own text. Kills are SIGKILL, after a random time in which a run may be loading,
writing, training, measuring or saving; the same command goes on (with --resume once there is a checkpoint). At the end weights, curve
and shards must be equal, byte for byte (the clock aside). Prints one line a kill, and the verdict as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory for both runs")
    parser.add_argument("--target", help="default: the embedded target")
    parser.add_argument("--tokens", type=int, default=30_000, help="answer tokens for the target to write")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further words for `eyas train`")
    parser.add_argument("--longest", type=float, default=40.0, help="seconds until a kill, at most")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    started = time.monotonic()
    if finish(options, "alone") != 0:
        return 1
    whole = time.monotonic() - started
    print(f"left alone: {whole:.0f} s", flush=True)
    stages: dict[str, int] = {}
    kills = 0
    while kills < options.kills:
        stage, ended = killed_run(options, draw.uniform(2.0, options.longest))
        if ended is not None:
            print(f"the run ended by itself (status {ended}) after {kills} kills; ask for more --tokens or --steps", flush=True)
            return 1
        kills += 1
        stages[stage] = stages.get(stage, 0) + 1
        print(f"kill {kills}: {stage}", flush=True)
    if finish(options, "killed") != 0:
        return 1
    alone, killed = (result(options.work / name) for name in ("alone", "killed"))
    verdict = {name: alone[name] == killed[name] for name in alone}
    print(json.dumps({"kills": kills, "where": stages, "equal": verdict, "seconds": round(time.monotonic() - started)}))
    return 0 if all(verdict.values()) else 1


def command(options: argparse.Namespace, name: str) -> list[str]:
    out = options.work / name / "draft"
    words = [sys.executable, "-m", "eyas", "train", "--out", str(out), "--self-play", str(options.tokens), "--steps", str(options.steps)]
    words += ["--set", "measure_steps=20", "--set", "checkpoint_minutes=0.1"]
    words += ["--target", options.target] if options.target else []
    words += options.more
    return words + (["--resume"] if (out / "checkpoint").exists() else [])


def environment(options: argparse.Namespace, name: str) -> dict[str, str]:
    return {**os.environ, "EYAS_CACHE": str(options.work / name / "cache")}


def finish(options: argparse.Namespace, name: str) -> int:
    (options.work / name).mkdir(exist_ok=True)
    log = (options.work / f"{name}.log").open("a")
    return subprocess.run(command(options, name), env=environment(options, name), stdout=log, stderr=log).returncode


def killed_run(options: argparse.Namespace, seconds: float) -> tuple[str, int | None]:
    """Start, wait, kill: what it was at, and its status if it ended before."""
    (options.work / "killed").mkdir(exist_ok=True)
    log = (options.work / "killed.log").open("a")
    process = subprocess.Popen(command(options, "killed"), env=environment(options, "killed"), stdout=log, stderr=log)
    try:
        return "ended", process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return stage_of(options.work / "killed"), None


def stage_of(work: Path) -> str:
    if (work / "draft" / "checkpoint").exists():
        return "saving" if any((work).glob(".draft.*")) else "training, behind a checkpoint"
    shards = len(list(work.glob("cache/selfplay/*/*.safetensors")))
    return f"before a checkpoint, {shards} shards written"


def result(work: Path) -> dict[str, str]:
    """Hashes of what must be equal."""
    told = json.loads((work / "draft" / "training.json").read_text())
    for point in told["curve"]:
        point.pop("minutes")
    used = [work / "cache" / "selfplay" / place for place in told["data"]["shards"]]
    weights = (work / "draft" / "model.safetensors").read_bytes()
    parts = {
        "weights": weights,
        "curve": json.dumps([told["curve"], told["slots"], told["steps"]]).encode(),
        "shards": b"".join(shard.read_bytes() for shard in used),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
