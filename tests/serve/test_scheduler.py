"""Claims about turns: how long prompts may hold up those that decode, and when a first token is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from eyas.decode.generate import PROMPT_PART
from eyas.serve.scheduler import LEAST_PART, MOST_STALLS, Scheduler, Settings
from tests.serve.serving import CHAT, ask, served


def scheduler(reading: int, decoding: int, seconds_a_row: float = 0.001, round_seconds: float = 0.0) -> Scheduler:
    decoder = SimpleNamespace(reserve=lambda *_: None, reading=[None] * reading, decoding=[None] * decoding)
    found = Scheduler(decoder, [], Settings(stall=0.1))
    found.seconds_a_row, found.round_seconds = seconds_a_row, round_seconds
    return found


@pytest.mark.parametrize(
    ("reading", "decoding", "round_seconds", "held", "rows"),
    [
        (1, 0, 0.5, 0.0, PROMPT_PART),  # nobody waits for it
        (1, 10, 0.02, 0.0, 110),  # a stall, and a tenth more for the one that comes
        (1, 10, 0.2, 0.0, 220),  # a round that takes longer
        (4, 4, 0.02, 0.0, 200),
        (30, 1, 0.02, 0.0, PROMPT_PART),  # many wait for few: up to five stalls, of which a part is one
        (30, 1, 0.02, 0.3, 200),
        (30, 1, 0.02, 0.1 * MOST_STALLS, 0),
        (1, 10, 0.02, 0.108, 0),  # too few rows to be worth a pass
        (1, 10, 0.9, 0.0, PROMPT_PART),
    ],
)
def test_prompts_take_as_long_as_a_round_and_longer_where_more_wait(reading, decoding, round_seconds, held, rows):
    assert scheduler(reading, decoding, round_seconds=round_seconds).part(held) == pytest.approx(rows, abs=1)


def test_a_slow_row_is_read_all_the_same():
    assert scheduler(1, 3, seconds_a_row=10.0).part(0.0) == LEAST_PART


def test_a_first_token_is_told_before_the_round_that_follows(engine):
    with served(engine, "--slots", "2") as (client, server):
        told: list[str] = []
        tell, decode = server.scheduler.tell, server.scheduler.decoder.decode

        def telling(sequences):
            found = list(sequences)
            told.append(f"told {[len(each.tokens) - each.prompt_length for each in found]}")
            tell(found)

        def decoding():
            told.append("round")
            return decode()

        server.scheduler.tell, server.scheduler.decoder.decode = telling, decoding
        client.post(CHAT, json=ask(stream=True, max_tokens=4))
    assert told[:2] == ["told [1]", "round"]
