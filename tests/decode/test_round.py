"""The promise: speculation never changes the text, at any temperature, with any draft, tree or batch."""

from __future__ import annotations

import pytest
import torch

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.drafters.lookup import LookupDrafter
from tests.tiny import tiny_draft, tiny_target

TARGET = tiny_target()
SAMPLINGS = [Sampling(), Sampling(0.5), Sampling(1.0, top_p=0.9), Sampling(1.5, top_p=0.95, top_k=20), Sampling(1.0, min_p=0.05)]
SHAPES = ["chain:1", "chain:3", "8x2x3", "60x7x10"]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 53, (int(torch.randint(1, 12, (), generator=draw)),), generator=draw).tolist() for _ in range(count)]


def texts(drafter, prompts, shape, sampling, seeds, length=24) -> list[list[int]]:
    for everyone in Decoder(TARGET, drafter).run(prompts, shape, sampling, seeds, length):
        pass
    return [text.tokens[text.prompt_length :] for text in everyone]


def eagle3() -> Eagle3Drafter:
    return Eagle3Drafter(*tiny_draft(TARGET))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tree_output_is_plain_output(sampling, shape):
    asked = prompts(6)
    seeds = list(range(6))
    plain = texts(None, asked, PLAIN, sampling, seeds)
    assert texts(eagle3(), asked, TreeShape.parse(shape), sampling, seeds) == plain
    assert [texts(eagle3(), [p], TreeShape.parse(shape), sampling, [s])[0] for p, s in zip(asked, seeds)] == plain


def shallow():
    return ModelDrafter(TARGET.shallow(2), TARGET.config.vocab_size)


@pytest.mark.parametrize("drafter", [shallow, LookupDrafter, lambda: LookupDrafter(1)], ids=["draft-model", "lookup", "lookup-1"])
@pytest.mark.parametrize("shape", ["chain:3", "8x2x3"])
@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_every_drafter_keeps_the_text(sampling, shape, drafter):
    asked, seeds = prompts(6), list(range(6))
    assert texts(drafter(), asked, TreeShape.parse(shape), sampling, seeds) == texts(None, asked, PLAIN, sampling, seeds)
