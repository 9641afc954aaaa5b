"""The promise: speculation never changes the text, at any temperature, with any draft, tree or batch, however it ends."""

from __future__ import annotations

import itertools
import random
import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eyas.config import PLAIN, VERIFIERS, EyasError, Sampling, TreeShape
from eyas.decode import sampling as noise_of
from eyas.decode.generate import Decoder
from eyas.decode.sampling import derived_seed, distribution
from eyas.decode.sequence import Result, result_of
from eyas.drafters.copying import CopyingDrafter
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.drafters.lookup import LookupDrafter
from eyas.engine import Engine
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.rows import chain_rows
from eyas.model.vocab import DraftVocab
from tests.enumeration import surprise
from tests.tiny import randomize, tiny_draft, tiny_target

V = 53
TARGET = tiny_target()
ENDING = tiny_target(eos_token_ids=(3, 7, 12, 23, 30, 41, 50))  # the same weights; its texts end at different times
SAMPLINGS = [Sampling(), Sampling(0.5, top_p=0.95), Sampling(1.0, top_p=0.9), Sampling(1.5, top_p=0.8)]


def eagle3(target):
    return Eagle3Drafter(*tiny_draft(target))


def merged(target):
    """EAGLE-3's tree and look-up's in one pass."""
    return CopyingDrafter(eagle3(target))


def itself(target):
    """The target as its own draft: whole paths are accepted."""
    return ModelDrafter(target, target.config.vocab_size)


DRAFTERS = {
    "eagle3-chain": (eagle3, "chain:3"),
    "eagle3-tree": (eagle3, "8x2x3"),
    "eagle3-large": (eagle3, "60x7x10"),
    "lookup": (lambda target: LookupDrafter(), "8x2x3"),
    "draft-model": (lambda target: ModelDrafter(target.shallow(3), V), "8x2x3"),
    "merged": (merged, "12x2x3"),
    "itself": (itself, "9x3x2"),
    "eagle3-static": (eagle3, "static:3.2.1.0.1.1"),
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 12 tokens; every other one repeats itself, so that look-up finds something."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    return [(prompt[:3] * 4)[: len(prompt)] if i % 2 else prompt for i, prompt in enumerate(drawn)]


def decode(target, drafter, prompts, shape, sampling, seeds, length=12, tokenizer=None, stops=(), verifier="walk") -> list[Result]:
    shape = TreeShape.parse(shape) if isinstance(shape, str) else shape
    *_, texts = Decoder(target, drafter, verifier).run(prompts, shape, sampling, seeds, length, tokenizer, stops)
    return [result_of(text) for text in texts]


def plainly(target, prompts, sampling, seeds, *rest) -> list[Result]:
    return decode(target, None, prompts, PLAIN, sampling, seeds, *rest)


def said(results: list[Result]) -> list[tuple]:
    return [(result.tokens, result.text, result.finish_reason) for result in results]


# ---- tree output is plain output: 32 cases of 20 (prompt, seed) pairs each, 640 in all ----


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_tree_output_is_plain_output(name, sampling):
    make, shape = DRAFTERS[name]
    case = list(DRAFTERS).index(name) * len(SAMPLINGS) + SAMPLINGS.index(sampling)
    asked, seeds = prompts(20, case), [derived_seed(case, i) for i in range(20)]
    plain = plainly(ENDING, asked, sampling, seeds)
    fast = decode(ENDING, make(ENDING), asked, shape, sampling, seeds)
    assert said(fast) == said(plain)
    assert max(max(result.accepted_lengths, default=0) for result in fast) > 1, "nothing was ever accepted: an empty claim"
    assert len({len(result.tokens) for result in plain}) > 1, "sequences must end at different times"


@pytest.mark.parametrize("shape", ["chain:1", "chain:6", "2x0x1", "5x0x4", "3x5x2"])
def test_odd_shapes_keep_the_text(shape):
    asked, seeds = prompts(8, 99), range(8)
    for sampling in (SAMPLINGS[0], SAMPLINGS[2]):
        assert said(decode(ENDING, eagle3(ENDING), asked, shape, sampling, seeds)) == said(plainly(ENDING, asked, sampling, seeds))


def test_a_prompt_longer_than_one_prefill_pass_keeps_the_text():
    long = tiny_target(max_position_embeddings=1024)
    asked = [[token % V for token in range(300)], list(range(9)), [(token * 7) % V for token in range(600)]]
    assert said(decode(long, eagle3(long), asked, "8x2x3", Sampling(1.0), [1, 2, 3])) == said(
        plainly(long, asked, Sampling(1.0), [1, 2, 3])
    )


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]], ids=str)
def test_a_sequence_in_a_batch_is_what_it_is_alone(sampling):
    asked, seeds = prompts(8, 5), [derived_seed(11, i) for i in range(8)]
    together = decode(ENDING, merged(ENDING), asked, "8x2x3", sampling, seeds)
    alone = [decode(ENDING, merged(ENDING), [prompt], "8x2x3", sampling, [seed])[0] for prompt, seed in zip(asked, seeds)]
    assert said(together) == said(alone)
    assert [result.accepted_lengths for result in together] == [result.accepted_lengths for result in alone]


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]], ids=str)
@pytest.mark.parametrize("make", [None, merged, itself])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_texts_that_take_the_slots_of_finished_ones_are_what_they_are_alone(sampling, make, batch):
    asked, seeds = prompts(12, 5), [derived_seed(11, i) for i in range(12)]
    shape = TreeShape.parse("8x2x3") if make else PLAIN
    decoder, most = Decoder(ENDING, make and make(ENDING)), 0
    for texts in decoder.run(asked, shape, sampling, seeds, 12, batch=batch):
        most = max(most, sum(text.slot >= 0 and not text.finish_reason for text in texts))
        assert len({text.slot for text in texts if text.slot >= 0 and not text.finish_reason}) <= batch
    assert decoder.cache.slots == min(batch, 12) and most >= min(batch, 11)  # one ends before its first round
    assert said([result_of(text) for text in texts]) == said(plainly(ENDING, asked, sampling, seeds))


