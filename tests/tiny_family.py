"""Random drafts of every method for tiny targets, and their drafters: what the tests of the family share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eyas.config import TrainSettings
from eyas.decode.drafter import Drafter
from eyas.methods import METHODS, trained
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab
from tests.tiny import randomize, tiny_config, tiny_target

TAPS = (1, 2, 4)
STEPS = 4  # trained steps, heads or modules


def tiny_network(method: str, target: Target, seed: int = 1, size: int = 29, **settings):
    """A random float64 network of a method and its vocabulary, for a target that is not prepared."""
    draw = torch.Generator().manual_seed(seed)
    vocab = DraftVocab(torch.randperm(target.config.vocab_size, generator=draw)[:size].sort().values, target.config.vocab_size)
    steps = {"unroll_steps": STEPS, "draft_vocab_size": size}
    network = METHODS[method].training().new_network(target, TAPS, vocab, TrainSettings(**steps | settings)).double()
    randomize(network, seed)
    return network, vocab


def makers() -> dict[str, Callable[[], Drafter]]:
    """Of every method that can draft."""
    loose = tiny_target(prepare=False)
    found: dict[str, Callable[[], Drafter]] = {}
    for kind in trained():
        network, vocab = tiny_network(kind, loose)
        network.prepare()
        for name, method in METHODS.items():
            if method.draft == kind:
                found[name] = lambda method=method, network=network, vocab=vocab: method.decoding().drafter(network, vocab)
    target = tiny_target()
    for name, method in METHODS.items():
        if method.draft is None:
            found[name] = lambda method=method: method.decoding().alone(target)
    return found


__all__ = ["STEPS", "TAPS", "makers", "tiny_config", "tiny_network"]
