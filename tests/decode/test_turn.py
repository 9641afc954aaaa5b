"""The turn: sequences with settings of their own come, are served and go between rounds, and none notices the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eyas.config import PLAIN, Sampling, TreeShape
from eyas.decode.generate import PROMPT_PART, Decoder, rows_of
from eyas.decode.plan import clock
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.planner import FixedPlan, Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.plan.store import PlanStore
from eyas.decode.processors import LogitsProcessor
from eyas.decode.sampling import Noise
from eyas.decode.sequence import Sequence, result_of
from eyas.decode.text import TextStream
from eyas.decode.tree import Tree
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.drafters.lookup import LookupDrafter
from eyas.engine import Engine
from eyas.kernels.captured import Graph
from eyas.model.rows import chain_rows
from tests.tiny import byte_tokenizer, tiny_draft, tiny_target

V = 53
TARGET = tiny_target(eos_token_ids=(3, 7, 12))
LONG = tiny_target(max_position_embeddings=2048)
TREE, CHAIN = TreeShape.parse("8x2x3"), TreeShape.parse("chain:3")


def merged(target) -> CopyingDrafter:
    return CopyingDrafter(Eagle3Drafter(*tiny_draft(target)))


def repeated_less(strength: float) -> LogitsProcessor:
    """A penalty on all tokens so far: it depends on the path, so every node of a tree has its own."""

    def process(text: list[int], path: Items[int], logits_V: Tensor) -> Tensor:
        counts = torch.bincount(torch.tensor([*text, *path]), minlength=len(logits_V)).to(logits_V)
        return logits_V - strength * counts

    return process


def sequence(number: int, target=TARGET, **settings) -> Sequence:
    """Number decides its prompt, seed, temperature, length and tree."""
    rng = random.Random(number)
    tokens = [rng.randrange(V) for _ in range(rng.randint(1, 9))]
    sampling = rng.choice([Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9)])
    shape = rng.choice([PLAIN, TREE, CHAIN])
    return Sequence(tokens, len(tokens) + rng.randint(3, 14), Noise(number, V), sampling, shape, number=number, **settings)


def alone(number: int, target=TARGET, **settings) -> list[int]:
    """What plain decoding writes for it."""
    decoder, wanted = Decoder(target), sequence(number, target, **settings)
    wanted.shape = PLAIN
    for _ in decoder.run_all([wanted]):
        pass
    return wanted.tokens


def serve(decoder: Decoder, sequences: list[Sequence], slots: int, between: Callable[[int], None] = lambda turn: None) -> int:
    """Admit them one after the other, one a turn; the number of turns."""
    decoder.reserve(slots, max(each.limit for each in sequences), [TREE, CHAIN, PLAIN])
    waiting, turns = list(sequences), 0
    while waiting or decoder.busy:
        if waiting:
            decoder.admit(waiting.pop(0))
        decoder.step()
        between(turns)
        turns += 1
    return turns


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_batch_mixes_settings_and_each_text_is_what_it_is_alone(slots):
    sequences = [sequence(number) for number in range(14)]
    serve(Decoder(TARGET, merged(TARGET)), sequences, slots)
    assert [each.tokens for each in sequences] == [alone(number) for number in range(14)]
    assert len({(each.sampling, each.shape) for each in sequences}) > 4, "they must differ"
    assert any(length > 1 for each in sequences for length in each.accepted_lengths), "nothing was ever accepted: an empty claim"


@pytest.mark.parametrize("make", [merged, lambda target: ModelDrafter(target, V), lambda target: LookupDrafter()])
def test_a_processor_of_logits_has_its_own_value_at_every_node(make):
    """Text under a penalty that depends on the path is plain decoding's under the same."""
    settings = {"processors": (repeated_less(1.5),)}
    sequences = [sequence(number, **settings) for number in range(10)]
    for each in sequences:
        each.shape = TREE
    serve(Decoder(TARGET, make(TARGET)), sequences, 4)
    wanted = [alone(number, **settings) for number in range(10)]
    assert [each.tokens for each in sequences] == wanted
    assert wanted != [alone(number) for number in range(10)], "the penalty must matter"


