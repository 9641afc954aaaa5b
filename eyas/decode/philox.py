"""Random words computed by tensors, on any device and for many keys at once: those that `sampling.py` has of numpy.

Words are uint64; here they are int64 tensors with the same bits, so products wrap and shifts are cleared of the sign. No step asks the
host for a number, and none reads memory of its own, so CUDA can capture all of it. Knows keys and counters; knows nothing of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eyas.kernels import fused

GUMBEL, CHOICE, DERIVE, GUESS = 0, 1, 2, 3  # purposes: independent streams of numbers for one (seed, position)
ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157  # Salmon et al. 2011, Philox-4x64
BUMPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
LOW_HALF, LOW_52 = (1 << 32) - 1, (1 << 52) - 1


def words_on(seeds_N: Tensor, positions_N: Tensor, count: int, purpose: int = GUMBEL, stream: int = 0) -> Tensor:
    """Random words int64 [N, count] with the bits of `philox_words`, on the keys' device. Keys are int64: a seed of 2^63 or more is
    wrapped."""
    blocks = -(-count // 4)
    keys_2N = torch.stack([seeds_N, positions_N])[:, :, None]
    multipliers, bumps = pair(MULTIPLIERS, seeds_N.device), pair(BUMPS, seeds_N.device)
    halves = multipliers & LOW_HALF, high_half(multipliers)
    # counters are (block, 0, stream, purpose), of which the even ones are multiplied; the first block is the first after 0
    even = torch.stack([torch.arange(1, blocks + 1, device=seeds_N.device), torch.full((blocks,), stream, device=seeds_N.device)])
    even, odd = even[:, None], torch.arange(2, device=seeds_N.device)[:, None, None] * purpose
    for bumped in range(ROUNDS):
        odd, even = (multipliers * even).flip(0), high_product(halves, even).flip(0) ^ odd ^ (keys_2N + bumps * bumped)
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1).flatten(1)[:, :count]


def uniforms_on(seeds_N: Tensor, positions_N: Tensor, count: int, purpose: int = CHOICE, stream: int = 0) -> Tensor:
    """The numbers of `uniforms`, float64 [N, count], strictly between 0 and 1; on CUDA by one kernel, where Triton is there."""
    if seeds_N.is_cuda and fused.available():
        return fused.uniforms(seeds_N, positions_N, count, purpose, stream)
    return (((words_on(seeds_N, positions_N, count, purpose, stream) >> 12) & LOW_52).double() + 0.5) * 2.0**-52


def gumbel_on(seeds_N: Tensor, positions_N: Tensor, count: int) -> Tensor:
    """The numbers of `gumbel`, float64 [N, count], but for the last bits of two logarithms."""
    return uniforms_on(seeds_N, positions_N, count, GUMBEL).log_().neg_().log_().neg_()  # in place: many rows of a large vocabulary


def pair(numbers: tuple[int, int], device: torch.device) -> Tensor:
    """Two uint64 numbers as int64 [2, 1, 1], made on the device: a copy from the host could not be captured."""
    first, second = numbers
    return torch.arange(2, device=device)[:, None, None] * wrapped(second - first) + wrapped(first)


def wrapped(number: int) -> int:
    """The int64 with the low 64 bits of a number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def high_half(words: Tensor) -> Tensor:
    return (words >> 32) & LOW_HALF


def high_product(halves: tuple[Tensor, Tensor], words: Tensor) -> Tensor:
    """The high 64 bits of products of unsigned numbers, of which one comes in its low and its high half."""
    low, high = halves
    words_low, words_high = words & LOW_HALF, high_half(words)
    middle = torch.addcmul(high_half(low * words_low), high, words_low)
    lower = torch.addcmul(middle & LOW_HALF, low, words_high)
    return torch.addcmul(high_half(middle) + high_half(lower), high, words_high)
