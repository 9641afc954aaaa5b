"""Guessing that loses is paused, longer each time; guessing that wins is not; what is dear for many is tried anew for few."""

from __future__ import annotations

from eyas.decode.plan.pauses import LONGEST_PAUSE, SHORTEST_PAUSE, Pauses

PLAIN = 1.0  # seconds


def rounds(pauses: Pauses, count: int, batch: int, gain: float, overhead: float = 1.0) -> list[bool]:
    """Whether each round was plain: guessing brings `gain` times what plain rounds do, and these take `overhead` times their price."""
    found = []
    for _ in range(count):
        plain = pauses.begin(batch, PLAIN)
        pauses.record(not plain, batch, PLAIN * overhead / (1.0 if plain else gain))
        found.append(plain)
    return found


def stretches(plain: list[bool]) -> list[int]:
    """Lengths of the pauses that ended."""
    return [len(part) for part in "".join("x" if each else " " for each in plain).split(" ")[:-1] if part]


def test_guessing_that_wins_is_never_paused():
    for batch in (1, 4, 16):
        assert not any(rounds(Pauses(), 2000, batch, 1.02))


def test_guessing_that_loses_is_paused_longer_each_time():
    for batch in (1, 4, 16):
        plain = rounds(Pauses(), 6000, batch, 0.9)
        assert stretches(plain)[:5] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 4 * SHORTEST_PAUSE, 8 * SHORTEST_PAUSE, 16 * SHORTEST_PAUSE]
        assert max(stretches(plain)) <= LONGEST_PAUSE
        assert sum(plain) > 0.85 * len(plain)


def test_what_pays_again_is_not_paused_again():
    pauses = Pauses()
    rounds(pauses, 300, 8, 0.9)
    after = rounds(pauses, 3000, 8, 1.1)
    assert sum(after) <= LONGEST_PAUSE and not any(after[LONGEST_PAUSE:]) and pauses.gain.length == SHORTEST_PAUSE


def test_plain_rounds_are_counted_with_the_work_around_their_pass():
    """At their price alone plain rounds would look better than they are."""
    pauses = Pauses()
    assert any(rounds(pauses, 60, 16, 1.05, overhead=1.2))  # nothing is known yet of what plain rounds take
    assert not any(rounds(pauses, 2000, 16, 1.05, overhead=1.2)[200:])


def test_few_sequences_do_not_wait_for_what_many_could_not_afford():
    pauses = Pauses()
    assert any(rounds(pauses, 40, 16, 0.9)) and pauses.left[(16).bit_length()] > 5
    assert pauses.begin(17, PLAIN)
    assert not pauses.begin(7, PLAIN)


def test_the_next_call_tries_again_for_a_quarter_as_long():
    """Its text may be another; where guessing loses as it did before, that is seen sooner."""
    pauses = Pauses()
    first = rounds(pauses, 60, 4, 0.9)
    pauses = Pauses(pauses.gains)
    again = rounds(pauses, 60, 4, 0.9)
    assert first.index(True) == 50 and again.index(True) == 12
    pauses = Pauses(pauses.gains)
    assert not any(rounds(pauses, 2000, 4, 1.1))
