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
from eyas.files.target import load_target, prepared
from eyas.files.tokenizer import load_tokenizer
from eyas.model.cache import Slabs
from eyas.model.rows import chain_rows
from eyas.parallel.layout import Layout
from eyas.parallel.peers import Peers
from eyas.parallel.target import ShardedTarget, follow, run_passes
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
    {"method": "eagle3+copy", "tree": "12x3x4", "temperature": 1.0, "repetition_penalty": 1.2},
    {"method": "draft-model", "tree": "chain:3"},
    {"method": "eagle3", "tree": "static:3.2.0.1", "temperature": 1.0, "verifier": "traversal"},
    {"method": "lookup", "tree": "8x2x4"},
]
DRAWN = {"method": "eagle3", "temperature": 1.0}  # trees that rules of acceptance read
RULES = [
    {**DRAWN, "tree": "static:3.2.0.1", "verifier": "accept-reject"},
    {**DRAWN, "tree": "static:3.2.0.1", "verifier": "without-replacement"},
    {**DRAWN, "tree": "chain:3", "verifier": "block"},
    {**DRAWN, "tree": "12x3x4", "verifier": "typical-lossy"},
]
KINDS = [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 8), (torch.bfloat16, 4), (torch.float64, 16)]


def shared(model, timeout: float = 100.0, layout: Layout = LAYOUT) -> ShardedTarget:
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
def test_how_many_processes_there_are_changes_no_bit(count):
    def work(_: int) -> list[tuple[str, int, int, int]]:
        """Of each kind of target, one after the other: what its passes gave, how many they were, messages and bytes."""
        peers, found = Peers.join(timeout=30.0), []
        for kind in KINDS:
            made = ShardedTarget(target(*kind), LAYOUT, peers)
            if peers.first:
                calls, size = peers.carried
                found.append((digest(outputs(made)), made.passes, peers.carried[0] - calls, peers.carried[1] - size))
                peers.tell(("stop",))
            else:
                with torch.inference_mode():
                    run_passes(made)
        peers.leave()
        return found

    found = processes.run(count, work)[0]
    layers, most = 5, max(len(LAYOUT.subtrees(*LAYOUT.range_of(rank, count))) for rank in range(count))
    for (dtype, bits), (bits_of_all, passes, messages, size) in zip(KINDS, found, strict=True):
        assert bits_of_all == digest(outputs(ShardedTarget(target(dtype, bits), LAYOUT, Peers())))
        rows, state = 37 + 50 + 8 + 1 + 9, 4 * (8 + 1) * (8 if dtype == torch.float64 else 4)  # four heads of width 8, and a log each
        assert passes == 5 and messages == 5 * layers, "one message a layer"
        assert size == layers * rows * most * state * (count - 1), "and no byte but states"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_tiny_target(folder / "target", num_hidden_layers=8, intermediate_size=64, max_position_embeddings=1 << 15)
    save_tiny_draft(folder / "draft", folder / "target", taps=None)
    return folder


def engine_of(models, wrap, precision: str = "fp32") -> Engine:
    model = wrap(prepared(load_target(models / "target", precision), precision))  # as `begin` does: those that follow have no engine
    return Engine(model, load_tokenizer(models / "target"), models / "target", models / "draft", precision)


def texts(engine: Engine, calls) -> list[list[int]]:
    """The tokens of every call, alone and as a ragged batch of two at a time."""
    found = []
    for call in calls:
        found.append(engine.generate(PROMPTS[0], seed=3, max_new_tokens=14, **call).tokens)
        found += [each.tokens for each in engine.generate(PROMPTS, seed=3, max_new_tokens=6, batch=2, **call)]
    return found


@pytest.mark.parametrize(
    ("count", "precision", "calls"),
    [(2, "fp32", [*CALLS, *RULES]), (3, "bf16", CALLS), (4, "int8", [CALLS[1], CALLS[3], CALLS[4]])],
)
def test_every_method_writes_the_text_of_one_process(models, count, precision, calls):
    def work() -> list[list[int]]:
        made: list[ShardedTarget] = []
        found = texts(engine_of(models, lambda model: made.append(shared(model)) or made[0], precision), calls)
        made[0].stop()
        return found

    wanted = texts(engine_of(models, lambda model: ShardedTarget(model, LAYOUT, Peers()), precision), calls)
    assert processes.run(count, followed(work))[0] == wanted
    if precision == "fp32":
        greedy = [wanted[4 * number] for number in (0, 2, 5, 7)]
        assert all(each == greedy[0] for each in greedy), "and with every method that of plain decoding"


def test_a_process_holds_its_share_of_the_keys_and_the_first_one_the_drafts(models, monkeypatch):
    """Of all keys and values that there is ever room for; the draft's are one layer's."""
    room: list[tuple[int, int]] = []  # layers, and bytes
    own = Slabs.__init__

    def noted(slabs: Slabs, *given) -> None:
        own(slabs, *given)
        room.append((len(slabs.keys), slabs.keys.nbytes + slabs.values.nbytes))

    monkeypatch.setattr(Slabs, "__init__", noted)

    def work(_: int = 0) -> tuple[int, int]:
        peers, made = Peers.join(timeout=30.0), list[ShardedTarget]()
        engine = engine_of(models, lambda model: made.append(ShardedTarget(model, Layout(64, 4), peers)) or made[0])
        if peers.first:
            stream = engine.stream(PROMPTS[0], method="eagle3", tree="12x3x4", max_new_tokens=20_000)
            next(stream)
            stream.close()
            if peers.count > 1:
                made[0].stop()
        else:
            follow(made[0])
        return sum(size for layers, size in room if layers == 8), sum(size for layers, size in room if layers == 1)

    (whole, drafts), _ = work(), room.clear()
    assert drafts > 0
    for count in (2, 4):
        for rank, (held, beside) in enumerate(processes.run(count, work)):
            assert held == pytest.approx(whole / count, rel=0.1)
            assert beside == (0 if rank else drafts)


def test_a_process_that_is_slow_in_its_passes_is_named():
    def slow(model):
        """The same, but that all processes except the first one sleep in each pass."""
        own, model.read = model.read, lambda *given: (int(os.environ["RANK"]) and time.sleep(0.2), own(*given))[1]
        return model

    def work() -> dict:
        made = shared(slow(target(torch.float32)))
        cache = made.new_cache(1, 20)
        for position in range(7):
            made(chain_rows(0, [5], position), cache)
            cache.keep(0, [0])
        facts = made.facts()
        made.stop()
        return facts

    facts = processes.run(2, followed(work))[0]
    assert facts["slow_process"] == 2 and facts["seconds_waited"][0] > facts["seconds_waited"][1]


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
