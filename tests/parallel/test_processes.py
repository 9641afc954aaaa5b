"""Several processes that share a text's keys: to the last bit the text of one, one message a layer, and no silence where one is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import time

import pytest
import torch

from eyas.config import EyasError
from eyas.engine import Engine
from eyas.files.target import load_target
from eyas.files.tokenizer import load_tokenizer
from eyas.model.rows import chain_rows
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget, follow
from tests.parallel import processes
from tests.parallel.test_target import outputs, target
from tests.tiny import save_tiny_draft, save_tiny_target

LAYOUT = Layout(8, 4)
PROMPTS = ["Tell me of hawks, and of what they eat.", "hi", "And owls? " * 9]
CALLS = [
    {"method": "plain"},
    {"method": "plain", "temperature": 1.0},
    {"method": "eagle3", "tree": "12x3x4"},
    {"method": "eagle3", "tree": "12x3x4", "temperature": 1.0},
    {"method": "eagle3-lookup", "tree": "12x3x4", "temperature": 1.0, "repetition_penalty": 1.2},
    {"method": "draft-model", "tree": "chain:3"},
    {"method": "eagle3", "tree": "static:3.2.0.1", "temperature": 1.0, "verifier": "traversal"},
    {"method": "lookup"},
]


def shared(model, timeout: float = 30.0, layout: Layout = LAYOUT) -> ShardedTarget:
    """In the first process the target; the others follow, and end here."""
    made = ShardedTarget(model, layout, Peers.join(timeout=timeout))
    if made.peers.first:
        return made
    follow(made)
    raise SystemExit(0)


def followed(work):
    """What the first process of several finds; the others find nothing."""

    def run(rank: int):
        try:
            return work()
        except SystemExit:
            return None

    return run


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.float().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 4), (torch.float64, 16)])
def test_how_many_processes_there_are_changes_no_bit(count, dtype, bits):
    def work() -> tuple[str, dict, int]:
        made = shared(target(dtype, bits))
        found = digest(outputs(made)), made.facts(), made.peers.carried[1]
        made.stop()
        return found

    wanted = digest(outputs(ShardedTarget(target(dtype, bits), LAYOUT, Peers())))
    found, facts, carried = processes.run(count, followed(work))[0]
    assert found == wanted
    layers, most = 5, max(len(LAYOUT.subtrees(*LAYOUT.range_of(rank, count))) for rank in range(count))
    rows, state = 37 + 50 + 8 + 1 + 9, 4 * (8 + 1) * (8 if dtype == torch.float64 else 4)  # four heads of width 8, and a log each
    assert facts["passes"] == 5 and facts["collectives"] == 5 * layers, "one message a layer"
    assert carried == layers * rows * most * state * (count - 1), "and no byte but states"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_tiny_target(folder / "target", num_hidden_layers=8, intermediate_size=64)
    save_tiny_draft(folder / "draft", folder / "target", taps=None)
    return folder


def texts(models, wrap, precision: str = "fp32") -> list[list[int]]:
    """The tokens of every call, alone and as a ragged batch of two at a time."""
    model = wrap(load_target(models / "target", precision))
    engine = Engine(model, load_tokenizer(models / "target"), models / "target", models / "draft", precision)
    found = []
    for call in CALLS:
        found.append(engine.generate(PROMPTS[0], seed=3, max_new_tokens=14, **call).tokens)
        found += [each.tokens for each in engine.generate(PROMPTS, seed=3, max_new_tokens=6, batch=2, **call)]
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_every_method_writes_the_text_of_one_process(models, count):
    def work() -> list[list[int]]:
        made: list[ShardedTarget] = []
        found = texts(models, lambda model: made.append(shared(model)) or made[0])
        made[0].stop()
        return found

    wanted = texts(models, lambda model: ShardedTarget(model, LAYOUT, Peers()))
    assert processes.run(count, followed(work))[0] == wanted
    greedy = [wanted[4 * number] for number in (0, 2, 5, 7)]
    assert all(each == greedy[0] for each in greedy), "and with every method that of plain decoding"


def test_a_process_holds_its_share_of_the_keys():
    def work(rank: int) -> int:
        peers = Peers.join()
        made = ShardedTarget(target(torch.float32), Layout(64, 4), peers)
        held = made.made(1, 20_000).inner.keys.nbytes
        peers.leave()
        return held

    alone = ShardedTarget(target(torch.float32), Layout(64, 4), Peers()).made(1, 20_000).inner.keys.nbytes
    for count in (2, 4):
        for held in processes.run(count, work):
            assert held == pytest.approx(alone / count, rel=0.1)


def test_processes_that_are_not_alike_do_not_begin():
    def work(rank: int) -> str:
        peers = Peers.join()
        try:
            peers.agree(("1.0", "fp32" if rank < 2 else "bf16"), ("version", "precision"))
        except EyasError as error:
            return str(error)
        finally:
            peers.leave()
        return "alike"

    assert set(processes.run(3, work)) == {"process 3 of 3 has another precision (bf16) than the first (fp32)"}


@pytest.mark.parametrize(
    ("sent", "words"), [(signal.SIGKILL, "process 3 of 3 is gone"), (signal.SIGSTOP, "process 3 of 3 did not answer within 2 s")]
)
def test_a_process_that_is_lost_is_named_and_the_others_end(sent, words, tmp_path):
    def work() -> str:
        made = shared(target(torch.float32), timeout=2.0)
        cache = made.new_cache(1, 5000)
        for position in range(5000):
            try:
                made(chain_rows(0, [position % 50], position), cache)
            except EyasError as error:
                return str(error)
            cache.keep(0, [0])
            if position == 3:
                (tmp_path / "begun").touch()
        return "nobody was lost"

    ids, ends = processes.start(3, followed(work))
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    os.kill(ids[2], sent)
    assert processes.result(ends[0]) == words
    processes.result(ends[1])
    os.kill(ids[2], signal.SIGKILL)
    for process in ids:
        os.waitpid(process, 0)


def test_a_gather_that_was_announced_brings_what_is_sent_next_and_no_other_ones():
    def work(rank):
        os.environ["EYAS_BOARD"] = "0"  # as between machines
        peers = Peers.join(timeout=30)
        found = []
        for layer in range(3):
            for name in ("states", "rows"):
                mine = torch.full((2,), 100.0 * layer + 10 * rank + len(name))
                found.append(peers.gather(mine, name, more=layer < 2)[:, 0].tolist())
        peers.leave()
        return found, peers.calls["states"], peers.bytes["states"]

    expected = [[100.0 * layer + 10 * rank + size for rank in range(3)] for layer in range(3) for size in (6, 4)]
    assert processes.run(3, work) == [(expected, 3, 3 * 2 * 8)] * 3
