"""Claims about shards: whole or not there, the same however often the writing was stopped, and known by what made them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from eyas.config import EyasError
from eyas.files.disk import directory_hash
from eyas.train import shards as on_disk
from eyas.train import writers
from eyas.train.features import shard_examples
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import SLOTS, Writer
from eyas.train.shards import PATTERN, Counts, Folder, check_shards, claim_folder, counts_of, data_folder, write_shards
from eyas.train.writers import Limit, write_own_data
from tests.tiny import byte_tokenizer, save_tiny_target, tiny_target
from tests.train import writing
from tests.train.writing import END, QUESTIONS, template, write_here

SETTINGS = replace(writing.SETTINGS, per_shard=5)
SHARDED = replace(SETTINGS, seeded_share=1.0, answer_temperatures=(1.0,))  # few are dropped, no two are alike


def conversations_in(path) -> list[list[int]]:
    with safe_open(path, framework="pt") as file:
        tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths").tolist()
    return [part.tolist() for part in tokens.split(lengths)]


@torch.inference_mode()
def write(folder, numbers, slots: int = 4, settings: SelfPlay = SHARDED, stop_after: int | None = None) -> list[int]:
    """Write these shards, or some of them and then stop in the middle of the next."""
    target = tiny_target(vocab_size=263, eos_token_ids=(END,))
    writing = write_shards(Writer(target, template(), settings, QUESTIONS, slots), Folder(folder), iter(numbers))
    return list(itertools.islice(writing, stop_after))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(path):
    path.mkdir()
    return path


def test_a_stopped_run_ends_with_the_same_shards(tmp_path):
    """Whatever was there stays as it is, what is missing is written, and all files equal an uninterrupted run's byte for byte."""
    whole, parts = made(tmp_path / "whole"), made(tmp_path / "parts")
    assert sorted(write(whole, range(6))) == list(range(6))
    written = write(parts, range(6), stop_after=2)
    before = contents(parts)
    assert len(before) == 2 < len(contents(whole))
    write(parts, [number for number in range(6) if number not in written], slots=3)
    assert contents(parts) == contents(whole) and before.items() <= contents(parts).items()


def test_two_writers_with_a_shard_each_write_what_one_would(tmp_path):
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    write(one, range(4))
    write(two, itertools.islice(range(4), 0, None, 2))
    write(two, itertools.islice(range(4), 1, None, 2), slots=7)
    assert contents(one) == contents(two)


def test_the_first_shards_that_hold_enough_are_chosen_and_none_may_be_missing(tmp_path):
    write(tmp_path, [0, 1, 3])
    counts = [counts_of(Folder(tmp_path).file(number)).answer_tokens for number in (0, 1)]
    shards = Folder(tmp_path).look()
    assert shards.in_order(1) == [0] and shards.in_order(counts[0]) == [0] and shards.in_order(counts[0] + 1) == [0, 1]
    assert shards.in_order(sum(counts) + 1) is None  # shard 2 is not there, whatever 3 holds
    write(tmp_path, [2])
    assert shards.look().in_order(sum(counts) + 1) == [0, 1, 2]


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch):
    save = on_disk.save_file

    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [0])
    assert list(tmp_path.glob(PATTERN)) == []
    monkeypatch.undo()
    assert write(tmp_path, [0]) == [0]
    assert len(shard_examples([Folder(tmp_path).file(0)], 1024)) >= 4


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, [0])
    path = Folder(tmp_path).file(0)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EyasError, match=r"00000000.safetensors is damaged .*; delete it and it will be written again"):
        counts_of(path)


def test_what_a_shard_holds_is_counted(tmp_path):
    """Answer tokens, dropped conversations, cut loops; a shard of dropped ones alone is there too, or it would be tried forever."""
    short = replace(SHARDED, longest_answer=7)
    write(tmp_path, range(3))
    total = Folder(tmp_path).look().total()
    examples = shard_examples(sorted(tmp_path.glob(PATTERN)), 1024)
    assert total.answer_tokens == sum(number >= 0 for example in examples for number in example.answers) > 100
    assert total.dropped == 15 - len(examples) and total.bytes == sum(len(held) for held in contents(tmp_path).values())
    write(empty := made(tmp_path / "empty"), [0], settings=short)
    assert Folder(empty).look().total() == Counts(0, 5, 0, Folder(empty).file(0).stat().st_size)
    assert shard_examples([Folder(empty).file(0)], 1024) == []


# ---- folders ----


def test_a_folder_of_other_settings_is_refused_with_the_difference(tmp_path):
    claim_folder(tmp_path / "own", SETTINGS)
    claim_folder(tmp_path / "own", SETTINGS)
    other = replace(SETTINGS, answer_top_p=0.9, target="else")
    with pytest.raises(EyasError, match=r"holds self-written data of other settings \(answer_top_p, target differ\)") as caught:
        claim_folder(tmp_path / "own", other)
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "own" / "key.json").read_text())["target"] == "tiny"


