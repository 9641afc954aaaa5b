"""Claims about training examples: what self-play handed over is what a fresh pass of the target computes, row by row."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from eyas.train.conversations import Document, draft_vocabulary
from eyas.train.features import Example, ShardStates, TargetStates, document_examples, shard_examples
from eyas.train.questions import Asked, SelfPlay
from eyas.train.selfplay import Writer
from eyas.train.shards import save_shard
from eyas.train.template import Template
from eyas.train.unroll import loss_anchors
from tests.tiny import byte_tokenizer, tiny_target

TAPS = (1, 2, 4)
END = 257  # <|im_end|> of the byte tokenizer
SETTINGS = SelfPlay("tiny", "chat", TAPS, seeded_share=0.8, longest_question=20, longest_answer=40, turns=(1,))


@cache
def target():
    return tiny_target(dtype=torch.float32, vocab_size=263, eos_token_ids=(END,))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of six conversations, most of them asked from a list."""
    folder = tmp_path_factory.mktemp("shards")
    template = Template(byte_tokenizer(), target().config.eos_token_ids)
    writer = Writer(target(), template, SETTINGS, [Asked(("How can a hawk see so far?",))], slots=5)
    made = []
    with torch.inference_mode():
        for _, finished in writer.write(itertools.count(3)):
            made += [finished] if finished is not None else []
            if len(made) == 12:
                break
    paths = [folder / "00000000.safetensors", folder / "00000001.safetensors"]
    for path, part in zip(paths, (made[:6], made[6:])):
        save_shard(path, part, target().config.hidden_size)
    return paths, made


def bfloat16_close(found, expected) -> None:
    """Equal to a unit in the last place of bfloat16: the pass had other rows, so float32 rounds differently before the cut."""
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-5)


def read_rows(example: Example) -> int:
    return len(example.tokens) - 1  # the last token was written and never read


def test_what_was_handed_over_is_what_a_fresh_pass_computes(shards):
    examples = shard_examples(shards[0], max_length=1024)
    assert len(examples) == 12
    stored, fresh = ShardStates().states(examples), TargetStates(target(), TAPS).states(examples)
    start = 0
    for example in examples:
        rows = slice(start, start + read_rows(example))
        bfloat16_close(stored.features[rows], fresh.features[rows])
        bfloat16_close(stored.hidden[rows], fresh.hidden[rows])
        assert not stored.features[rows.stop].any() and not stored.hidden[rows.stop].any()
        start += len(example.tokens)
    assert start == len(stored.features) == len(fresh.features)


def test_favourites_agree_at_every_row_that_teaches(shards):
    examples = shard_examples(shards[0], max_length=1024)
    stored, fresh = ShardStates().states(examples), TargetStates(target(), TAPS).states(examples)
    start = taught = 0
    for example in examples:
        slots, counted = loss_anchors(torch.tensor(example.answers), [len(example.tokens)])
        teachers = torch.cat([torch.arange(slot + 1, slot + 1 + steps) for slot, steps in zip(slots.tolist(), counted.tolist())]).unique()
        assert torch.equal(stored.target_argmax[start + teachers], fresh.target_argmax[start + teachers])
        assert bool((stored.target_argmax[start + teachers] >= 0).all())
        taught += len(teachers)
        start += len(example.tokens)
    assert taught > 100


def test_examples_of_one_shard_may_be_asked_in_any_order(shards):
    examples = shard_examples(shards[0], max_length=1024)
    some = [examples[index] for index in (11, 0, 7, 7)]
    together = ShardStates().states(some)
    alone = [ShardStates().states([example]) for example in some]
    for column, parts in zip(together, zip(*alone)):
        assert torch.equal(column, torch.cat(parts))


def test_answers_cover_the_answer_and_nothing_else(shards):
    paths, made = shards
    template = Template(byte_tokenizer(), target().config.eos_token_ids)
    for example, finished in zip(shard_examples(paths, max_length=1024), made):
        assert example.tokens == finished.row.tokens and example.greedy == (finished.row.start.temperature == 0)
        first = finished.row.answers[0].start
        assert example.answers == [-1] * first + [0] * (len(example.tokens) - first)
        assert example.tokens[first - len(template.after) : first] == template.after


@pytest.mark.parametrize("max_length", [50, 60, 75, 90])
def test_examples_are_cut_at_max_length_and_dropped_where_too_little_is_left(shards, max_length):
    paths, made = shards
    cut = shard_examples(paths, max_length)
    kept = [finished.row for finished in made if min(max_length, len(finished.row.tokens)) - finished.row.answers[0].start >= 8]
    assert [example.tokens for example in cut] == [row.tokens[:max_length] for row in kept]
    assert all(len(example.answers) == len(example.tokens) and example.answers[-8:] == [0] * 8 for example in cut)
    if cut:  # rows are still found where they lie
        stored, fresh = ShardStates().states(cut), TargetStates(target(), TAPS).states(cut)
        start = 0
        for example in cut:
            rows = slice(start, start + read_rows(example))
            bfloat16_close(stored.hidden[rows], fresh.hidden[rows])
            start += len(example.tokens)


def test_a_pass_over_many_documents_is_each_documents_own():
    draw = torch.Generator().manual_seed(0)
    documents = [Document(torch.randint(0, 263, (size,), generator=draw).tolist(), [-1] * 3 + [0] * (size - 3)) for size in (9, 4, 17)]
    exact = tiny_target(vocab_size=263)
    source = TargetStates(exact, TAPS)
    examples = document_examples(documents)
    together = source.states(examples)
    alone = [source.states([example]) for example in examples]
    for column, parts in zip(together, zip(*alone)):
        assert_close(column, torch.cat(parts))
    for example, states in zip(examples, alone):
        asked = [number >= 0 for number in example.answers[1:]] + [False]
        assert (states.target_argmax >= 0).tolist() == asked


def test_the_draft_vocabulary_of_self_written_data_holds_its_answers(shards):
    documents = [Document(example.tokens, example.answers) for example in shard_examples(shards[0], 1024)]
    said = {token for document in documents for token, number in zip(*document) if number >= 0}
    ids = draft_vocabulary(documents, len(said | {END}), 263, always=(END,))
    assert set(ids) == said | {END}
