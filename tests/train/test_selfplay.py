"""Claims about self-written data: it is what the target says through its template, a function of (seed, index), and survives a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eyas.config import PLAIN, EyasError, Sampling
from eyas.decode.generate import Decoder
from eyas.model.target import Target
from eyas.model.weights import directory_hash
from eyas.train import selfplay
from eyas.train.features import shard_examples
from eyas.train.selfplay import (
    Finished,
    SelfPlay,
    Template,
    Writer,
    answer_tokens,
    claim_folder,
    data_folder,
    last_index,
    shard_metadata,
    write_own_data,
    write_shards,
)
from tests.tiny import byte_tokenizer, save_tiny_target, tiny_target

TAPS = (1, 2, 4)
END = 257  # <|im_end|> of the byte tokenizer
SETTINGS = SelfPlay("tiny", "chat", TAPS, longest_question=16, longest_answer=36, turns=(1,))
SHARDED = replace(SETTINGS, seeded_share=1.0, answer_temperatures=(1.0,))  # few are dropped, no two are alike
QUESTIONS = ["How can a hawk see?", "Why do owls fly at night and not by day?"]


@cache
def target() -> Target:
    """Says <|im_end|> often enough that questions and answers end by themselves."""
    loose = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False)
    loose.lm_head.weight[END] *= 1.6
    return loose.prepare()


@cache
def template() -> Template:
    return Template(byte_tokenizer(), (END,))


@cache
def forgetful() -> Target:
    """Its attention says nothing, so the next token hangs on the last one alone and greedy text soon runs in a circle."""
    loose = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False)
    for block in loose.model.layers:
        block.self_attn.o_proj.weight.zero_()
    return loose.prepare()


@torch.inference_mode()
def written(count: int, slots: int = 6, seed: int = 1, settings: SelfPlay = SETTINGS, questions=(), first: int = 0, by=target):
    found: list[Finished] = []
    for finished in Writer(by(), template(), settings, questions, slots).write(seed, first):
        found.append(finished)
        if len(found) == count:
            break
    return found


@cache
def forty() -> tuple[Finished, ...]:
    return tuple(written(40, questions=QUESTIONS))


def answer(finished: Finished) -> list[int]:
    return finished.row.tokens[finished.row.answers[0].start :]


def test_every_conversation_follows_the_template():
    """before + question + after + answer, and the whole reads back as the template writes it."""
    before, after, tokenizer = template().before, template().after, byte_tokenizer()
    assert tokenizer.decode(before).endswith("<|im_start|>user\n") and tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    asked, ended = set(), 0
    for finished in forty():
        tokens, start = finished.row.tokens, finished.row.answers[0].start
        assert tokens[: len(before)] == before and tokens[start - len(after) : start] == after
        question = tokens[len(before) : start - len(after)]
        assert 3 <= len(question) <= SETTINGS.longest_question
        assert not set(question) & template().ends and not set(answer(finished)[:-1]) & template().ends
        assert 8 <= len(answer(finished)) <= SETTINGS.longest_answer
        asked.add(tokenizer.decode(question))
        ended += answer(finished)[-1] == END
        assert len(finished.features) == len(finished.hidden) == len(finished.favourites) == len(tokens) - 1 == finished.row.read
    given = asked & {question[: SETTINGS.longest_question] for question in QUESTIONS}
    assert len(given) == 2 and len(asked) > 20 and ended > 3


def test_several_turns_follow_the_template_and_every_answer_is_marked():
    """Rendered by the template itself, the turns give the same text; each answer's mark covers it and its end-of-turn token."""
    settings = replace(SETTINGS, turns=(1, 3), longest=400)
    tokenizer, counts = byte_tokenizer(), []
    for finished in written(40, settings=settings, questions=QUESTIONS):
        row = finished.row
        counts.append(len(row.answers))
        assert len(finished.features) == len(row.tokens) - 1 and row.answers[-1].stop == len(row.tokens)
        assert row.numbers() == [number for number in row.numbers() if number < len(row.answers)]
        start, rebuilt = len(template().before), list(template().before)
        for number, places in enumerate(row.answers):
            if number:
                start = row.answers[number - 1].stop - 1 + len(template().again)
                rebuilt += template().again[1:]
            rebuilt += row.tokens[start : places.start - len(template().after)] + template().after + row.tokens[places.start : places.stop]
            last = row.tokens[places.stop - 1]
            assert last == END or number == len(row.answers) - 1
        assert rebuilt == row.tokens
    assert (
        1 in counts and 2 in counts and max(counts) <= 3 and tokenizer.decode(template().again).startswith("<|im_end|>\n<|im_start|>user")
    )