def test_an_aborted_sequence_leaves_at_once_and_the_others_are_what_they_are_alone():
    sequences, decoder = [sequence(number) for number in range(10)], Decoder(TARGET, merged(TARGET))

    def between(turn: int) -> None:
        if turn == 3:
            for number in (0, 1, 5):  # decoding or done, decoding, not even admitted or waiting
                decoder.abort(sequences[number])
                assert sequences[number].finish_reason

    decoder.reserve(2, max(each.limit for each in sequences), [TREE, CHAIN, PLAIN])
    for each in sequences:
        decoder.admit(each)
    for turn in range(1000):
        if not decoder.busy:
            break
        decoder.step()
        between(turn)
    assert sorted(decoder.free) == [0, 1] and not decoder.busy
    for number, each in enumerate(sequences):
        wanted = alone(number)
        assert each.tokens == wanted[: len(each.tokens)]
        assert each.finish_reason == "aborted" or each.tokens == wanted
    assert sequences[5].finish_reason == "aborted" and result_of(sequences[5]).tokens == []
    assert sum(each.finish_reason == "aborted" for each in sequences) >= 2


def test_abort_while_a_prompt_is_read_frees_its_slot_and_the_next_one_is_right():
    prompt = [number % V for number in range(3 * PROMPT_PART)]
    long = Sequence(list(prompt), len(prompt) + 5, Noise(1, V), shape=TREE)
    short, decoder = sequence(4), Decoder(LONG, merged(LONG))
    decoder.reserve(1, long.limit, [TREE, CHAIN, PLAIN])
    decoder.admit(long)
    decoder.admit(short)
    decoder.step()
    assert long.read == PROMPT_PART and decoder.reading
    decoder.abort(long)
    assert not decoder.reading and decoder.free == [0]
    while decoder.busy:
        decoder.step()
    assert decoder.free == [0]
    assert short.tokens == alone(4, LONG) and result_of(long).finish_reason == "aborted"


def test_slots_go_to_those_who_wait_in_the_order_they_came_and_who_is_done_cannot_be_aborted():
    sequences, decoder, done = [sequence(number) for number in range(6)], Decoder(TARGET), []
    decoder.reserve(1, max(each.limit for each in sequences), [PLAIN])
    for each in sequences:
        decoder.admit(each)
    while decoder.busy:
        decoder.step()
        done += [each.number for each in sequences if each.finish_reason and each.number not in done]
    assert done == list(range(6))
    reasons = [each.finish_reason for each in sequences]
    for each in sequences:
        decoder.abort(each)
    assert [each.finish_reason for each in sequences] == reasons and decoder.free == [0]


class Oracle:
    """Knows the text: at each of two levels it makes a wrong guess and then the right one. Remembers what it hears."""

    def __init__(self, text: list[int], wants: tuple[int, ...]) -> None:
        self.text, self.wants = text, wants
        self.tokens: list[int] = []
        self.features: list[Tensor] = []

    def reserve(self, sequences: int, capacity: int) -> None: ...

    def forget(self, sequence: int) -> None: ...

    def observe(self, sequence: int, tokens, features) -> None:
        self.tokens += tokens
        self.features.append(features)

    def propose(self, requests) -> list[Tree]:
        (request,) = requests
        tree = ([request.root], [-1], [0], [0.0])
        for depth, token in enumerate(self.text[request.position + 1 :][: request.shape.depth + 1][:2], 1):
            for parts, pair in zip(tree, ([(token + 1) % V, token], [2 * depth - 2] * 2, [depth] * 2, [-1.0 * depth] * 2), strict=True):
                parts += pair
        return [Tree(*tree)]


def heard_oracle(part: int, plan: FixedPlan | None = None) -> tuple[Sequence, Oracle]:
    """A text whose prompt was read in such parts, and a drafter that was always right."""
    prompt = [(5 * number) % V for number in range(23)]
    plain, text = (Sequence(list(prompt), len(prompt) + 15, Noise(8, V), Sampling(1.0), shape) for shape in (PLAIN, TREE))
    for _ in Decoder(LONG).run_all([plain]):
        pass
    drafter = Oracle(plain.tokens, Eagle3Drafter(*tiny_draft(LONG)).wants)
    decoder = Decoder(LONG, drafter, plan=plan)
    decoder.reserve(1, text.limit, [TREE])
    decoder.admit(text)
    decoder.seat()
    while decoder.reading:
        decoder.read_prompt(part)
    while decoder.busy:
        decoder.step()
    assert text.tokens == plain.tokens and text.accepted_lengths[3] >= 4
    return text, drafter


@pytest.mark.parametrize("part", [1, 5, 23, 40])
def test_a_drafter_hears_each_token_once_and_what_the_target_makes_of_it_however_it_was_read(part):
    """In parts of a prompt, or in a tree whose right nodes lie between wrong ones."""
    text, drafter = heard_oracle(part)
    assert drafter.tokens == text.tokens[: len(drafter.tokens)] and len(drafter.tokens) > text.prompt_length + 9
    read = chain_rows(0, drafter.tokens[:-1], 0)
    torch.testing.assert_close(torch.cat(drafter.features), LONG(read, LONG.new_cache(1, 64), drafter.wants).features)


