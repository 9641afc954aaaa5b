"""Trained answer tokens a second: eyas' trainer against speculators' EAGLE-3 trainer, the same model, data, unroll and threads, in turns.

    python benchmarks/engines/against_speculators.py --shards DIR [--conversations 48] [--rounds 2] [--out F.json]

speculators pins its own dependencies, so it runs as a child in an environment of its own (made once, as run_speculators.py's is). Some
conversations of self-written shards are handed to both. Theirs are converted into what speculators trains on and pass its own dataset,
collator, sampler, model, optimisers and `Trainer.train_epoch`. First the child tries what it offers (precisions, attentions, optimisers,
lengths of a packed row) and keeps the fastest, plain and, where that works, compiled; then all train on every conversation once a turn, in
turns. Ours runs three times a turn: as `eyas train` does by default, with every slot at every step, and with every token of the draft
vocabulary in the loss besides. The last does what theirs does. With our weights in their network, the mean loss of every unroll step is
compared on one conversation.

Prints one JSON object; `differs` names what is not the same. Slots are places of an answer that count at step 0, slot-steps their sum
over steps. What goes on is told on the standard error. Other work on the machine slows both, not always alike: `load_averages` and the
slots a second of processor time say how far to trust a run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from harness import HERE
from our_trainer import Ours, hand_over
from run_speculators import INSTALLS
from turns import THREADS, Turn, Variant

from eyas import __version__
from eyas.bench.environments import environment
from eyas.config import TrainSettings
from eyas.files.target import target_directory
from eyas.train.features import Example, shard_examples
from eyas.train.shards import PATTERN

TOLERANCE = 2e-3  # of a step's mean loss, relative: shards hold bfloat16, and products are summed in other orders
DIFFERS = (
    "speculators' Trainer cannot run without an accelerator (it moves the model to device 0): a subclass sets its device to the CPU, "
    "its train_epoch runs unchanged",
    "speculators compiles its forward pass only where there is CUDA: on a CPU it is plain PyTorch; compiled by hand is tried as well",
    "speculators' default optimiser is Muon, whose bfloat16 products are slow on a CPU without them: timed is the faster of it and AdamW",
    "speculators' default flex attention has no backward pass on a CPU and its default fused losses need Triton: timed are its sdpa or "
    "eager attention (a dense mask [T, 7T]) and its eager loss, both its own options",
    "speculators keeps the draft's head frozen at the target's, we train it: two products of the head a row there, three here",
    "speculators packs conversations into a row of fixed length and pads it; we lay them end to end for each of two "
    "workers. Where longer rows than our batches are faster there, they are taken: fewer steps of the optimiser for as many slots",
    "speculators passes every token of a row, prompts and padding included, through every step and the head; we only slots that count",
    "at step i speculators counts slot j if t_{j+1+i} counts, so also slots that begin before the answer; we count it only if t_{j+1} and "
    "t_{j+2+i} lie in one answer. The mask it is given makes step 0 the same on both sides",
    "loss: speculators' default is KL(target | draft) over the draft vocabulary, ours its cross-entropy: they differ by the target's "
    "entropy, a constant; ours adds nothing where the target's likeliest is outside the draft vocabulary; steps weigh 1 there, 0.55^i here",
    "speculators normalises the target's last hidden state itself; shards hold it normalised, so it is divided by the norm's weight first",
    "speculators' defaults norm_before_residual, norm_before_fc, norm_output and its sliding window are off: the network is the paper's, "
    "as ours is",
    "timed steps of speculators begin with batches in memory; ours read their shards",
    "speculators' steps compute accuracies as well (its trainer always does)",
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Child:
    """The other interpreter, waiting for questions."""

    def __init__(self, python: Path, *arguments: str) -> None:
        environment = {**os.environ, "LOGURU_LEVEL": "ERROR", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [str(python), str(HERE / "speculators_trainer_child.py"), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("speculators' side ended; its message is above")
        return json.loads(line)

    def must(self, do: str, **given: Any) -> dict[str, Any]:
        told = self.ask(do, **given)
        if "error" in told:
            raise SystemExit(f"speculators' side failed to {do}: {told['error']}")
        return told

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate()


def fastest(child: Child, rows: Sequence[int]) -> tuple[list[Variant], dict[str, Any]]:
    """Of what speculators offers, what is fastest here, one choice after the other; the same compiled, where that works."""
    tried: dict[str, Any] = {}

    def rate(variant: Variant) -> float:
        if variant.name not in tried:
            so_far = max((rate for rate in tried.values() if isinstance(rate, float)), default=0.0)
            told = child.ask("probe", variant=asdict(variant), hopeless=so_far / 3)
            tried[variant.name] = told.get("error") or round(told["slots_per_second"], 2)
            say(f"speculators, {variant.name}: {tried[variant.name]}")
        return tried[variant.name] if isinstance(tried[variant.name], float) else 0.0

    best = Variant(row=rows[0])
    for name, values in {
        "attention": ("sdpa", "eager", "simple_flex_attention"),
        "row": rows,
        "optimizer": ("adamw", "muon"),
        "dtype": ("float32", "bfloat16"),
    }.items():
        best = max((replace(best, **{name: value}) for value in values), key=rate)
    if rate(best) == 0:
        raise SystemExit("speculators could not train in any of these ways")
    compiled = replace(best, compiled=True)
    return [best, compiled] if rate(compiled) else [best], tried


def compare(ours: Ours, child: Child, chosen: Example) -> dict[str, Any]:
    """Mean losses by step on one conversation, theirs with our weights."""
    found, _, counted, outside = ours.losses(chosen)
    told = child.must("check")
    apart = max(abs(one - other) / abs(one) for one, other in zip(found, told["our_slots"]))
    return {
        "kl_by_step_ours": rounded(found),
        "kl_by_step_theirs_on_our_slots": rounded(told["our_slots"]),
        "largest_relative_difference": apart,
        "same": apart < TOLERANCE,
        "kl_by_step_theirs_on_its_slots": rounded(told["own_slots"]),
        "slots_by_step_ours": counted.tolist(),
        "slots_by_step_theirs": told["own_slots_by_step"],
        "slots_that_add_nothing_in_ours": outside,
    }


def rounded(values: Sequence[float], digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values]


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "slots_per_second": rounded([turn.slots / turn.seconds for turn in turns], 1),
        "slot_steps_per_second": rounded([turn.slot_steps / turn.seconds for turn in turns], 1),
        "slots_per_cpu_second": rounded([turn.slots / turn.cpu_seconds for turn in turns], 1),
        "seconds": rounded([turn.seconds for turn in turns], 1),
        "slots": turns[0].slots,
        "slot_steps": turns[0].slot_steps,
        "optimiser_steps": turns[0].steps,
    }


def ratios(ours: Sequence[Turn], theirs: Sequence[Turn], counted: Callable[[Turn], int]) -> dict[str, Any]:
    """Ours over theirs, of all turns and turn by turn."""

    def rate(turns: Sequence[Turn]) -> float:
        return sum(map(counted, turns)) / sum(turn.seconds for turn in turns)

    return {"all": round(rate(ours) / rate(theirs), 2), "by_turn": rounded([rate([a]) / rate([b]) for a, b in zip(ours, theirs)], 2)}


def against(turns: dict[str, list[Turn]], theirs: dict[str, list[Turn]], counted: Callable[[Turn], int]) -> dict[str, Any]:
    return {other: {name: ratios(held, held_there, counted) for name, held in turns.items()} for other, held_there in theirs.items()}


def settings_to_try(settings: TrainSettings) -> dict[str, TrainSettings]:
    every = replace(settings, step_keep=1.0)
    return {"default": settings, "step_keep=1": every, "step_keep=1, sampled_columns=0": replace(every, sampled_columns=0)}


def raced(sides: dict[str, Ours], child: Child, variants: Sequence[Variant], rounds: int) -> tuple[dict[str, list[Turn]], dict[str, Any]]:
    """Everybody's turns, and what the child tells of its own contestants."""
    told = {variant.name: child.must("choose", variant=asdict(variant)) for variant in variants}
    turns: dict[str, list[Turn]] = {name: [] for name in [*sides, *told]}
    for number in range(rounds):
        for name in turns:
            turn = sides[name].turn() if name in sides else Turn(**child.must("turn", name=name))
            turns[name].append(turn)
            say(f"turn {number + 1}, {name}: {turn.slots / turn.seconds:.1f} slots/s, load {os.getloadavg()[0]:.1f}")
    if len({turn.slots for held in turns.values() for turn in held}) > 1:
        raise SystemExit("the two did not train the same slots")
    return turns, told


