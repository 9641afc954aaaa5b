"""A target split over processes reads what it reads whole, each process holds its share of it, and the draft trained beside is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed.fsdp  # before the processes are forked

from eyas.commands.parser import parser
from eyas.commands.train import run
from eyas.config import EyasError, TrainSettings
from eyas.files.target import load_target
from eyas.model.adapter import AdaptedTarget, decoder_layers
from eyas.train.build import Setup, build
from eyas.train.features import Example, KeptStates, TargetStates
from eyas.train.parallel import Ranks
from eyas.train.split import FILLER, SplitStates, load_split, mesh_on, split
from tests.model.test_adapter import save
from tests.parallel import processes
from tests.tiny import save_tiny_target

TAPS = (1, 2, 4)
FAMILIES = ["own", "gemma3", "gpt2", "gpt_oss", "gemma4"]  # windows, biases, experts and sinks, layers that share keys
WORD = [(5 * i * i + 3 * i + 11) % 61 for i in range(80)]
SETTINGS = TrainSettings(unroll_steps=3, draft_vocab_size=40, tokens_per_batch=60, learning_rate=3e-3, products="fp32")


def texts(*lengths: int) -> list[Example]:
    return [Example(WORD[number : number + length], [-1, -1, *[0] * (length - 2)]) for number, length in enumerate(lengths)]


def saved(family: str, directory: Path) -> Path:
    return save_tiny_target(directory) if family == "own" else save(family, directory)


def inside(count: int, work):
    """What each of several processes that have met finds; each has one thread, as the whole target has where it is compared with."""

    def met(rank: int):
        ranks = Ranks.join()
        found = work(ranks)
        ranks.leave()
        return found

    return processes.run(count, met)


def same(ones, others) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [2, 3])
def test_each_process_reads_texts_of_its_own_to_the_last_bit_and_holds_its_share_of_the_layers(family, count, threads):
    threads(1)
    examples = texts(24, 9, 17, 5, 30)
    with TemporaryDirectory() as directory:
        whole = load_target(saved(family, Path(directory)), "fp32")
    wanted = [TargetStates(whole, TAPS).states(examples[rank::count]) for rank in range(count)]
    layers = decoder_layers(whole.trunk if isinstance(whole, AdaptedTarget) else whole.model, 5)
    size = sum(parameter.numel() for parameter in layers.parameters())

    def work(ranks: Ranks) -> tuple[bool, int]:
        target = split(whole, mesh_on("cpu")).prepare()
        right = same(TargetStates(target, TAPS).states(examples[ranks.rank :: count]), wanted[ranks.rank])
        return right, sum(parameter.to_local().numel() for parameter in layers.parameters())

    found = inside(count, work)
    assert [right for right, _ in found] == [True] * count
    held = [share for _, share in found]
    assert sum(held) == size and max(held) < 1.1 * size / count


def test_losses_and_weights_are_those_of_processes_that_hold_the_whole_target(tmp_path, threads):
    threads(1)
    directory, examples = save_tiny_target(tmp_path / "target"), texts(*range(12, 36))

    def work(ranks: Ranks) -> list[list[float]]:
        told = []
        for apart in (True, False):
            target = load_split(directory, "cpu", ranks) if apart else load_target(directory, "fp32")
            source = None if apart else TargetStates(target, TAPS)  # not prepared: products as they are in a split one
            trainer = build(Setup(target, TAPS, examples, source, SETTINGS, ranks=ranks, split=apart))
            losses = [trainer.step(batch) for batch, _ in zip(trainer.remaining(), range(3), strict=False)]
            trainer.measure()
            point = {**trainer.progress.curve[-1], "minutes": 0.0}
            told.append([losses, point, [parameter.tolist() for parameter in trainer.parameters]])
        return told

    found = inside(2, work)
    assert found[0] == found[1]
    for (ours, *rest), (theirs, *others) in found:
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5) and ours[0] != ours[2]
        assert rest[0] == others[0]
        assert all(torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5) for one, other in zip(rest[1], others[1], strict=True))


@pytest.mark.parametrize("room", [10**6, 25, 0])
def test_what_a_process_has_read_it_keeps_and_hands_to_whoever_needs_it(room, threads):
    threads(1)
    examples = texts(24, 9, 17, 5, 30, 12)
    with TemporaryDirectory() as directory:
        whole = load_target(save_tiny_target(Path(directory)), "fp32")
    wanted = {id(example): TargetStates(whole, TAPS).states([example]) for example in examples}

    def right(states, asked) -> bool:
        told = [torch.cat(column) for column in zip(*(wanted[id(example)] for example in asked), strict=True)]
        return all(torch.allclose(one.float(), other.float(), rtol=2**-7, atol=2**-7) for one, other in zip(states, told, strict=True))

    def work(ranks: Ranks) -> tuple[list[bool], int]:
        reads = TargetStates(split(whole, mesh_on("cpu")), TAPS)
        source, passes, read = SplitStates(KeptStates(reads, room), ranks), [], reads.read
        reads.read = lambda chosen: (passes.append(chosen), read(chosen))[1]
        found = []
        for _ in range(2):  # in the second epoch others need them; one part is for nobody else
            for parts in ([[examples[0]], [examples[1], examples[2]]], [[examples[3]]], [[examples[2]], [examples[0]], [examples[1]]]):
                with source.step(parts):
                    found += [right(source.states(part), part) for part in parts[ranks.rank :: 2]]
            found.append(right(source.states(examples[2:]), examples[2:]))  # all of them ask for the same
        assert not source.ahead
        return found, sum(chosen != [FILLER] for chosen in passes)

    (first, passes), (second, others) = inside(2, work)
    assert len(first) == 2 * 5 and len(second) == 2 * 3 and all(first) and all(second)
    if room == 10**6:
        assert passes + others == 2 + 1 + 2  # a step's two, a step's one, and of what all ask for the part that nobody has read yet
    else:
        assert passes + others > 5


@pytest.mark.parametrize(
    ("processes", "words", "said"),
    [
        ("1", [], "--split-target splits the target over several processes, and this is one; start it as `torchrun --nproc-per-node N "),
        ("2", ["--self-play", "100"], "--split-target: a target that is split reads text and writes none; bring text with --data, "),
        ("2", ["--regenerate"], "--split-target: a target that is split reads text and writes none"),
    ],
)
def test_what_a_split_target_cannot_do_is_one_line(processes, words, said, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    options = parser().parse_args(["train", "--out", str(tmp_path / "draft"), "--split-target", "--data", "F.jsonl", *words])
    with pytest.raises(EyasError) as caught:
        run(options)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_process_that_is_gone_is_one_line_in_the_others():
    def work(rank: int) -> str | None:
        ranks = Ranks.join()
        if rank == 1:
            os._exit(1)
        with pytest.raises(EyasError) as caught, ranks.complete():
            ranks.any(True, torch.device("cpu"))
        return str(caught.value)

    ids, ends = processes.start(2, work)
    said = processes.result(ends[0])
    for process in ids:
        os.waitpid(process, 0)
    assert said == "one of the 2 processes that train together is gone, so all end; torchrun's report names it. Go on with --resume"


SCRIPT = """
import os, sys
from eyas import cli
from eyas.config import EyasError
from eyas.train.trainer import Trainer

step = Trainer.step

def failing(self, *batch):
    if self.progress.steps == 1 and os.environ["RANK"] == "1":
        raise EyasError("the second process has a reason")
    return step(self, *batch)

Trainer.step = failing
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_command_trains_beside_a_split_target_and_all_end_with_the_words_of_the_one_that_fails(tmp_path):
    target, script = save_tiny_target(tmp_path / "target"), tmp_path / "failing.py"
    says = [f"The nest is in tree {number}, high up, and made of twigs." for number in range(12)]
    turns = [[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": say}] for say in says]
    (data := tmp_path / "data.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words = ["train", "--target", target, "--data", data, "--split-target", "--taps", "1,2,4", "--draft-vocab", "200", "--workers", "1"]
    more = ["--out", tmp_path / "draft", "--steps", "3", "--unroll", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EYAS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*launch, *map(str, words + more)], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("eyas: ")] == ["eyas: the second process has a reason"]
    assert "[rank" not in done.stderr, done.stderr  # how torch marks a process's traceback
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
