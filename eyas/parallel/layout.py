"""Which positions of a text lie in which shard, and which shards a process holds.

Positions are dealt out in blocks to `shards` virtual shards, in turn; a process holds a range of shards. Turns jump as a count with its
bits read backwards does (0, 32, 16, 48, 8, ..): neighbouring blocks lie far apart, and every process has its share of a short text too.
States of shards meet along the binary tree over all shards, so the number of processes decides who computes a state, never which states
meet. Knows numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eyas.config import EyasError


@dataclass(frozen=True)
class Layout:
    """`shards`, a power of two, and `block`: positions that go to one shard before the next one's turn."""

    shards: int = 64
    block: int = 256

    def __post_init__(self) -> None:
        for name, value in (("shards", self.shards), ("block", self.block)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 16:
                raise EyasError(f"{name} must be a whole number from 1 to {1 << 16}, not {value}")
            if value & (value - 1):
                why = {"shards": "states of shards meet along a binary tree", "block": "the kernel finds a row's place by its bits"}
                raise EyasError(f"{name} must be a power of two, not {value}: {why[name]}")

    def shard_of(self, position: int) -> int:
        return self.mirrored(position // self.block % self.shards)

    def mirrored(self, number: int) -> int:
        """A shard's turn, or the shard whose turn it is: the number with its bits read backwards."""
        bits = self.shards.bit_length() - 1
        return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0

    def held(self, length: int, shard: int) -> int:
        """How many of the first `length` positions lie in a shard."""
        return int(self.rows_of(np.array(length), np.array([self.mirrored(shard) * self.block]))[0])

    def rows_of(self, lengths: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """How many of the first `lengths` [..] positions lie in each of P shards, whose first blocks begin at `begins` [P]: [.., P]."""
        whole, rest = np.divmod(lengths[..., None], self.block * self.shards)
        return whole * self.block + np.clip(rest - begins, 0, self.block)

    def range_of(self, rank: int, count: int) -> tuple[int, int]:
        """The shards [low, high) of one of `count` processes. Raises `EyasError` where there are more processes than shards."""
        if count > self.shards:
            raise EyasError(f"{count} processes share {self.shards} shards; give --shards {1 << (count - 1).bit_length()} or more")
        return self.shards * rank // count, self.shards * (rank + 1) // count

    def subtrees(self, low: int, high: int, most: int = 1 << 16) -> list[tuple[int, int]]:
        """The shards [low, high) as complete subtrees of the tree over all shards, ascending: (first shard, size). `most`, a power of two:
        how many shards one has at most."""
        found = []
        while low < high:
            size = min(low & -low or self.shards, most)
            while low + size > high:
                size //= 2
            found.append((low, size))
            low += size
        return found


@dataclass(frozen=True)
class Together:
    """What meets where each of `shards` processes has one state, over all of its keys: every process, in order, as a shard of its own."""

    shards: int

    def range_of(self, rank: int, count: int) -> tuple[int, int]:
        """The processes [low, high) of one of `count` equal parts: of single processes, or of nodes."""
        return self.shards * rank // count, self.shards * (rank + 1) // count

    def subtrees(self, low: int, high: int) -> list[tuple[int, int]]:
        """States of neighbours are taken at once, so any range is one."""
        return [(low, high - low)]
