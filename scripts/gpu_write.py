"""Let a target write text for so many seconds on a GPU, for a draft to be trained on.

    python scripts/gpu_write.py --out FOLDER [--seconds 90] [--slots 2048] [--seed 1] [--device cuda]

The target is the one that scripts/gpu_carry.py unpacked, and `prompts.jsonl` beside it, where there is one, holds questions for a fifth of
the conversations. The text goes to .carried/there/text, where scripts/gpu_train.py finds it, and in pieces below 16 MiB into FOLDER (`bring
--text`); FOLDER/write.json says how fast it was written. `--tiny` rehearses it with a random target; `--made-up` with one of random
weights in the shape of SmolLM2-135M, which is as fast as the real one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pieces import split

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CARRIED = ROOT / ".carried"
MOST = 15 << 20  # bytes of a piece
SAID_EVERY = 10.0  # seconds
TEXT = "written.safetensors"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where target and text are (default: .carried; --tiny: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the text; another one than that of text there is")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", "--quick", action="store_true")
    parser.add_argument("--made-up", action="store_true")
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.work or not given.tiny:
        return write(given, given.work or CARRIED)
    with tempfile.TemporaryDirectory(prefix="eyas-tiny-") as scratch:
        return write(given, Path(scratch))


def write(given: argparse.Namespace, work: Path) -> int:
    import torch
    from rich.console import Console

    from eyas.commands.data import own_words
    from eyas.files.target import load_target
    from eyas.train.build import Studied
    from eyas.train.fixed_writer import FixedWriter
    from eyas.train.shards import Counts, Written
    from eyas.train.texts import write_text

    sys.path.insert(0, str(work / "there" / "site"))
    there = work / "there"
    if given.tiny or given.made_up:
        from gpu_train import made_up_target

        made_up_target(there, given.made_up)
        (there / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n} and {n}?"}) + "\n" for n in range(50)))
    prompts = there / "prompts.jsonl"
    words = own_words(Studied.at(there / "target"), str(prompts) if prompts.exists() else None, None, Console(stderr=True))
    play = replace(words.play, seed=given.seed)
    if given.tiny or given.made_up:
        play = replace(play, seeded_share=1.0)  # a random target ends no question
    target = load_target(there / "target", "fp32" if given.device == "cpu" else "bf16", given.device).prepare()
    writer = FixedWriter(target, words.template, play, words.questions, 8 if given.tiny else given.slots)
    found: dict[int, Written] = {}
    answer_tokens = dropped = looped = 0
    began = told = time.monotonic()
    for index, row in until(writer.write(itertools.count()), began + given.seconds):
        if row is None:
            dropped += 1
        else:
            found[index] = Written(row.tokens, row.numbers(), row.start.temperature)
            answer_tokens += sum(map(len, row.answers))
            looped += row.looped
        if (now := time.monotonic()) > told + SAID_EVERY:
            told = now
            print(f"{now - began:.0f} s: {len(found)} conversations, {answer_tokens} answer tokens", flush=True)
    seconds = time.monotonic() - began
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.device != "cpu" else "cpu",
        "slots": given.slots,
        "seconds": round(seconds, 1),
        "conversations": len(found),
        "dropped": dropped,
        "looped": looped,
        "answer_tokens": answer_tokens,
        "answer_tokens_per_second": round(answer_tokens / seconds),
        "tokens": sum(len(written.tokens) for written in found.values()),
    }
    if found:
        (there / "text").mkdir(exist_ok=True)
        file = there / "text" / TEXT
        write_text([found[index] for index in sorted(found)], [asdict(play)], Counts(answer_tokens, dropped, looped), file)
        split(zlib.compress(file.read_bytes(), 6), given.out, "text", MOST)
    (given.out / "write.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1), flush=True)
    return 0 if found else 1


def until(each: Iterator[Any], end: float) -> Iterator[Any]:
    """The items that come before a time."""
    for item in each:
        yield item
        if time.monotonic() > end:
            break


if __name__ == "__main__":
    raise SystemExit(main())
