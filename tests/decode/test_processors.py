"""Bias, penalties and a least length are transformers' (and where it has none OpenAI's), at every node of a tree as in plain decoding."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.utils import GenerationMixin

from eyas.config import PLAIN, EyasError, Request, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.decode.processors import Penalties, processors_of
from eyas.decode.sampling import derived_seed, distribution
from eyas.decode.sequence import new_sequence
from eyas.engine import load
from eyas.model.rows import chain_rows
from eyas.model.vocab import DraftVocab
from tests.decode.test_round import DRAFTERS, ENDING, PREFIX, TARGET, V, decode, plainly, prompts, said, small
from tests.enumeration import surprise
from tests.tiny import save_tiny_target

tokens = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)


def logits_of(seed: int) -> torch.Tensor:
    return 4 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def processed(request: Request, prompt: list[int], answer: list[int], path: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    for process in processors_of(request, len(prompt), (3, 7)):
        logits_V = process([*prompt, *answer], path, logits_V)
    return logits_V


class Generating(GenerationMixin):
    """As much of a model as transformers asks for a list of processors."""

    config = PretrainedConfig(is_encoder_decoder=False)


# ---- the arithmetic ----


@given(tokens, st.lists(st.integers(0, V - 1), max_size=20), st.data(), st.sampled_from([0.7, 1.05, 1.3]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_bias_repetition_and_least_length_are_transformers_to_the_last_bit(prompt, text, data, penalty, seed):
    """Its own list of processors in its own order, over text and path together."""
    cut = data.draw(st.integers(0, len(text)))
    least = data.draw(st.sampled_from([len(text), len(text) + 1, cut + 1]))
    bias = {5: 2.5, prompt[0]: -3.0}
    request = Request(sampling=Sampling(repetition_penalty=penalty, logit_bias=bias), min_new_tokens=least)
    sequence_bias = [[[token], value] for token, value in bias.items()]
    config = GenerationConfig(repetition_penalty=penalty, min_new_tokens=least, sequence_bias=sequence_bias)
    config._eos_token_tensor = torch.tensor([3, 7])
    processors = Generating()._get_logits_processor(config, input_ids_seq_length=len(prompt))
    wanted = processors(torch.tensor([[*prompt, *text]]), logits_of(seed)[None].clone())[0]
    assert torch.equal(processed(request, prompt, text[:cut], text[cut:], logits_of(seed)), wanted)


@given(tokens, st.lists(st.integers(0, V - 1), max_size=20), st.data(), st.floats(-2, 2), st.sampled_from([1.0, 1.3]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_presence_and_frequency_are_openais_and_count_the_answer_alone(prompt, answer, data, presence, repetition, seed):
    """Behind transformers' repetition penalty, as vLLM has them."""
    cut, frequency = data.draw(st.integers(0, len(answer))), data.draw(st.floats(-2, 2))
    request = Request(sampling=Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency))
    wanted = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([[*prompt, *answer]]), logits_of(seed)[None].clone())[0]
    for token, times in Counter(answer).items():  # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        wanted[token] = wanted[token] - torch.tensor(frequency) * times - torch.tensor(presence)
    assert torch.allclose(processed(request, prompt, answer[:cut], answer[cut:], logits_of(seed)), wanted, atol=1e-6)


@given(tokens, st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, min_size=6, max_size=6))
@settings(max_examples=40, deadline=None)
def test_what_is_counted_once_is_what_is_counted_anew(prompt, parts, paths):
    """One object follows a text through rounds and paths, then is asked about an earlier text; a new one sees each for the first time."""
    sampling = Sampling(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4)
    following, text, logits_V = Penalties(sampling, len(prompt)), list(prompt), logits_of(1)
    for part, path in zip(parts, paths, strict=False):
        text += part
        for below in ([], path, path[:1]):
            assert torch.equal(following(text, below, logits_V), Penalties(sampling, len(prompt))(text, below, logits_V))
    earlier = text[: len(prompt) + 1]
    assert torch.equal(following(earlier, [], logits_V), Penalties(sampling, len(prompt))(earlier, [], logits_V))


def test_logits_that_are_handed_in_stay_as_they_are():
    kept = logits_of(0)
    request = Request(sampling=Sampling(repetition_penalty=1.5, presence_penalty=1, logit_bias={1: 5}), min_new_tokens=5)
    assert not torch.equal(processed(request, [1, 2], [3], [4], kept), kept) and torch.equal(kept, logits_of(0))


