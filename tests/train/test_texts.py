"""Claims about text without states: it is what the shards held, and training on it is training on them."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from eyas.config import EyasError, TrainSettings
from eyas.files.target import load_target
from eyas.kernels.linear import cpu_multiplies_bfloat16
from eyas.train.build import Setup, build
from eyas.train.features import Example, KeptStates, ShardStates, States, TargetStates, kept_states, shard_examples
from eyas.train.selfplay import Writer
from eyas.train.shards import PATTERN, Folder, Written, claim_folder, write_shards
from eyas.train.texts import check_text, laid_end_to_end, pack_text, read_facts, read_text, text_examples
from eyas.train.trainer import Trainer
from tests.tiny import save_tiny_target
from tests.train import writing
from tests.train.writing import QUESTIONS, template

TAPS = writing.TAPS
PLAY = replace(writing.SETTINGS, per_shard=5, seeded_share=0.5, turns=(1, 2, 3))
LEARN = TrainSettings(unroll_steps=3, draft_vocab_size=200, tokens_per_batch=1000, learning_rate=3e-3, products="fp32")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def reader(directory):
    return load_target(directory, "bf16").prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, reader) -> Path:
    """Four shards of five conversations, of one to three answers each, that a target in bfloat16 wrote."""
    path = tmp_path_factory.mktemp("shards")
    claim_folder(path, PLAY)
    with torch.inference_mode():
        list(itertools.islice(write_shards(Writer(reader, template(), PLAY, QUESTIONS, 4), Folder(path), iter(range(4))), 4))
    return path


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    pack_text([folder], path)
    return path


def stored(folder: Path, max_length: int = 1024) -> list[Example]:
    return shard_examples(sorted(folder.glob(PATTERN)), max_length)


def without_place(examples: list[Example]) -> list[Example]:
    return [replace(example, source=None, start=0) for example in examples]


def trainer(directory: Path, examples: list[Example], source) -> Trainer:
    return build(Setup(load_target(directory, "fp32"), TAPS, examples, source, LEARN))


class Asked:
    """A source that notes what it was asked for; an example's states are its tokens."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def states(self, examples) -> States:
        self.asked += [example.tokens for example in examples]
        tokens = torch.tensor([token for example in examples for token in example.tokens])
        return States(tokens[:, None].float().repeat(1, 6), tokens[:, None].float().repeat(1, 2), tokens)


def numbered(count: int) -> list[Example]:
    """Example i is i + 1 times the token i."""
    return [Example([i] * (i + 1), [0] * (i + 1)) for i in range(count)]


def test_a_file_of_text_makes_the_examples_of_its_shards(folder, text):
    for max_length in (1024, 120):
        examples = stored(folder, max_length)
        assert text_examples([text], max_length) == without_place(examples)
        assert 3 < len(examples) <= 20
    assert {example.greedy for example in stored(folder)} == {True, False}


def test_every_answer_of_a_conversation_is_found_again(tmp_path):
    conversations = [
        Written([5, 6, 7, 8, 9, 10, 11], [-1, 0, 0, -1, 1, 1, 1], 0.0),
        Written([1, 2], [-1, -1], 1.0),
        Written([4, 3, 65_535], [0, 1, 1], 0.5),
    ]
    for tokens in ([1, 2], [1, 70_000]):
        conversations[1] = conversations[1]._replace(tokens=tokens)
        save_file(laid_end_to_end(conversations), tmp_path / "text")
        assert list(read_text(tmp_path / "text")) == conversations


def test_it_takes_two_bytes_a_token_and_a_few_a_conversation(folder, text):
    examples = stored(folder)
    tokens = sum(len(example.tokens) for example in examples)
    assert 2 * tokens < text.stat().st_size < 2 * tokens + 60 * 20 + 600 + len(json.dumps(asdict(PLAY), indent=1)) * 1.3
    facts = read_facts(text)
    assert facts.counts.answer_tokens == sum(number >= 0 for example in examples for number in example.answers)
    assert facts.counts.bytes == text.stat().st_size and facts.settings == [json.loads(json.dumps(asdict(PLAY)))]


def test_text_of_another_target_is_refused_and_that_of_other_taps_is_not(tmp_path, folder, text):
    assert check_text(text, replace(PLAY, taps=(0, 3), seed=7)) == read_facts(text)
    with pytest.raises(EyasError, match=r"another target or in another way \(target differ\)"):
        check_text(text, replace(PLAY, target="other"))
    with pytest.raises(EyasError, match=r"\(the target's config or tokenizer differ\)"):
        pack_text([claimed(tmp_path / "read", replace(PLAY, read="abc"), folder)], tmp_path / "read.safetensors")
        check_text(tmp_path / "read.safetensors", replace(PLAY, read="xyz"))
    other = claimed(tmp_path / "other", replace(PLAY, template="another"), folder)
    with pytest.raises(EyasError, match=r"not written alike \(template differ\)"):
        pack_text([folder, other], tmp_path / "mixed.safetensors")
    assert not (tmp_path / "mixed.safetensors").exists()