def test_a_decoder_can_be_used_again():
    decoder, asked, runs = Decoder(ENDING, merged(ENDING)), prompts(5, 6), []
    for count in (5, 3, 5):
        *_, texts = decoder.run(asked[:count], TreeShape.parse("8x2x3"), Sampling(1.0), range(5), 12)
        runs.append([text.tokens for text in texts])
    assert runs[0] == runs[2]
    assert runs[1] == runs[0][:3]


# ---- a text with a tokenizer: one letter a token ----

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@cache
def letters() -> PreTrainedTokenizerFast:
    """Like tests.tiny.byte_tokenizer, with the target's 53 tokens: letters and a space."""
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS + "Ġ")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_an_engine_derives_one_seed_a_prompt_and_each_text_is_what_its_seed_gives_alone():
    engine = Engine(tiny_target(prepare=False), letters(), Path("tiny"), None, "fp32")
    asked = ["hawk", "an eyas", "aba aba ab", "x"]
    settings = {"raw": True, "temperature": 1.0, "max_new_tokens": 12, "tree": "5x2x2"}
    for method in ("lookup", "draft-model", "plain"):
        together = engine.generate(asked, method=method, seed=7, **settings)
        assert [result.seed for result in together] == [derived_seed(7, i) for i in range(4)]
        alone = [engine.generate(prompt, method="plain", seed=derived_seed(7, i), **settings) for i, prompt in enumerate(asked)]
        assert said(together) == said(alone)
    pieces = list(engine.stream("aba aba ab", method="lookup", seed=derived_seed(7, 2), **settings))
    assert "".join(pieces[:-1]) == pieces[-1].text == together[2].text


# ---- how a text ends ----


START = [34, 29]  # greedy decoding goes on from here for 17 tokens before it loops


@cache
def long_text(sampling: Sampling) -> Result:
    """What plain decoding writes when nothing ends it but its length."""
    return plainly(TARGET, [START], sampling, [5], 30, letters())[0]


ENDED = [Sampling(), Sampling(1.0)]