def test_nothing_asked_for_is_no_processor_at_all():
    assert processors_of(Request(sampling=Sampling(0.7, top_k=5)), 3, (3, 7)) == ()
    assert processors_of(Request(min_new_tokens=4, ignore_eos=True), 3, (3, 7)) == (), "nothing ends it, so nothing is ruled out"


# ---- whole texts ----


@cache
def theirs_and_ours(root):
    directory = save_tiny_target(root / "target", 2)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load(directory, precision="fp32")


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "min_new_tokens": 20},
        {"repetition_penalty": 1.1, "logit_bias": {257: 9.0, 100: 6.0}, "min_new_tokens": 9},
    ],
    ids=str,
)
def test_greedy_text_is_what_transformers_generates(tmp_path_factory, asked):
    model, engine = theirs_and_ours(tmp_path_factory.getbasetemp())
    ids = engine.encode("Where is the nest?")
    names = dict(asked)
    if "logit_bias" in names:
        names["sequence_bias"] = {(token,): value for token, value in names.pop("logit_bias").items()}
    wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, **names)[0, len(ids) :].tolist()
    for method in ("plain", "draft-model"):
        assert engine.generate(ids, method=method, tree="8x2x3", max_new_tokens=24, **asked).tokens == wanted
    assert engine.generate(ids, method="plain", max_new_tokens=24).tokens != wanted, "it must matter"


ADJUSTED = [
    Sampling(0, repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(1.0, repetition_penalty=1.2, presence_penalty=0.8, logit_bias={11: 2.0}),
    Sampling(0.7, top_p=0.9, top_k=20, frequency_penalty=1.5),
]


@pytest.mark.parametrize("sampling", ADJUSTED, ids=str)
@pytest.mark.parametrize("name", ["eagle3-tree", "lookup", "merged", "itself", "eagle3-static"])
def test_tree_output_under_penalties_is_plain_output(name, sampling):
    make, shape = DRAFTERS[name]
    asked, seeds = prompts(12, 4), [derived_seed(4, i) for i in range(12)]
    plain = plainly(ENDING, asked, sampling, seeds)
    fast = decode(ENDING, make(ENDING), asked, shape, sampling, seeds)
    assert said(fast) == said(plain) != said(plainly(ENDING, asked, Sampling(sampling.temperature), seeds))
    if name == "itself":
        assert max(max(result.accepted_lengths) for result in fast if result.rounds) > 2, "nothing was ever accepted: an empty claim"


@pytest.mark.parametrize(
    ("verifier", "shape"), [("accept-reject", "8x2x3"), ("without-replacement", "8x2x3"), ("traversal", "8x2x3"), ("block", "chain:3")]
)
def test_greedy_text_under_penalties_is_plain_with_every_verifier(verifier, shape):
    asked, make = prompts(8, 4), DRAFTERS["eagle3-tree"][0]
    fast = decode(ENDING, make(ENDING), asked, shape, ADJUSTED[0], range(8), verifier=verifier)
    assert said(fast) == said(plainly(ENDING, asked, ADJUSTED[0], range(8)))


@pytest.mark.parametrize(("verifier", "shape"), [("walk", "10x1x3"), ("accept-reject", "10x1x3"), ("traversal", "static:3.2.1")])
def test_three_tokens_under_penalties_follow_the_exact_joint_distribution(verifier, shape):
    """Exact: every text of three tokens, its logits penalised by a formula written out here."""
    target, drafter = small()
    sampling = Sampling(1.0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=1.0)
    texts = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in texts.items():
            read = [*PREFIX, *text]
            logits = target(chain_rows(0, read, 0), target.new_cache(1, len(read)), (), slice(-1, None)).logits[0].clone()
            for token in set(read):
                logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
            for token, times in Counter(text).items():
                logits[token] -= 0.7 + times
            longer |= {(*text, token): chance * p for token, p in enumerate(distribution(logits, Sampling(1.0)).tolist())}
        texts = longer
    seeds = [derived_seed(31, i) for i in range(200)]
    results = decode(target, drafter, [PREFIX] * 200, shape, sampling, seeds, 4, verifier=verifier)
    assert sum(max(result.accepted_lengths) > 1 for result in results) > 20, "the tree must have been followed"
    assert surprise(Counter(tuple(result.tokens[:3]) for result in results), texts) < 1


def test_sequences_of_one_batch_have_penalties_of_their_own():
    rng = random.Random(0)
    requests = [
        Request(sampling=rng.choice([*ADJUSTED, Sampling(1.0)]), max_new_tokens=12, min_new_tokens=rng.choice([0, 6])) for _ in range(12)
    ]
    make, shape = DRAFTERS["merged"]

    def texts(drafter, batches):
        found = []
        for batch in batches:
            wanted = TreeShape.parse(shape) if drafter else PLAIN
            own = [new_sequence(prompts(12, 3)[i], requests[i], wanted, i, ENDING.config, number=i) for i in batch]
            for _ in Decoder(ENDING, drafter and drafter(ENDING)).run_all(own):
                pass
            found += [each.tokens for each in own]
        return found

    assert texts(make, [range(12)]) == texts(None, [[i] for i in range(12)])


# ---- the settings ----


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"repetition_penalty": 0.0}, "repetition-penalty must be a number from 1e-06 to 1e[+]06, not 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition-penalty must be a number"),
        ({"presence_penalty": 2.5}, "presence-penalty must be a number from -2 to 2, not 2.5"),
        ({"frequency_penalty": "much"}, "frequency-penalty must be a number from -2 to 2, not 'much'"),
        ({"logit_bias": {3: 200}}, "the logit-bias of token 3 must be a number from -100 to 100, not 200"),
        ({"logit_bias": {"hawk": 1}}, "a token of logit-bias must be a whole number from 0 to .*, not 'hawk'"),
    ],
)
def test_a_penalty_out_of_its_range_is_one_line(asked, line):
    with pytest.raises(EyasError, match=line):
        Sampling(**asked)