def figures(turns: dict[str, list[Turn]], told: dict[str, Any]) -> dict[str, Any]:
    theirs = {name: turns.pop(name) for name in told}
    return {
        "ours": {name: summary(held) for name, held in turns.items()},
        "theirs": {name: summary(held) | told[name] for name, held in theirs.items()},
        "times_the_slots": against(turns, theirs, lambda turn: turn.slots),
        "times_the_slot_steps": against(turns, theirs, lambda turn: turn.slot_steps),
    }


def conditions(examples: Sequence[Example], settings: TrainSettings) -> dict[str, Any]:
    return {
        "conversations": len(examples),
        "tokens": sum(len(example.tokens) for example in examples),
        "longest": max(len(example.tokens) for example in examples),
        "unroll_steps": settings.unroll_steps,
        "draft_vocab_size": settings.draft_vocab_size,
        "tokens_per_batch": settings.tokens_per_batch,
        "sampled_columns": settings.sampled_columns,
        "threads": THREADS,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--target")
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--rows", type=int, nargs="+", default=[640, 1280], help="lengths of speculators' packed rows to try")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    python = environment("speculators", INSTALLS)
    torch.set_num_threads(THREADS)
    load = [os.getloadavg()]
    directory, settings = target_directory(given.target), replace(TrainSettings(), max_length=given.longest)
    everything = shard_examples(sorted(given.shards.expanduser().glob(PATTERN)), given.longest)
    examples = everything[: given.conversations]
    chosen = next((number for number, example in enumerate(examples) if len(example.tokens) >= 200), 0)
    sides = {name: Ours(directory, examples, everything, one) for name, one in settings_to_try(settings).items()}
    like_theirs = sides["step_keep=1, sampled_columns=0"]
    with tempfile.TemporaryDirectory() as folder:
        hand_over(Path(folder), like_theirs, examples, examples[chosen])
        child = Child(python, folder, str(directory), str(settings.unroll_steps), str(chosen))
        try:
            versions = child.must("versions")
            check = compare(like_theirs, child, examples[chosen])
            say(f"losses by step agree within {check['largest_relative_difference']:.1e}")
            variants, tried = fastest(child, given.rows)
            turns, told = raced(sides, child, variants, given.rounds)
        finally:
            child.end()
    load.append(os.getloadavg())
    found = {**conditions(examples, settings), **figures(turns, told), "check": check, "tried": tried}
    found["versions"] = {"eyas": __version__, "torch": torch.__version__, "python": platform.python_version(), "theirs": versions}
    found["cpu"] = {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), "load_averages": load}
    text = json.dumps(found | {"differs": DIFFERS})
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