@pytest.mark.parametrize("sampling", ENDED, ids=str)
def test_an_end_of_turn_id_inside_an_accepted_path_ends_the_text_as_plain(sampling):
    cut_paths = 0
    for token in dict.fromkeys(long_text(sampling).tokens):
        place = long_text(sampling).tokens.index(token)
        ending = tiny_target(eos_token_ids=(token,))
        case = ([START], "chain:5", sampling, [5], 30, letters())
        fast = decode(ending, itself(ending), *case)[0]
        expected = long_text(sampling).tokens[: place + 1]
        assert said([fast]) == said([plainly(ending, *case[:1], *case[2:])[0]])
        assert fast.tokens == expected and fast.finish_reason == "stop"
        assert fast.text == letters().decode(expected[:-1]), "an end-of-turn id is a token, not text"
        cut_paths += place % 6 not in (0,)  # prefill draws one token, then each round commits six
    assert cut_paths > 3


@pytest.mark.parametrize("sampling", ENDED, ids=str)
def test_a_stop_string_inside_an_accepted_path_ends_the_text_as_plain(sampling):
    whole = long_text(sampling)
    for start in range(2, 24):
        stop = whole.text[start : start + 3]
        place = whole.text.index(stop)
        case = ([START], "chain:5", sampling, [5], 30, letters(), ["never", stop])
        fast = decode(TARGET, itself(TARGET), *case)[0]
        assert said([fast]) == said(plainly(TARGET, *case[:1], *case[2:]))
        assert (fast.tokens, fast.text, fast.finish_reason) == (whole.tokens[: place + 3], whole.text[:place], "stop")


@pytest.mark.parametrize("sampling", ENDED, ids=str)
@pytest.mark.parametrize("make", [itself, eagle3])
def test_the_length_limit_inside_an_accepted_path_ends_the_text_as_plain(sampling, make):
    for length in range(1, 15):
        fast = decode(TARGET, make(TARGET), [START], "chain:5", sampling, [5], length, letters())[0]
        assert fast.tokens == long_text(sampling).tokens[:length]
        assert (fast.text, fast.finish_reason) == (letters().decode(fast.tokens), "length")


class Watched:
    """A target that remembers what rows it was asked to read."""

    def __init__(self, target) -> None:
        self.target, self.passes = target, []

    def __getattr__(self, name):
        return getattr(self.target, name)

    def __call__(self, rows, *rest):
        self.passes.append(rows)
        return self.target(rows, *rest)


@pytest.mark.parametrize("make", [itself, eagle3, merged])
def test_a_full_context_ends_the_text_as_plain_and_no_row_lies_outside_it(make):
    short = tiny_target(max_position_embeddings=20)
    asked = [list(range(length)) for length in (19, 18, 14, 3)]
    for sampling in ENDED:
        watched = Watched(short)
        fast = decode(watched, make(short), asked, "20x4x5", sampling, range(4), 100)
        assert said(fast) == said(plainly(short, asked, sampling, range(4), 100))
        assert [len(result.tokens) for result in fast] == [1, 2, 6, 17]
        assert {result.finish_reason for result in fast} == {"length"}
        assert max(int(rows.positions.max()) for rows in watched.passes) < 19, "the last token is drawn, never read"


def test_finished_sequences_leave_at_once():
    asked, sampling, seeds = prompts(12, 1), Sampling(1.0), range(12)
    watched = Watched(ENDING)
    results = plainly(watched, asked, sampling, seeds)
    rounds = watched.passes[12:]  # one pass a prompt before
    assert [len(rows.tokens) for rows in rounds] == [sum(result.rounds > number for result in results) for number in range(len(rounds))]
    assert len(rounds[0].tokens) > len(rounds[-1].tokens)
    watched = Watched(ENDING)
    results = decode(watched, eagle3(ENDING), asked, "8x2x3", sampling, seeds)
    for number, rows in enumerate(watched.passes[12:]):
        assert [segment.slot for segment in rows.segments] == [slot for slot, result in enumerate(results) if result.rounds > number]


