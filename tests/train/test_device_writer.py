"""Claims about text written on a device of its own: the conversations of self-play, kept as they end, as many at once as memory holds."""

from __future__ import annotations

import math

import pytest
import torch

from eyas.config import EyasError
from eyas.train.device_writer import DevicePlay, slots_for, write_here
from eyas.train.journal import JOURNAL, Journal
from eyas.train.texts import read_facts, read_text
from eyas.train.writers import Limit
from tests.tiny import tiny_config, tiny_target
from tests.train.test_fixed_writer import KINDS, said_by_any_rows
from tests.train.test_selfplay import target
from tests.train.writing import END, QUESTIONS, template

CPU = torch.device("cpu")
PLAY = DevicePlay.of(KINDS, CPU)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))


def write(limit: Limit, settings: DevicePlay = PLAY, by=target, report=lambda count: None):
    return write_here(by(), template(), settings, QUESTIONS, limit, report)


def test_what_is_written_is_self_plays_first_conversations():
    counts = []
    path = write(Limit(tokens=600), report=counts.append)
    found, wanted = list(read_text(path)), said_by_any_rows(PLAY, 40, target)
    kept = [told for _, told in sorted(wanted.items()) if told]
    assert [each.tokens for each in found] == [told[0] for told in kept[: len(found)]]
    told = read_facts(path)
    assert told.settings[0]["device"] == "cpu" and 600 <= told.counts.answer_tokens < 800
    assert sum(number >= 0 for each in found for number in each.answers) == told.counts.answer_tokens
    assert counts[0] == 0 and counts[-1] <= 600 and counts == sorted(counts)


def test_what_was_whole_when_it_was_interrupted_is_kept(tmp_path):
    whole = list(read_text(write(Limit(tokens=600))))
    (journal,) = tmp_path.rglob(JOURNAL)
    journal.unlink()

    def interrupt(count: int) -> None:
        if count > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(Limit(tokens=600), report=interrupt)
    before = set(Journal(journal).noted)
    assert 3 < len(before) < len(whole)
    assert list(read_text(write(Limit(tokens=600)))) == whole
    lines = journal.read_text().splitlines()
    assert len({line.split(",")[0] for line in lines}) == len(lines)  # nothing was written twice but what others follow


def test_enough_is_not_written_again():
    first = write(Limit(tokens=300))
    assert write(Limit(tokens=300), by=lambda: None) == first


def test_a_target_without_fixed_steps_writes_by_any_rows():
    def windowed():
        loose = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False, sliding_window=32)
        loose.lm_head.weight[END] *= 1.6
        return loose.prepare()

    found = list(read_text(write(Limit(tokens=100), by=windowed)))
    wanted = [told for _, told in sorted(said_by_any_rows(PLAY, 20, windowed).items()) if told]
    assert [each.tokens for each in found] == [told[0] for told in wanted[: len(found)]]


def test_slots_are_as_many_as_memory_holds_and_tokens_need():
    config = tiny_config()
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert slots_for(config, 2, 1024, math.inf, None) == 2048
    assert slots_for(config, 2, 1024, 5000, None) == 20 and slots_for(config, 2, 1024, 10, None) == 8
    assert slots_for(config, 2, 1024, math.inf, 100 * 1024 * row) == 60
    with pytest.raises(EyasError, match=r"has too little memory left to write: .* for 8 conversations of 1024 tokens at once"):
        slots_for(config, 2, 1024, math.inf, 10 * 1024 * row)