def test_other_settings_have_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path))
    changed = [
        replace(SETTINGS, **change) for change in ({"target": "x"}, {"taps": (0, 1, 2)}, {"seed_prompts": "f"}, {"version": 9}, {"seed": 1})
    ]
    folders = [data_folder(settings) for settings in (SETTINGS, *changed)]
    assert len(set(folders)) == 6 and all(folder.is_relative_to(tmp_path) for folder in folders)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EyasError, match=r"cannot write .* set EYAS_CACHE to a directory that can be written"):
        claim_folder(tmp_path / "file" / "cache", SETTINGS)


# ---- processes ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = save_tiny_target(tmp_path_factory.mktemp("tiny") / "target")
    return directory, replace(SETTINGS, target=directory_hash(directory), per_shard=4)


def test_two_workers_write_until_there_is_enough(tmp_path, saved):
    """Real processes on a saved target; a second call finds the data there and starts none."""
    directory, settings = saved
    told: list[int] = []
    chosen = write_own_data(directory, tmp_path / "data", settings, (), Limit(tokens=300), 2, told.append)
    assert sum(counts_of(shard).answer_tokens for shard in chosen) >= 300 and told == sorted(told)
    assert [shard.name for shard in chosen] == [f"{number:08d}.safetensors" for number in range(len(chosen))]
    examples = shard_examples(chosen, 1024)
    assert all(example.tokens[: len(template().before)] == template().before for example in examples)
    assert len({tuple(example.tokens) for example in examples}) == len(examples)
    names = set(contents(tmp_path / "data"))
    assert write_own_data(directory, tmp_path / "data", settings, (), Limit(tokens=300), 2, told.append) == chosen
    assert told[-1] == 300 and set(contents(tmp_path / "data")) == names


def test_a_file_of_questions_is_answered_whole_and_then_there_is_no_more(tmp_path, saved):
    directory, settings = saved
    questions = [Asked((f"What is {number}?",)) for number in range(6)]
    chosen = write_own_data(directory, tmp_path / "data", replace(settings, regenerate=True), questions, Limit(), 2, lambda count: None)
    found = [byte_tokenizer().decode(tokens) for shard in chosen for tokens in conversations_in(shard)]
    assert len(chosen) == 2 and 3 <= len(found) <= 6
    assert all(sum(f"<|im_start|>user\n{question.turns[0]}<" in text for question in questions) == 1 for text in found)


def test_a_disk_budget_ends_the_writing_with_one_line(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(writers, "write_in_processes", write_here)
    directory, settings = saved
    limit = Limit(tokens=10**9, bytes=30_000)
    told = r"has used its share of the disk .* at \d+ answer tokens; ask for fewer, or give more with --disk"
    with pytest.raises(EyasError, match=told):
        write_own_data(directory, tmp_path / "data", settings, (), limit, 1, lambda count: None)
    within = write_own_data(directory, tmp_path / "data", settings, (), Limit(minutes=1, bytes=30_000), 1, lambda count: None)
    assert within  # bounded by time, what fits is what there is


def test_a_folder_of_another_form_is_refused_before_anything_is_written(tmp_path, saved):
    directory, settings = saved
    claim_folder(tmp_path / "data", replace(settings, answer_top_p=0.5))
    with pytest.raises(EyasError, match="holds self-written data of other settings"):
        write_own_data(directory, tmp_path / "data", settings, (), Limit(tokens=10), 1, lambda count: None)


def test_text_of_other_tokens_or_another_config_is_not_taken_for_the_targets_own(tmp_path):
    """A folder that does not say under which it was written, as those of earlier versions, is taken."""
    claim_folder(tmp_path / "of-today", replace(SETTINGS, read="one"))
    claim_folder(tmp_path / "earlier", SETTINGS)
    check_shards(tmp_path / "of-today", replace(SETTINGS, read="one"))
    check_shards(tmp_path / "earlier", replace(SETTINGS, read="one"))
    with pytest.raises(EyasError, match=r"another target or in another way \(the target's config or tokenizer differ\)"):
        check_shards(tmp_path / "of-today", replace(SETTINGS, read="another"))


def test_a_short_writing_keeps_fewer_conversations_in_flight():
    """Its first shards would not be there in time; a quarter of an hour is no longer short."""
    assert writers.slots_for(Limit(minutes=1)) == writers.slots_for(Limit(tokens=1000)) < writers.slots_for(Limit(minutes=15)) == SLOTS


def test_the_deadline_holds_though_nothing_is_kept_and_the_cause_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GRACE", 0.0)
    directory = save_tiny_target(tmp_path / "target")
    settings = replace(SHARDED, target=directory_hash(directory), template=template().text)
    with pytest.raises(EyasError, match=r"wrote nothing to train on: not yet 5 conversations have ended \(an answer that never ends"):
        write_own_data(directory, tmp_path / "data", settings, (), Limit(minutes=0), 1, lambda count: None)
    told = writers.nothing_kept(Counts(dropped=7), settings)
    assert told.startswith("7 conversations were dropped, their answers shorter than 8 tokens; see with `eyas generate`")