def test_a_drafter_hears_every_committed_token_of_a_growing_text_and_then_that_it_ended():
    class Listening(LookupDrafter):
        heard: list[list[int]] = [[] for _ in range(12)]  # noqa: RUF012 (made for one run)
        forgotten: list[int] = []  # noqa: RUF012

        def reserve(self, sequences, capacity):
            super().reserve(sequences, capacity)
            self.forgotten.clear()  # making room forgets what was before

        def observe(self, sequence, tokens, features):
            assert sequence not in self.forgotten
            self.heard[sequence] += tokens
            super().observe(sequence, tokens, features)

        def propose(self, requests):
            assert [self.heard[request.sequence][-1] for request in requests] == [request.root for request in requests]
            assert all(len(self.heard[request.sequence]) == request.position + 1 for request in requests)
            return super().propose(requests)

        def forget(self, sequence):
            super().forget(sequence)
            self.forgotten.append(sequence)

    drafter, asked = Listening(), prompts(12, 1)
    results = decode(ENDING, drafter, asked, "8x2x3", Sampling(1.0), range(12))
    assert sorted(drafter.forgotten) == list(range(12))
    for slot in (slot for slot, result in enumerate(results) if result.rounds):
        whole = asked[slot] + results[slot].tokens
        assert drafter.heard[slot] == whole[: len(drafter.heard[slot])] and len(drafter.heard[slot]) < len(whole)


def test_noise_that_the_text_has_passed_is_forgotten(monkeypatch):
    """A vector of the vocabulary's size for every position of a long text would be the largest thing in memory."""
    drawn: list[weakref.ref] = []
    own = noise_of.gumbel

    def watched(*given):
        vector = own(*given)
        drawn.append(weakref.ref(vector))
        return vector

    monkeypatch.setattr(noise_of, "gumbel", watched)
    held = []
    for _ in Decoder(TARGET, eagle3(TARGET)).run(prompts(2, 1), TreeShape.parse("8x2x3"), Sampling(1.0), [1, 2], 40):
        held.append(sum(vector() is not None for vector in drawn))
    assert len(drawn) >= 80 and max(held) <= 2 * 5, "what the round's tree looks at, three levels and what lies behind, for two texts"


# ---- what is counted ----


@pytest.mark.parametrize("name", DRAFTERS)
def test_tau_rounds_and_accepted_lengths_count_the_tokens(name):
    make, shape = DRAFTERS[name]
    most = TreeShape.parse(shape).nodes if name == "merged" else TreeShape.parse(shape).levels + 1  # copying goes on behind the leaves
    for length, sampling in ((11, SAMPLINGS[0]), (12, SAMPLINGS[2])):
        for result in decode(ENDING, make(ENDING), prompts(10, 3), shape, sampling, range(10), length):
            assert sum(result.accepted_lengths.values()) == result.rounds
            committed = sum(count * rounds for count, rounds in result.accepted_lengths.items())
            assert len(result.tokens) == 1 + committed, "prefill's token counts in no round; a round that was cut counts as cut"
            assert result.tau == (committed / result.rounds if result.rounds else 1.0)
            assert all(1 <= count <= most for count in result.accepted_lengths)