def test_a_text_that_ends_gives_what_a_stop_string_might_have_taken():
    ended = Sequence([1], 3, Noise(0, V), stream=TextStream(byte_tokenizer(), ["zz"]))
    for letter in "az":
        assert ended.stream.certain() == ("" if letter == "a" else "a")
        ended.commit(byte_tokenizer()(letter, add_special_tokens=False)["input_ids"], ())
    assert ended.finish_reason == "length" and ended.stream.certain() == "z"


def test_a_long_prompt_is_read_by_the_draft_as_it_is_by_the_target():
    """So the first tree waits for less than two parts of it, however long it is."""
    prompt = [(7 * number) % V for number in range(4 * PROMPT_PART + 9)]
    sequence = Sequence(list(prompt), len(prompt) + 12, Noise(3, V), Sampling(1.0), TREE)
    drafter = Eagle3Drafter(*tiny_draft(LONG))
    decoder = Decoder(LONG, drafter)
    decoder.reserve(1, sequence.limit, [TREE])
    decoder.admit(sequence)
    while not decoder.decoding:
        decoder.step()
        assert len(drafter.pending[0].tokens) < 2 * PROMPT_PART
    assert drafter.cache.lengths[0] >= 3 * PROMPT_PART
    while decoder.busy:
        decoder.step()
    plain = Sequence(list(prompt), len(prompt) + 12, Noise(3, V), Sampling(1.0))
    for _ in Decoder(LONG).run_all([plain]):
        pass
    assert sequence.tokens == plain.tokens


def test_others_go_on_while_a_caller_reads_a_long_prompt_in_turns_of_its_own():
    prompt = [number % V for number in range(2 * PROMPT_PART)]
    long, short = Sequence(list(prompt), len(prompt) + 4, Noise(1, V)), Sequence([1, 2], 40, Noise(2, V))
    decoder = Decoder(LONG)
    decoder.reserve(2, long.limit, [PLAIN])
    decoder.admit(short)
    decoder.step()
    decoder.admit(long)
    decoder.seat()
    while decoder.reading:
        before = len(short.tokens)
        decoder.read_prompt(64)
        decoder.decode()
        assert len(short.tokens) == before + 1
    assert long.read == len(prompt)


# ---- what is planned ----


class Pinned(Prices):
    def record(self, rows: int, seconds: float) -> None:
        """The clock of a test says nothing."""


def test_a_planner_keeps_its_rate_for_each_number_of_sequences():
    """Sequences come and go all the time: what eight taught is not forgotten while there are seven."""

    def rate_after(sizes: list[int]) -> float:
        plan = Planner(Pinned({1: 1.0, 64: 1.5}), Pinned({1: 0.05}), Calibration(frozen=True))
        for size in sizes:
            plan.begin(size)
            plan.record(3 * size, 1.0, 3 * size, 1.2)
        plan.begin(8)
        return plan.rate

    steady, alternating, hope = rate_after([8] * 40), rate_after([8, 7] * 40), rate_after([])
    assert alternating == pytest.approx(steady) and steady > 1.5 * hope


def test_calls_share_what_was_learned_and_nothing_of_a_round_under_way(monkeypatch, tmp_path):
    """Two streams of one engine take turns: each one's rounds are its own, and so are its pauses."""
    monkeypatch.setattr("eyas.decode.plan.store.time_passes", lambda target: {1: 1.0, 64: 1.0})
    store = PlanStore(type("", (), {"device": "cpu"})(), Path("target"), None, "fp32")
    one, other = (store.planner("eagle3", Sampling()) for _ in range(2))
    for _ in range(60):  # guessing loses in one of them until it pauses
        one.begin(4)
        one.record(4, 1.0, 4, 1.0 if not one.guesses else 1.3)
    assert not one.guesses
    one.begin(1)
    other.begin(4)  # between the other's begin and end
    assert other.guesses, "a pause is its call's own"
    one.record(1, 1.0, 1000, 1.0)
    assert other.recent.tokens == 0 and other.sizes.keys() == {4} and one.recent.tokens > 0
    assert one.pauses.gain is not other.pauses.gain


