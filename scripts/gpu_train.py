"""Train an EAGLE-3 draft from text that was written before, for so many seconds, on a machine that may be gone at any moment.

    python scripts/gpu_train.py --out FOLDER [--seconds 360] [--batch 4096] [--learning-rate 4e-3] [--warm-up 100] [--device cuda]

`eyas train` runs in .carried/draft, from what scripts/gpu_carry.py unpacked, and saves every `--save-every` seconds and at the end. Each
saved draft (weights in bfloat16, config.json, training.json with the learning curve) is at once laid into FOLDER, in pieces below 16 MiB:
`gpu_carry.py bring FOLDER DIRECTORY` puts the latest whole one together. Called again it goes on from the last checkpoint; a training that
fails is begun anew, once. Prints the curve and the anchors a second, and writes FOLDER/train.json. `--tiny` rehearses all of it on a CPU,
with a random target and random text.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from pieces import split

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".carried"
FILES = ("model.safetensors", "config.json", "training.json")
AGAIN = "draft-again"  # where it is trained anew
MOST = 15 << 20  # bytes of a piece
LOOK = 1.0  # seconds between two looks at what is saved
START, END = 120, 30  # seconds that reading data and target may take before the training, and measuring and saving behind it


def main(words: list[str] | None = None) -> int:
    given = options(words)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.tiny:
        return train(given, given.work or CARRIED)
    with tempfile.TemporaryDirectory(prefix="eyas-tiny-") as scratch:
        work = given.work or Path(scratch)
        tiny_world(work)
        return train(given, work)


def train(given: argparse.Namespace, work: Path) -> int:
    """Train, or go on; where that fails with time left, anew at half the rate and without an induction head. The last one's status."""
    until = time.monotonic() + given.seconds + START + END
    status = 1
    for again in (False, True):
        left = until - time.monotonic() - START - END
        if again and left < given.seconds / 4:
            break
        if again or not (work / AGAIN).exists():
            status = one_training(given, work, again, left, until)
        if status == 0:
            break
        print(f"the training {'at half the rate ' if again else ''}ended with status {status}", flush=True)
    return status