def test_answers_at_temperature_0_are_plain_greedy_decoding():
    greedy = [finished for finished in forty() if finished.row.temperature == 0]
    assert 4 < len(greedy) < 20
    prompts = [finished.row.tokens[: finished.row.answers[0].start] for finished in greedy]
    texts = []
    for texts in Decoder(target()).run(prompts, PLAIN, Sampling(), [0] * len(prompts), SETTINGS.longest_answer):  # noqa: B007
        pass
    for text, finished in zip(texts, greedy):
        own = answer(finished)
        assert own == text.tokens[text.prompt_length :][: len(own)]
        assert own[-1] == END or len(own) == SETTINGS.longest_answer or repeats(own)
        rows = slice(finished.row.answers[0].start - 1, finished.row.read)
        assert finished.favourites[rows].tolist() == own


def test_at_temperature_0_a_near_tie_goes_to_the_better_one():
    """Where a second token trails by less than sampling at a tiny temperature can tell apart."""
    writer = Writer(target(), template(), SETTINGS, (), 1)
    logits = torch.zeros(40, 263)
    logits[:, 5], logits[:, 9] = 7.00001, 7.0
    rows = [writer.begin(0, seed, 0) for seed in range(40)]
    for row in rows:
        row.asking, row.temperature = False, 0.0
    assert writer.choose(logits, rows) == [5] * 40


def test_the_questions_law_is_the_targets_within_top_p():
    """Every token sampled at temperature 1 lies in the nucleus of the target's law, and many are not its favourite."""
    sampled = [finished for finished in forty() if finished.row.temperature == 1.0]
    total = favourite = 0
    for finished in sampled:
        logits = finished.hidden.double() @ tiny_head().T  # hidden states were cut to bfloat16, hence the slack below
        for row in range(finished.row.answers[0].start - 1, finished.row.read):
            law = logits[row].softmax(-1)
            token = finished.row.tokens[row + 1]
            assert float(law[law > law[token]].sum()) < SETTINGS.answer_top_p + 0.01
            total, favourite = total + 1, favourite + (token == int(finished.favourites[row]))
    assert total > 50 and 0.05 < favourite / total < 0.95


@cache
def tiny_head() -> torch.Tensor:
    head = tiny_target(vocab_size=263, eos_token_ids=(END,), prepare=False).lm_head.weight.detach().clone()
    head[END] *= 1.6
    return head


def by_index(conversations) -> dict[int, list[int]]:
    return {finished.row.index: finished.row.tokens for finished in conversations}


@pytest.mark.parametrize("slots", [2, 11])
def test_a_conversation_is_a_function_of_seed_and_index(slots):
    wide, other = by_index(forty()), by_index(written(10, slots, questions=QUESTIONS))
    shared = wide.keys() & other.keys()
    assert len(shared) >= 8
    assert all(wide[index] == other[index] for index in shared)
    fresh = by_index(written(3, slots, questions=QUESTIONS, first=20))
    assert min(fresh) >= 20 and all(wide[index] == tokens for index, tokens in fresh.items() if index in wide)
    assert not set(map(tuple, wide.values())) & set(map(tuple, by_index(written(3, slots, seed=2)).values()))


def test_a_finished_slot_is_taken_by_the_next_conversation_at_once():
    """Every pass of the target reads all slots, and no index is begun twice or left out."""
    writer = Writer(target(), template(), SETTINGS, (), 4)
    begun, widths = [], []
    begin, step = writer.begin, writer.step

    def counted_begin(slot, seed, index):
        begun.append(index)
        return begin(slot, seed, index)

    def counted_step(rows):
        widths.append(len(rows))
        assert all(row.waiting for row in rows) and [row.read for row in rows] == writer.cache.lengths
        return step(rows)

    writer.begin, writer.step = counted_begin, counted_step
    with torch.inference_mode():
        found = [finished for finished, _ in zip(writer.write(5), range(9))]
    assert set(widths) == {4} and begun == list(range(len(begun)))
    assert len(begun) >= 9 + writer.dropped + 3  # three others were in flight when the last was finished
    assert len({finished.row.index for finished in found}) == 9


def repeats(tokens: list[int], gram: int = 16) -> int:
    """Length of the shortest beginning of `tokens` that holds the same 16 tokens in a row twice; 0 if none does."""
    seen = set()
    for end in range(gram, len(tokens) + 1):
        one = tuple(tokens[end - gram : end])
        if one in seen:
            return end
        seen.add(one)
    return 0


def test_a_loop_is_cut_where_sixteen_tokens_first_repeat():
    settings = replace(SHARDED, longest_answer=90, answer_temperatures=(0.0, 0.5))
    looping = written(40, 8, settings=settings, by=forgetful, questions=[*QUESTIONS, "And what of an eyas?", "Who?"])
    ends = [repeats(answer(finished)) for finished in looping]
    assert sum(map(bool, ends)) >= 6, "few answers looped: an empty claim"
    assert all(end in (0, len(answer(finished))) for end, finished in zip(ends, looping))


def test_a_small_context_ends_an_answer_and_is_never_passed():
    small = tiny_target(vocab_size=263, max_position_embeddings=96)
    writer, lengths = Writer(small, template(), SETTINGS, (), 5), []
    with torch.inference_mode():
        for finished in writer.write(1):
            lengths.append(len(finished.row.tokens))
            if len(lengths) == 5:
                break
    assert 90 < max(lengths) <= 96


