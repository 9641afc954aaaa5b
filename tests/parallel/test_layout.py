"""Positions are dealt out to shards, shards to processes, and subtrees of the one tree cover them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from eyas.config import EyasError
from eyas.parallel.layout import Layout


@given(some.sampled_from([1, 2, 8, 64]), some.sampled_from([1, 2, 8]), some.integers(0, 700))
def test_what_a_shard_holds_is_what_was_dealt_to_it(shards, block, length):
    layout = Layout(shards, block)
    dealt = [0] * shards
    for position in range(length):
        dealt[layout.shard_of(position)] += 1
    assert [layout.held(length, shard) for shard in range(shards)] == dealt
    assert max(dealt) - min(dealt) <= block


@given(some.sampled_from([1, 2, 8, 64]), some.data())
def test_processes_have_every_shard_once_and_as_whole_subtrees(shards, data):
    layout, count = Layout(shards), data.draw(some.integers(1, shards))
    ranges = [layout.range_of(rank, count) for rank in range(count)]
    assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])] and ranges[-1][1] == shards
    for low, high in ranges:
        parts = layout.subtrees(low, high)
        assert [shard for first, size in parts for shard in range(first, first + size)] == list(range(low, high))
        assert all(size & (size - 1) == 0 and first % size == 0 for first, size in parts)
    if count & (count - 1) == 0:
        assert all(len(layout.subtrees(*each)) == 1 for each in ranges)


@given(some.integers(1, 64), some.integers(0, 20_000))
def test_every_process_has_its_share_of_a_text_of_any_length(count, length):
    layout = Layout(64, 8)
    for rank in range(count):
        low, high = layout.range_of(rank, count)
        held, share = sum(layout.held(length, shard) for shard in range(low, high)), length * (high - low) / 64
        assert abs(held - share) <= 8 * 4, "a few blocks at most"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layout(6), "power of two"),
        (lambda: Layout(0), "whole number"),
        (lambda: Layout(8, 0), "block"),
        (lambda: Layout(8, 3), "block must be a power of two, not 3"),
        (lambda: Layout(4).range_of(0, 5), "5 processes share 4 shards; give --shards 8 or more"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make, words):
    with pytest.raises(EyasError, match=words):
        make()
