"""Every method of the family keeps the one promise, and drafts what its network says: all through the same rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.drafter import NoDrafter
from eyas.decode.generate import Decoder
from eyas.methods import METHODS, trained
from tests.tiny import tiny_target
from tests.tiny_family import STEPS, makers, tiny_network

TARGET = tiny_target()
MAKERS = makers()
GUESSING = [name for name in MAKERS if name != "plain"]
PROMPTS = [[3, 14, 15, 9, 26, 5], [7, 7, 8, 7, 7, 8, 7], [11], [40, 2, 40, 2]]
TREES = ("chain:1", "chain:6", "9x3x3", "static:3.2.0.1.1.1", "60x7x10")


def texts(drafter, shape: str | TreeShape, sampling: Sampling, seed: int = 0, prompts=PROMPTS, batch: int | None = None):
    shape = TreeShape.parse(shape) if isinstance(shape, str) else shape
    *_, found = Decoder(TARGET, drafter).run(prompts, shape, sampling, range(seed, seed + len(prompts)), 24, batch=batch)
    return found


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", GUESSING)
def test_the_text_is_plain_decodings(method, temperature, tree):
    sampling = Sampling(temperature)
    wanted = [text.tokens for text in texts(NoDrafter(), PLAIN, sampling)]
    assert [text.tokens for text in texts(MAKERS[method](), tree, sampling)] == wanted


@pytest.mark.parametrize("method", [name for name in GUESSING if name != "lookup"])
def test_drafting_alone_and_in_a_batch_makes_the_same_guesses(method):
    """Round by round, whichever anchors a text and its neighbours have and had: a cache that mixed sequences up would guess otherwise."""
    together = [text.accepted_lengths for text in texts(MAKERS[method](), "9x3x3", Sampling(1.0))]
    assert together == [text.accepted_lengths for text in texts(MAKERS[method](), "9x3x3", Sampling(1.0), batch=2)]
    alone = [texts(MAKERS[method](), "9x3x3", Sampling(1.0), number, prompts=[prompt])[0] for number, prompt in enumerate(PROMPTS)]
    assert together == [text.accepted_lengths for text in alone]
    assert sum(together, Counter())[1] < sum(sum(each.values()) for each in together), "something was accepted"


def slots_along(method: str, tokens: list[int], steps: int) -> dict[tuple[int, int], torch.Tensor]:
    """(anchor, step) -> logits, by the network as it is trained: its unroll over a text that is one answer."""
    from eyas.train.features import Example, TargetStates
    from eyas.train.unroll import Batch

    network, _ = tiny_network(method, tiny_target(prepare=False))
    states = TargetStates(TARGET, (1, 2, 4)).states([Example(tokens, [0] * len(tokens))])
    batch = Batch(torch.tensor(tokens), states.features.double(), torch.zeros(len(tokens), dtype=torch.int64), [len(tokens)], states.hidden)
    found = {}
    for step, made in enumerate(METHODS[method].training().unroll(network, batch, steps)):
        for anchor, logits in zip(made.anchors.tolist(), network.logits_at(step, made.a)):
            found[anchor, step] = logits.detach()
    return found


@pytest.mark.parametrize("method", trained())
def test_drafting_computes_what_training_taught(method):
    """A chain drafted along the text's own tokens has, at every depth, the logits of the training's unroll at that anchor and step."""
    *_, (text,) = Decoder(TARGET).run([PROMPTS[0]], PLAIN, Sampling(), [0], 20)
    tokens = text.tokens
    wanted = slots_along(method, tokens, STEPS)
    drafter, seen = MAKERS[method](), []
    along = Follower(drafter, tokens, seen)
    *_, (again,) = Decoder(TARGET, along).run([PROMPTS[0]], TreeShape.chain(STEPS), Sampling(), [0], 20)
    assert again.tokens == tokens and len(seen) > STEPS
    for anchor, step, logits in seen:
        if (anchor, step) in wanted:
            torch.testing.assert_close(logits, wanted[anchor, step], rtol=1e-9, atol=1e-9)
    assert sum((anchor, step) in wanted for anchor, step, _ in seen) > STEPS


class Follower:
    """A drafter whose chain is made to go along a known text, whatever its network would rather say; notes the logits at each level."""

    def __init__(self, drafter, tokens: list[int], seen: list) -> None:
        self.drafter, self.tokens, self.seen = drafter, tokens, seen
        self.wants, self.vocab = drafter.wants, drafter.vocab
        network = drafter.network
        drafter.network = Forced(network, self)

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def propose(self, requests):
        (request,) = requests
        self.position = request.position
        inside = [token in set(self.vocab.ids.tolist()) for token in self.tokens]
        room = next((i for i, fits in enumerate(inside[request.position + 1 :]) if not fits), len(self.tokens) - request.position - 1)
        if not room or request.shape.nodes == 1:
            return self.drafter.propose([replace(request, shape=PLAIN)])
        return self.drafter.propose([replace(request, shape=request.shape.cut(room))])


class Forced:
    def __init__(self, network, follower: Follower) -> None:
        self.network, self.follower = network, follower

    def __getattr__(self, name):
        return getattr(self.network, name)

    def logits_at(self, level, outputs):
        logits = self.network.logits_at(level, outputs)
        follower = self.follower
        follower.seen.append((follower.position - 1, level, logits[0].clone()))
        token = follower.tokens[follower.position + 1 + level]
        return torch.where(follower.vocab.ids == token, 50.0, 0.0).expand_as(logits).to(logits)