# ---- shards ----


def conversations_in(paths) -> list[list[int]]:
    found = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths").tolist()
        found += [part.tolist() for part in tokens.split(lengths)]
    return found


@torch.inference_mode()
def write(folder, tokens: int, report=lambda written, dropped: None) -> int:
    return write_shards(Writer(target(), template(), SHARDED, QUESTIONS, 4), folder, 1, tokens, 5, report)


def files(folder) -> list:
    return sorted(folder.iterdir())


def test_a_stopped_run_goes_on_behind_its_last_shard(tmp_path):
    """Shards written before the stop are those of an uninterrupted run and stay as they are. Behind them every conversation is the one
    of its (seed, index), none comes twice, and all that is missing are the few that were in flight at the stop."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    every = by_index(written(40, slots=4, settings=SHARDED, questions=QUESTIONS))
    index_of = {tuple(tokens): index for index, tokens in every.items()}
    counts: list[int] = []
    assert write(whole, 460, lambda written, dropped: counts.append(written)) == counts[-1] >= 460
    assert len(counts) >= 3

    def stop(now, dropped):
        if now == counts[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(parts, 460, stop)
    assert [file.name for file in files(parts)] == ["00000001-00000.safetensors", "00000001-00001.safetensors"]
    for ours, theirs in zip(files(parts), files(whole)):
        assert shard_metadata(ours) == shard_metadata(theirs)
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = [file.read_bytes() for file in files(parts)]
    assert write(parts, 460) >= 460
    assert [file.read_bytes() for file in files(parts)[:2]] == before
    assert [file.name for file in files(parts)] == [f"00000001-{number:05d}.safetensors" for number in range(len(files(parts)))]
    resumed = [index_of[tuple(tokens)] for tokens in conversations_in(files(parts))]
    assert len(set(resumed)) == len(resumed) == 5 * len(files(parts))
    last = max(resumed[:10])
    assert last == max(map(last_index, files(parts)[:2])) and min(resumed[10:]) > last
    lost = {index for index in every if index <= last} - set(resumed)
    assert len(lost) <= 3  # slots but for the one that finished last


def test_enough_data_is_not_written_again(tmp_path):
    write(tmp_path, 200)
    before = {file.name: file.stat().st_mtime_ns for file in files(tmp_path)}
    assert write(tmp_path, 200) == sum(map(answer_tokens, files(tmp_path)))
    assert {file.name: file.stat().st_mtime_ns for file in files(tmp_path)} == before


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch):
    save = selfplay.save_file

    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(selfplay, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 100)
    assert list(tmp_path.glob("*.safetensors")) == []
    monkeypatch.undo()
    assert write(tmp_path, 100) >= 100
    assert sum(len(example.tokens) for example in shard_examples(sorted(tmp_path.glob("*.safetensors")), 1024)) > 100


def test_answer_tokens_are_counted(tmp_path):
    written_ = write(tmp_path, 100)
    examples = shard_examples(files(tmp_path), 1024)
    assert written_ == sum(number >= 0 for example in examples for number in example.answers)


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
    changed = [replace(SETTINGS, **change) for change in ({"target": "x"}, {"taps": (0, 1, 2)}, {"seed_prompts": "f"}, {"version": 4})]
    folders = [data_folder(settings) for settings in (SETTINGS, *changed)]
    assert len(set(folders)) == 5 and all(folder.is_relative_to(tmp_path) for folder in folders)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EyasError, match=r"cannot write .* set EYAS_CACHE to a directory that can be written"):
        claim_folder(tmp_path / "file" / "cache", SETTINGS)


def test_a_template_that_hides_the_question_is_refused():
    with pytest.raises(EyasError, match="does not show a user turn as it is written; train from conversations with --data"):
        Template(byte_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}"), (END,))


def test_two_workers_write_until_there_is_enough(tmp_path):
    """Real processes on a saved target; a second call finds the data there and starts none."""
    directory = save_tiny_target(tmp_path / "target")
    settings = replace(SETTINGS, target=directory_hash(directory))
    told: list[int] = []
    write_own_data(directory, tmp_path / "data", settings, (), 300, 2, told.append)
    shards = sorted((tmp_path / "data").glob("*.safetensors"))
    assert sum(map(answer_tokens, shards)) >= 300 and told == sorted(told)
    assert {shard.name[:8] for shard in shards} <= {"00000001", "00000002"}
    examples = shard_examples(shards, 1024)
    assert all(example.tokens[: len(template().before)] == template().before for example in examples)
    assert len({tuple(example.tokens) for example in examples}) == len(examples)  # the two have seeds of their own
    names = [shard.name for shard in shards]
    write_own_data(directory, tmp_path / "data", settings, (), 300, 2, told.append)
    assert told[-1] == 300 and [shard.name for shard in sorted((tmp_path / "data").glob("*.safetensors"))] == names
