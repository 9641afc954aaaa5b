"""A tiny draft in training: what the tests of the trainer share."""

from __future__ import annotations

from functools import cache

import torch

from eyas.config import PLAIN, Sampling, TrainSettings
from eyas.decode.generate import Decoder
from eyas.methods import METHODS
from eyas.model.vocab import DraftVocab
from eyas.train import trainer as training
from eyas.train.acceptance import Simulation
from eyas.train.features import Example, TargetStates
from eyas.train.teacher import Teacher
from eyas.train.trainer import Run, Trainer
from tests.tiny import tiny_target

TAPS = (1, 2, 4)
SETTINGS = TrainSettings(unroll_steps=4, draft_vocab_size=40, tokens_per_batch=160, warmup_steps=4, learning_rate=3e-3, max_length=64)
FACTS = {
    "target_sha256": "abc",
    "taps_are_inputs_of_layers": list(TAPS),
    "data": {"kind": "tiny"},
    "versions": {"torch": torch.__version__},
}


@cache
def target():
    return tiny_target()


@cache
def examples() -> tuple[Example, ...]:
    """Twenty prompts with what the target itself answers, one in three with a second answer behind it; greedy for a third."""
    draw = torch.Generator().manual_seed(7)
    sizes = [(int(n), int(m)) for n, m in zip(torch.randint(3, 9, (20,), generator=draw), torch.randint(6, 30, (20,), generator=draw))]
    prompts = [torch.randint(0, 53, (size,), generator=draw).tolist() for size, _ in sizes]
    found = []
    for number, (prompt, (_, length)) in enumerate(zip(prompts, sizes)):
        tokens, answers = prompt, [-1] * len(prompt)
        for turn in range(1 + (number % 3 == 0)):
            if turn:
                tokens, answers = [*tokens, 5, 7], [*answers, -1, -1]
            before = len(tokens)
            tokens = written(tokens, length, Sampling(0.0 if number % 3 else 0.8), number)
            answers += [turn] * (len(tokens) - before)
        found.append(Example(tokens, answers, number % 3 != 0))
    return tuple(found)


def written(prompt: list[int], length: int, sampling: Sampling, seed: int) -> list[int]:
    texts = []
    for texts in Decoder(target()).run([prompt], PLAIN, sampling, [seed], length):  # noqa: B007
        pass
    return texts[0].tokens


def make_trainer(out, settings=SETTINGS, workers=1, dtype=torch.float64, **changes) -> Trainer:
    loose = tiny_target(prepare=False)
    vocab = DraftVocab(changes.pop("ids", range(settings.draft_vocab_size)), 53)
    method = changes.get("method", "eagle3")
    network = METHODS[method].training().new_network(loose, TAPS, vocab, settings).to(dtype)
    teacher = Teacher.of(loose, vocab, dtype)
    source, facts = TargetStates(target(), TAPS), dict(changes.pop("facts", FACTS))
    return Trainer(Run(network, vocab, teacher, examples()[4:], examples()[:4], source, settings, out, facts, 5, workers, **changes))


def simulation(tau: float) -> Simulation:
    """Of one example, whose first steps alone were right."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    return Simulation(ones[0], ones, ones, (tau - 1) * ones, (tau - 1) * ones)


def silent(progress, losses, spent) -> None:
    pass


def interrupt_at(step: int):
    def report(progress, losses, spent):
        if progress.steps == step:
            raise KeyboardInterrupt

    return report


def state_of(trainer: Trainer) -> dict:
    state = torch.load(trainer.out / training.CHECKPOINT, weights_only=True)
    for point in (state["progress"], *state["progress"]["curve"]):
        del point["minutes"]
    return state


def assert_identical(one, other, place="") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_identical(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other)):
            assert_identical(a, b, f"{place}[{index}]")
    else:
        assert one == other, place


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)