def one_training(given: argparse.Namespace, work: Path, again: bool, seconds: float, until: float) -> int:
    """Run `eyas train`, and lay out whatever is saved meanwhile; its status. At the time `until` it is asked to save and end."""
    draft = work / (AGAIN if again else "draft")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(work / "there" / "site")]), "PYTHONUNBUFFERED": "1"}
    # for the head's products in float32, half of a step's operations: what they read has 8 bits or needs no more than TF32's 11
    environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"
    process = subprocess.Popen(command(given, work, draft, again, seconds), env=environment)
    told, asked = None, False
    try:
        while process.poll() is None:
            time.sleep(LOOK)
            told = lay_out(draft, given.out, told)
            if not asked and time.monotonic() > until:
                process.send_signal(signal.SIGINT)
                asked = True
    finally:
        if process.poll() is None:
            process.kill()
        told = lay_out(draft, given.out, told)
    if told is not None:
        facts = summary(told)
        (given.out / "train.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps({name: value for name, value in facts.items() if name not in ("curve", "settings")}, indent=1), flush=True)
    return process.returncode if told is not None else process.returncode or 1


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the draft is trained (default: .carried; --tiny: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--batch", type=int, default=4096, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warm-up", type=int, default=100, help="steps")
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    parser.add_argument("--measure-every", type=int, default=1000, help="steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", "--quick", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="further settings of eyas train")
    return parser.parse_args(words)


def command(given: argparse.Namespace, work: Path, draft: Path, again: bool, seconds: float) -> list[str]:
    """`eyas train`'s words. Trees are measured afterwards, on a machine that is there for longer; and the time is there to be used, so no
    fall of the measured tau ends the training."""
    texts = sorted(map(str, (work / "there" / "text").iterdir()))
    settings = {
        "tokens_per_batch": given.batch,
        "warmup_steps": given.warm_up,
        "measure_steps": given.measure_every,
        "checkpoint_minutes": given.save_every / 60,
        "tree_every": 0,
        "patience": 0,
    }
    settings |= {"draft_vocab_size": 200, "unroll_steps": 3} if given.tiny else {"induction": str(not again).lower()}
    words = ["train", "--target", work / "there" / "target", "--text", *texts, "--out", draft, "--device", given.device, "--workers", 1]
    words += ["--minutes", seconds / 60, "--learning-rate", given.learning_rate / (2 if again else 1)]
    for setting in [*(f"{name}={value}" for name, value in settings.items()), *given.set]:
        words += ["--set", setting]
    if (apart := work / "there" / "apart").is_dir():
        words += ["--apart", *sorted(apart.iterdir())]
    resumed = ["--resume"] if (draft / "checkpoint").exists() else []
    return [sys.executable, "-m", "eyas", *map(str, words), *resumed]


def lay_out(draft: Path, out: Path, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Lay the saved draft into `out` where it is another than `before`, and print the points of its curve that are new. Returns what its
    training.json says; `before` where nothing was saved since."""
    try:
        files = saved(draft)
    except OSError:  # not saved yet, or another save has just taken its place
        return before
    told = json.loads(files["training.json"])
    if before is not None and told["steps"] == before["steps"]:
        return before
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    split(content.getvalue(), out, "draft", MOST)
    for point in told["curve"][len(before["curve"]) if before else 0 :]:
        print(f"step {point['step']}, {point['slots']} anchors, {point['minutes']:.2f} min: held-out tau {point['tau']:.3f}", flush=True)
    rate = told["slots"] / max(60 * told["minutes"], 1e-9)
    print(f"saved at step {told['steps']}: {told['slots']} anchors, {rate:,.0f} a second", flush=True)
    return told


def saved(draft: Path) -> dict[str, bytes]:
    """The files of one save. A folder is replaced whole, so files that are opened within one folder are of one save."""
    folder = os.open(draft, os.O_RDONLY)
    try:
        found = {}
        for name in FILES:
            with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                found[name] = file.read()
        return found
    finally:
        os.close(folder)


def summary(told: dict[str, Any]) -> dict[str, Any]:
    minutes = max(told["minutes"], 1e-9)
    rates = {"anchors_per_second": round(told["slots"] / minutes / 60), "milliseconds_per_step": round(6e4 * minutes / told["steps"], 2)}
    names = ("steps", "slots", "unrolled", "minutes", "settings", "curve")
    return rates | {"best_tau": max((point["tau"] for point in told["curve"]), default=None)} | {name: told[name] for name in names}


def made_up_target(there: Path, real_shape: bool = False) -> Path:
    """A random target where the real one would lie: a tiny one, or one in the shape of SmolLM2-135M."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import save_tiny_target

    shape = {"num_hidden_layers": 8}
    if real_shape:
        shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        shape |= {"vocab_size": 49152, "max_position_embeddings": 8192, "head_dim": 64}
    return there / "target" if (there / "target").exists() else save_tiny_target(there / "target", **shape)


def tiny_world(work: Path) -> None:
    """A random target, and text of random tokens, where the real ones would lie."""
    there = work / "there"
    if there.exists():
        return
    sys.path.insert(0, str(ROOT))
    import random
    from dataclasses import asdict

    from rich.console import Console

    from eyas.commands.data import own_words
    from eyas.train.build import Studied
    from eyas.train.shards import Counts, Written
    from eyas.train.texts import write_text

    directory = made_up_target(there)
    draw = random.Random(0)
    lengths = [draw.randint(20, 60) for _ in range(120)]
    text = [Written([draw.randrange(250) for _ in range(length)], [-1] * 8 + [0] * (length - 8), 0.0) for length in lengths]
    play = own_words(Studied.at(directory), None, None, Console(stderr=True)).play
    (there / "text").mkdir()
    write_text(text, [asdict(play)], Counts(sum(lengths) - 8 * len(text)), there / "text" / "text.safetensors")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the last save is laid out
    raise SystemExit(main())
