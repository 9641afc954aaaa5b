"""The words that tensors compute are numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eyas.decode.philox import CHOICE, DERIVE, GUESS, GUMBEL, gumbel_on, uniforms_on, words_on, wrapped
from eyas.decode.sampling import gumbel, philox_words, uniforms

SEEDS = [0, 1, 7, 123456789, 2**32 - 1, 2**32, 2**53 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
POSITIONS = [0, 1, 2, 31, 4095, 131071, 2**31, 2**40 + 3]
KEYS = [(seed, position) for seed in SEEDS for position in POSITIONS]


def keys(pairs):
    return torch.tensor([wrapped(seed) for seed, _ in pairs]), torch.tensor([position for _, position in pairs])


@pytest.mark.parametrize("stream", [0, 1, 5, 2**33])
@pytest.mark.parametrize("purpose", [GUMBEL, CHOICE, DERIVE, GUESS])
@pytest.mark.parametrize("count", [1, 3, 4, 13])
def test_words_of_many_keys_are_numpys(count, purpose, stream):
    found = words_on(*keys(KEYS), count, purpose, stream)
    wanted = np.stack([philox_words(seed, position, count, purpose, stream) for seed, position in KEYS])
    assert found.dtype == torch.int64 and (found.numpy().view(np.uint64) == wanted).all()


@pytest.mark.parametrize("mode", [False, True], ids=["ordinary", "inference"])
@pytest.mark.parametrize("count", [1, 3, 4, 13, 49152])
def test_uniform_numbers_are_those_of_one_key_at_a_time(count, mode):
    some = KEYS[::9]
    with torch.inference_mode(mode):
        found = uniforms_on(*keys(some), count, GUESS, 2)
    assert found.dtype == torch.float64
    assert (found.numpy() == np.stack([uniforms(seed, position, count, GUESS, 2) for seed, position in some])).all()


def test_the_purposes_that_are_left_out_are_those_of_numpys_forms():
    assert (words_on(*keys([(5, 6)]), 9)[0].numpy().view(np.uint64) == philox_words(5, 6, 9)).all()
    assert (uniforms_on(*keys([(5, 6)]), 9)[0].numpy() == uniforms(5, 6, 9)).all()


def test_noise_of_many_keys_is_that_of_one_key_at_a_time():
    found = gumbel_on(*keys(KEYS), 13)
    wanted = torch.stack([gumbel(seed, position, 13) for seed, position in KEYS])
    assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