def test_streams_of_one_engine_taken_in_turns_are_what_they_are_alone():
    engine = Engine(tiny_target(prepare=False, vocab_size=300), byte_tokenizer(), Path("tiny"), None, "fp32")
    settings = {"raw": True, "temperature": 1.0, "max_new_tokens": 24, "method": "lookup", "tree": "8x2x3"}
    watched: list[list[int]] = [[], []]
    streams = [
        engine.stream("aba aba aba", seed=seed, watch=lambda record, own=watched[seed]: own.extend(record.committed), **settings)
        for seed in range(2)
    ]
    results: list = [None, None]
    while None in results:
        for number, stream in enumerate(streams):
            if results[number] is None and not isinstance(piece := next(stream), str):
                results[number] = piece
    for seed, result in enumerate(results):
        assert result.tokens == engine.generate("aba aba aba", seed=seed, **settings).tokens
        assert watched[seed] == result.tokens[1:], "each stream's rounds are told to its own watcher"


def test_a_stream_that_is_closed_early_keeps_what_its_rounds_taught(monkeypatch):
    saved = []
    monkeypatch.setattr(PlanStore, "save", lambda self: saved.append(self))
    monkeypatch.setattr("eyas.decode.plan.store.time_passes", lambda target: {1: 1.0, 64: 2.0})
    engine = Engine(tiny_target(prepare=False, vocab_size=300), byte_tokenizer(), Path("tiny"), None, "fp32")
    stream = engine.stream("aba aba", raw=True, method="lookup", max_new_tokens=40)
    next(stream)
    stream.close()
    assert saved == [engine.plans]


def test_a_plan_that_plans_nothing_is_asked_and_says_nothing():
    plan, trees = FixedPlan(), []
    plan.begin(3)
    assert plan.guesses and plan.planner is None and plan.cut(trees) is trees


def test_a_plan_is_told_what_each_round_read_and_brought_and_what_came_of_its_guesses():
    class Told(FixedPlan):
        rounds: list[tuple[int, int]] = []  # noqa: RUF012 (made for one run)
        walks: list[tuple[int, int]] = []  # noqa: RUF012

        def record(self, rows, pass_seconds, tokens, seconds):
            self.rounds.append((rows, tokens))

        def judge(self, tree, path):
            self.walks.append((len(tree), len(path)))

    told = Told()
    text, _ = heard_oracle(40, told)
    assert [rows for rows, _ in told.rounds] == [rows for rows, _ in told.walks] and len(told.rounds) == text.rounds
    assert told.rounds[0] == told.walks[0] == (5, 3)
    assert sum(tokens for _, tokens in told.rounds) == len(text.tokens) - text.prompt_length - 1, "the first is drawn behind the prompt"


def test_a_round_in_which_a_core_was_taken_away_teaches_nothing(monkeypatch):
    class Told(FixedPlan):
        taught: list[tuple] = []  # noqa: RUF012 (made for one test)

        def record(self, *what):
            self.taught.append(what)

    told, taken = Told(), iter([3, 3, 3, 4, 4, 4])
    monkeypatch.setattr(clock, "cores_taken", lambda: next(taken))
    monkeypatch.setattr(clock.RoundClock, "disturbances", clock.Disturbances())
    for _ in range(3):
        told.begin(1)
        told.ends(4, 2)
    assert len(told.taught) == 2, "not the second, while which a core was taken"


def test_where_every_round_loses_cores_those_that_lose_no_more_than_usual_teach():
    disturbances = clock.Disturbances()
    left_out = [disturbances.more_than_usual(3, 0.07) for _ in range(60)]
    assert left_out[0] and not any(left_out[30:]), "what is usual is learned within some rounds"
    assert disturbances.more_than_usual(5, 0.07), "more than usual"
    assert not disturbances.more_than_usual(3, 0.07)
    assert not disturbances.more_than_usual(5, 0.14), "no oftener, only longer"


def test_a_round_that_captured_a_graph_teaches_nothing(monkeypatch):
    class Told(FixedPlan):
        taught: list[tuple] = []  # noqa: RUF012 (made for one test)

        def record(self, *what):
            self.taught.append(what)

    told = Told()
    monkeypatch.setattr(Graph, "made", 2)
    for made in (3, 4, 4):
        told.begin(1)
        monkeypatch.setattr(Graph, "made", made)
        told.ends(4, 2)
    assert len(told.taught) == 1, "the third's graphs were all there"
    told.taught.clear()
    monkeypatch.setattr(told, "stop", lambda: (1.0, 2.5))
    told.ends(4, 2)
    assert told.taught == [(4, 1.0, 2, 2.5)], "rows, seconds of the pass, tokens, seconds of the round"


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 1, 2], [0, 2, 4]])
def test_of_a_trees_features_the_paths_rows_stay(path):
    features = torch.arange(10).view(5, 2)
    assert torch.equal(rows_of(features, path), features[path])