def test_the_round_that_a_stop_cuts_counts_as_cut():
    tokens = long_text(Sampling()).tokens
    place = next(k for k in range(9, 30) if k % 6 == 3 and tokens.index(tokens[k]) == k)
    ending = tiny_target(eos_token_ids=(tokens[place],))
    result = decode(ending, itself(ending), [START], "chain:5", Sampling(), [5], 30)[0]
    assert result.accepted_lengths == {3: 1, 6: place // 6}
    assert result.tau == place / result.rounds


# ---- the distribution of the text ----

PREFIX = [0, 3, 1]


@cache
def small():
    """Five tokens, so that all texts of three tokens can be counted, and a draft that knows four of them."""
    target = tiny_target(
        3, vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
    )
    network = DraftNetwork(draft_config(target.config, 4, (0, 1, 2)), target.model.embed_tokens.weight.detach()).double()
    randomize(network, 4)
    return target, Eagle3Drafter(network.prepare(), DraftVocab([0, 1, 2, 4], 5))


def exact_distribution(target, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The joint distribution of the first three tokens after PREFIX, from the target's own distribution at every text."""
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in texts.items():
            read = [*PREFIX, *text]
            logits = target(chain_rows(0, read, 0), target.new_cache(1, len(read)), (), slice(-1, None)).logits[0]
            longer |= {(*text, token): chance * p for token, p in enumerate(distribution(logits, sampling).tolist())}
        texts = longer
    return texts


@pytest.mark.parametrize(
    ("verifier", "shape", "sampling"),
    [
        ("walk", "10x1x3", Sampling(1.3, top_p=0.9)),
        ("accept-reject", "10x1x3", Sampling(1.0)),
        ("without-replacement", "static:3.2.1.0.1", Sampling(1.3, top_p=0.9)),
        ("traversal", "static:3.2.1.0.1", Sampling(1.0)),
        ("block", "chain:2", Sampling(1.0)),
    ],
    ids=str,
)
def test_three_tokens_of_tree_decoding_follow_the_exact_joint_distribution(verifier, shape, sampling):
    """That each rule keeps the distribution is tests/decode/test_verify.py's, exactly; here, that it is handed the right ones."""
    target, drafter = small()
    seen: Counter[tuple[int, ...]] = Counter()
    lengths: Counter[int] = Counter()
    for result in decode(target, drafter, [PREFIX] * 600, shape, sampling, [derived_seed(31, i) for i in range(600)], 4, verifier=verifier):
        seen[tuple(result.tokens[:3])] += 1
        lengths.update(result.accepted_lengths)
    assert lengths[2] > 90 and lengths[3] > 20, "the tree must have been followed, to both levels"
    exact = exact_distribution(target, sampling)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-12)
    assert surprise(seen, exact) < 1


# ---- EAGLE's own rule ----


@pytest.mark.parametrize("name", ["eagle3-tree", "lookup", "merged", "itself"])
def test_accept_reject_writes_what_the_target_may_write(name):
    make, shape = DRAFTERS[name]
    sampling, asked = Sampling(1.0, top_k=3), prompts(6, 8)
    results = decode(ENDING, make(ENDING), asked, shape, sampling, range(6), verifier="accept-reject")
    assert any(max(result.accepted_lengths, default=0) > 1 for result in results)
    for prompt, result in zip(asked, results):
        text = prompt + result.tokens
        logits = ENDING(chain_rows(0, text, 0), ENDING.new_cache(1, len(text))).logits
        for place, token in enumerate(result.tokens, len(prompt) - 1):
            assert distribution(logits[place], sampling)[token] > 0
    greedy = decode(ENDING, make(ENDING), asked, shape, Sampling(), range(6), verifier="accept-reject")
    assert said(greedy) == said(plainly(ENDING, asked, Sampling(), range(6)))


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    for verifier, drafter in itertools.product(VERIFIERS, [itself, eagle3]):
        case = (prompts(1, 2), {"block": "chain:3"}.get(verifier, "static:3.2.1.0.1"), Sampling(1.0))
        one, again, other = (decode(TARGET, drafter(TARGET), *case, [seed], 20, verifier=verifier)[0].tokens for seed in (1, 1, 2))
        assert one == again != other


@pytest.mark.parametrize(("name", "shape"), [("eagle3-tree", "8x2x3"), ("merged", "8x2x3"), ("lookup", "chain:2")])
def test_guesses_that_are_not_drawn_are_refused_by_a_verifier_that_divides_by_their_distribution(name, shape):
    make = DRAFTERS[name][0]
    with pytest.raises(EyasError, match="needs a draft that draws its guesses"):
        decode(TARGET, make(TARGET), prompts(4, 2), shape, Sampling(1.0), range(4), 20, verifier="without-replacement")
    greedy = decode(TARGET, make(TARGET), prompts(4, 2), shape, Sampling(), range(4), verifier="without-replacement")
    assert said(greedy) == said(plainly(TARGET, prompts(4, 2), Sampling(), range(4))), "greedy text has one right verifier"


def test_an_unknown_verifier_is_refused():
    with pytest.raises(EyasError, match="'coin' is unknown; choose walk, accept-reject"):
        Decoder(TARGET, None, "coin")