def test_a_bias_may_be_a_mapping_with_ids_as_text():
    assert Sampling(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1))
    assert hash(Sampling(logit_bias={7: 1})) == hash(Sampling(logit_bias=((7, 1),)))
    assert Sampling(logit_bias=None) == Sampling(logit_bias={}) == Sampling()
    with pytest.raises(EyasError, match="logit-bias must be a mapping of token ids to numbers, not 0"):
        Sampling(logit_bias=0)


# ---- the draft knows ----


@pytest.mark.parametrize("sampling", [*ADJUSTED[:2], Sampling(0.7, frequency_penalty=1.5)], ids=str)
def test_a_target_that_drafts_for_itself_is_always_right_under_penalties(sampling):
    """Its guesses are processed as its draws are, the path's own tokens included."""
    make, _ = DRAFTERS["itself"]
    asked = prompts(8, 4)
    for result in decode(TARGET, make(TARGET), asked, "chain:4", sampling, range(8), 21):
        assert result.accepted_lengths == {5: 4}
    request = Request(sampling=sampling, min_new_tokens=21, max_new_tokens=21)
    least = [new_sequence(prompt, request, TreeShape.chain(4), i, ENDING.config, number=i) for i, prompt in enumerate(asked)]
    for _ in Decoder(ENDING, make(ENDING)).run_all(least):
        pass
    assert all(each.accepted_lengths == {5: 4} for each in least), "nor does it guess an end that is ruled out"


some_paths = st.lists(st.lists(st.integers(0, V - 1), max_size=4), min_size=1, max_size=4)


@given(tokens, some_paths, st.sets(st.integers(0, V - 1), min_size=1), st.data())
@settings(max_examples=40, deadline=None)
def test_a_drafts_logits_are_processed_as_the_targets_would_be(text, paths, kept, data):
    """A draft's vocabulary is a part of the target's; every row has its own path."""
    cut = data.draw(st.integers(1, len(text)))
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.4, logit_bias={3: 2.0, 9: -1.0})
    request = Request(sampling=sampling, min_new_tokens=data.draw(st.integers(0, 12)))
    sequence = new_sequence(text[:cut], request, PLAIN, 0, ENDING.config)
    sequence.tokens += text[cut:]
    vocab = DraftVocab(sorted(kept), V)
    logits_RV = torch.stack([logits_of(row) for row in range(len(paths))])
    found = sequence.guessed(paths, logits_RV[:, vocab.ids], vocab.columns())
    wanted = torch.stack([sequence.processed(row, path) for row, path in zip(logits_RV, paths, strict=True)])
    assert torch.equal(found, wanted[:, vocab.ids])


def test_processors_of_ones_own_are_not_the_drafts_to_know():
    sequence = new_sequence([1, 2], Request(), PLAIN, 0, ENDING.config)
    sequence.processors = (lambda text, path, logits_V: logits_V + 1,)
    assert torch.equal(sequence.guessed([[]], logits_of(0)[None], None), logits_of(0)[None])