def claimed(path: Path, settings, shards: Path) -> Path:
    claim_folder(path, settings)
    for shard in shards.glob(PATTERN):
        (path / shard.name).hardlink_to(shard)
    return path


def test_what_is_no_text_is_one_line(tmp_path, folder):
    with pytest.raises(EyasError, match="is no file of self-written text"):
        read_facts(sorted(folder.glob(PATTERN))[0])
    with pytest.raises(EyasError, match="does not exist"):
        read_facts(tmp_path / "nothing")
    with pytest.raises(EyasError, match="hold no conversation"):
        claim_folder(tmp_path / "empty", PLAY)
        pack_text([tmp_path / "empty"], tmp_path / "text.safetensors")


def test_states_are_asked_for_once_and_come_in_the_order_of_the_examples():
    source, examples = Asked(), numbered(5)
    kept = KeptStates(source, 15)
    for order in ([2, 0], [4, 2, 1], [3, 0, 4], [2, 2]):
        chosen = [examples[i] for i in order]
        found, wanted = kept.states(chosen), Asked().states(chosen)
        assert found.features.dtype == torch.bfloat16 and torch.equal(found.features.float(), wanted.features)
        assert torch.equal(found.hidden.float(), wanted.hidden) and torch.equal(found.target_argmax, wanted.target_argmax)
    assert sorted(map(len, source.asked)) == [1, 2, 3, 4, 5]


def test_what_does_not_fit_is_asked_for_again():
    source, examples = Asked(), numbered(4)
    kept = KeptStates(source, 6)
    for _ in range(3):
        assert kept.states(examples).target_argmax.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert sorted(map(len, source.asked)) == [1, 2, 3, 4, 4, 4]  # ten rows are wanted, six are there


def test_workers_may_ask_at_once():
    examples = numbered(40)
    kept = KeptStates(Asked(), sum(range(41)))

    def right(start: int) -> bool:
        chosen = examples[start:] + examples[:start]
        return kept.states(chosen).target_argmax.tolist() == [token for example in chosen for token in example.tokens]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, [*range(40)] * 2))
    assert kept.used == kept.rows


def test_states_of_text_are_those_that_the_writer_handed_over(folder, text, reader):
    """To the last bit where a row does not depend on the pass's other rows."""
    examples, again = stored(folder), text_examples([text], 1024)
    found, wanted = kept_states(reader, TAPS, again).states(again), ShardStates().states(examples)
    ends = torch.tensor([len(example.tokens) for example in examples]).cumsum(0) - 1
    read = torch.ones(len(wanted.hidden), dtype=torch.bool).index_fill_(0, ends, False)
    answers = torch.tensor([number for example in examples for number in example.answers])
    before = torch.cat([answers[1:] >= 0, torch.tensor([False])])
    before[ends] = False
    if reader.rows_stand_alone:
        assert torch.equal(found.features[read], wanted.features[read]) and torch.equal(found.hidden[read], wanted.hidden[read])
        same = found.target_argmax[before] == wanted.target_argmax[before]
        assert same.all() if heads_read_bfloat16() else same.float().mean() > 0.98
    else:
        assert_close(found.features[read].float(), wanted.features[read].float(), rtol=2**-5, atol=2**-5)
        assert_close(found.hidden[read].float(), wanted.hidden[read].float(), rtol=2**-5, atol=2**-5)


def heads_read_bfloat16() -> bool:
    """Whether the kernel rounds what its products read. Where it does not, a pass that writes reads the last hidden states as they are, and
    who asks later has them rounded: near ties may fall otherwise."""
    return cpu_multiplies_bfloat16()


def test_the_same_draft_comes_of_text_and_of_shards(folder, text, directory, reader):
    """The same batches in the same order, weights to the last bit where the states are; through a second epoch of kept states."""
    again = text_examples([text], 1024)
    exact = reader.rows_stand_alone and heads_read_bfloat16()
    ours = trainer(directory, again, kept_states(reader, TAPS, again))
    theirs = trainer(directory, stored(folder), ShardStates())
    for one, other, _ in zip(ours.remaining(), theirs.remaining(), range(2 * len(list(ours.batches(0))) + 1)):
        assert one == without_place(other)
        assert ours.step(one) == pytest.approx(theirs.step(other), rel=0 if exact else 0.05)
    for one, other in zip(ours.parameters, theirs.parameters):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=0.05)


def test_a_source_that_keeps_nothing_trains_the_same_draft(text, directory, reader):
    again = text_examples([text], 1024)
    ours, theirs = (trainer(directory, again, KeptStates(TargetStates(reader, TAPS), rows)) for rows in (10**6, 0))
    for batch, _ in zip(ours.remaining(), range(2 * len(list(ours.batches(0))))):
        assert ours.step(batch) == pytest.approx(theirs.step(batch), rel=0 if reader.rows_stand_alone else 0.05)
