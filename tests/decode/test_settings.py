"""What users of plain decoding ask for: token ids as a prompt, several answers, log probabilities, ends of one's own, a model's defaults.

Each is what plain decoding gives, with trees, in batches and in streams.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from eyas.config import EyasError, Request, Sampling
from eyas.decode.sampling import derived_seed
from eyas.engine import Engine, load
from eyas.model.rows import chain_rows
from tests.tiny import byte_tokenizer, save_tiny_target, tiny_target

V = 300
END = 257  # the target's own end-of-turn id
TREES = [{"method": "plain"}, {"method": "draft-model", "tree": "8x2x3"}, {"method": "lookup", "tree": "chain:4"}]
SAMPLINGS = [{"temperature": 0.0, "seed": 0}, {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.1}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_target(prepare=False, vocab_size=V, eos_token_ids=(END,)), byte_tokenizer(), Path("tiny"), None, "fp32")


def ended_early(engine: Engine, **law) -> list[int]:
    """A text of the target that nothing ends but its length."""
    return engine.generate("aba aba", raw=True, method="plain", ignore_eos=True, max_new_tokens=24, **law).tokens


# ---- token ids as a prompt ----


def test_token_ids_are_the_text_they_stand_for(engine):
    ids, settings = engine.encode("Where is the nest?"), {"method": "plain", "max_new_tokens": 8}
    assert engine.generate(ids, **settings).tokens == engine.generate("Where is the nest?", **settings).tokens
    both = engine.generate([ids, [5, 6, 7]], **settings)
    assert [result.tokens for result in both] == [engine.generate(each, **settings).tokens for each in (ids, [5, 6, 7])]
    assert [result.prompt_tokens for result in both] == [len(ids), 3]
    *_, streamed = engine.stream([5, 6, 7], **settings)
    assert streamed.tokens == both[1].tokens == engine.generate(list(numpy.array([5, 6, 7])), **settings).tokens


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ([5, V], "a prompt's numbers must be token ids from 0 to 299, not 300"),
        ([5, -1], "a prompt's numbers must be token ids from 0 to 299, not -1"),
        ([5, 2.0], "not 2.0"),
        ([5, True], "not True"),
        ([5, "x"], "not 'x'"),
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        (torch.tensor([[5, 6]]), r"a prompt of token ids is a list of whole numbers; give ids.tolist\(\)"),
        ([1] * 256, "the prompt has 256 tokens, the model reads at most 256"),
    ],
    ids=str,
)
def test_ids_that_cannot_be_read_are_one_line(engine, prompt, line):
    with pytest.raises(EyasError, match=line):
        engine.generate(prompt, method="plain", max_new_tokens=4)


# ---- several answers ----


def test_n_answers_are_what_their_seeds_give_alone(engine):
    settings = {"temperature": 1.0, "max_new_tokens": 10, "method": "draft-model", "tree": "8x2x3", "raw": True}
    three = engine.generate("a hawk", n=3, seed=7, **settings)
    assert [result.seed for result in three] == [derived_seed(7, number) for number in range(3)]
    assert len({tuple(result.tokens) for result in three}) == 3
    for result in three:
        assert engine.generate("a hawk", seed=result.seed, **settings | {"method": "plain"}).tokens == result.tokens
    batched = engine.generate("a hawk", n=3, seed=7, batch=2, **settings)
    assert [result.tokens for result in batched] == [result.tokens for result in three]
    many = engine.generate(["a hawk", "an eyas"], n=2, seed=7, **settings)
    assert [result.prompt_tokens for result in many] == [6, 6, 7, 7] and many[0].tokens == three[0].tokens
    assert len(engine.generate("a hawk", n=1, **settings)) == 1, "asked for, a list of one is a list"


@pytest.mark.parametrize("n", [0, -2])
def test_no_answers_are_one_line(engine, n):
    with pytest.raises(EyasError, match=f"n must be at least 1, not {n}"):
        engine.generate("hi", n=n)
    with pytest.raises(EyasError, match="stream takes one prompt and writes one answer; use generate for several"):
        next(engine.stream("hi", n=2))


# ---- how a text ends ----


@pytest.mark.parametrize("law", SAMPLINGS, ids=str)
@pytest.mark.parametrize("how", TREES, ids=str)
def test_stop_ids_end_a_text_wherever_a_tree_holds_them(engine, how, law):
    whole = ended_early(engine, **law)
    for token in dict.fromkeys(whole[2:]):
        result = engine.generate("aba aba", raw=True, ignore_eos=True, max_new_tokens=24, stop_token_ids=[token, 299], **how, **law)
        assert result.tokens == whole[: whole.index(token) + 1] and result.finish_reason == "stop"


@pytest.mark.parametrize("how", TREES, ids=str)
def test_without_eos_a_text_goes_on_behind_the_targets_own_end(how):
    whole = ended_early(Engine(tiny_target(prepare=False, vocab_size=V), byte_tokenizer(), Path("tiny"), None, "fp32"), seed=0)
    ending = Engine(tiny_target(prepare=False, vocab_size=V, eos_token_ids=(whole[3],)), byte_tokenizer(), Path("tiny"), None, "fp32")
    settings = {"raw": True, "max_new_tokens": 24, "seed": 0, **how}
    assert ending.generate("aba aba", **settings).tokens == whole[: whole.index(whole[3]) + 1]
    on = ending.generate("aba aba", ignore_eos=True, **settings)
    assert on.tokens == whole and on.finish_reason == "length"


@pytest.mark.parametrize("law", SAMPLINGS, ids=str)
@pytest.mark.parametrize("how", TREES, ids=str)
def test_nothing_ends_a_text_before_its_least_length(engine, how, law):
    """Neither a stop id, which is never drawn before, nor a stop string, which may be written before."""
    whole = ended_early(engine, **law)
    settings = {"raw": True, "max_new_tokens": 24, **law}
    asked = {"stop_token_ids": whole[1:4], "min_new_tokens": 9}
    plain = engine.generate("aba aba", method="plain", **asked, **settings)
    assert len(plain.tokens) >= 9 and not set(plain.tokens[:9]) & set(whole[1:4])
    assert engine.generate("aba aba", **how, **asked, **settings).tokens == plain.tokens
    text = engine.tokenizer.decode(whole[:12], skip_special_tokens=True)
    stops = [letter for letter in text if letter != "\ufffd"][:3]
    cut = engine.generate("aba aba", method="plain", stop=stops, min_new_tokens=9, ignore_eos=True, **settings)
    assert len(cut.tokens) >= 9 and cut.tokens == whole[: len(cut.tokens)]
    pieces = list(engine.stream("aba aba", stop=stops, min_new_tokens=9, ignore_eos=True, **how, **settings))
    assert pieces[-1].tokens == cut.tokens and "".join(pieces[:-1]) == pieces[-1].text == cut.text
    assert len(engine.generate("aba aba", method="plain", stop=stops, ignore_eos=True, **settings).tokens) < len(cut.tokens)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"stop_token_ids": [V]}, "stop-token-ids must be token ids from 0 to 299, not 300"),
        ({"stop_token_ids": ["x"]}, "a stop token id must be a whole number"),
        ({"logit_bias": {V: 1.0}}, "tokens of logit-bias must be token ids from 0 to 299, not 300"),
        ({"min_new_tokens": -1}, "min-new-tokens must be a whole number from 0"),
        ({"logprobs": -1}, "logprobs must be a whole number from 0 to 1000, not -1"),
        ({"generation_config": "vllm"}, "generation-config must be auto or none, not 'vllm'"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_one_line(engine, asked, line):
    with pytest.raises(EyasError, match=line):
        engine.generate("hi", **asked)


# ---- log probabilities ----


@pytest.mark.parametrize("law", SAMPLINGS, ids=str)
@pytest.mark.parametrize("how", TREES, ids=str)
def test_log_probabilities_are_the_targets_own_for_every_token(engine, how, law):
    """Before penalties and temperature: a softmax of the target's logits over the finished text."""
    result = engine.generate("aba aba", raw=True, logprobs=3, max_new_tokens=16, ignore_eos=True, **how, **law)
    text = [*engine.encode("aba aba", raw=True), *result.tokens]
    target = engine.target
    logits = target(chain_rows(0, text, 0), target.new_cache(1, len(text)), ()).logits[result.prompt_tokens - 1 : -1]
    wanted = logits.log_softmax(-1)
    assert [told.token for told in result.logprobs] == result.tokens
    for told, own_V in zip(result.logprobs, wanted, strict=True):
        assert told.logprob == pytest.approx(float(own_V[told.token]), abs=1e-9)
        assert [token for token, _ in told.top] == own_V.topk(3).indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(own_V.topk(3).values.tolist(), abs=1e-9)
    *pieces, last = engine.stream("aba aba", raw=True, logprobs=3, max_new_tokens=16, ignore_eos=True, **how, **law)
    assert [told for piece in pieces for told in piece.logprobs] == last.logprobs == result.logprobs
    assert "".join(pieces) == last.text == result.text


def test_log_probabilities_are_those_of_the_paths_own_rows():
    """Where a path leaves out rows of its tree, as it often does under a verifier that does not share its noise."""
    paths: list[list[int]] = []
    engine = Engine(tiny_target(prepare=False, vocab_size=V), byte_tokenizer(), Path("tiny"), None, "fp32")
    engine.use_draft_model(tiny_target(prepare=False, vocab_size=V))
    settings = {"method": "draft-model", "tree": "12x2x3", "verifier": "accept-reject", "temperature": 2.0, "raw": True, "ignore_eos": True}
    settings["copy"] = False
    result = engine.generate("aba", seed=1, logprobs=0, max_new_tokens=40, watch=lambda told: paths.append(told.accepted.path), **settings)
    assert any(path != list(range(len(path))) for path in paths), "an empty claim"
    text = [*engine.encode("aba", raw=True), *result.tokens]
    logits = engine.target(chain_rows(0, text, 0), engine.target.new_cache(1, len(text)), ()).logits[result.prompt_tokens - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(result.tokens)[:, None])[:, 0].tolist()
    assert [told.logprob for told in result.logprobs] == pytest.approx(wanted, abs=1e-9)


def test_a_text_that_ends_inside_a_path_tells_only_the_tokens_it_has(engine):
    whole = ended_early(engine, seed=0)
    result = engine.generate("aba aba", raw=True, logprobs=0, ignore_eos=True, stop_token_ids=whole[4:5], seed=0, **TREES[1])
    assert [told.token for told in result.logprobs] == result.tokens == whole[: whole.index(whole[4]) + 1]
    assert all(told.top == [] for told in result.logprobs)
    assert engine.generate("aba aba", raw=True, max_new_tokens=2, seed=0).logprobs is None


# ---- generation_config.json ----


def with_file(directory: Path, **fields) -> Engine:
    save_tiny_target(directory, 0)
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return load(directory, precision="fp32")


def test_what_a_call_leaves_out_is_as_the_models_file_says(tmp_path):
    fields = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 9}
    engine = with_file(tmp_path / "qwen", **fields, eos_token_id=[258, 257], transformers_version="4.51.0")
    request = engine.request()
    assert request.sampling == Sampling(0.6, 20, 0.95, repetition_penalty=1.05) and request.max_new_tokens == 9
    assert dict(request.defaulted) == {key: value for key, value in fields.items() if key != "do_sample"}
    said = engine.request(temperature=0, max_new_tokens=5)
    assert said.sampling == Sampling(0, 20, 0.95, repetition_penalty=1.05) and said.max_new_tokens == 5
    assert "temperature" not in dict(said.defaulted)
    own = engine.generate("hi", seed=3)
    assert own.sampling == request.sampling
    wanted = Request(sampling=request.sampling, max_new_tokens=9, seed=3, method="plain")
    assert (
        own.tokens
        == engine.generate("hi", wanted).tokens
        != engine.generate("hi", seed=3, max_new_tokens=9, generation_config="none").tokens
    )
    assert engine.request(generation_config="none") == Request(), "passed over"
    assert engine.request(Request()) == Request(), "a finished request says everything itself"
    assert engine.request(sampling=Sampling()).sampling == Sampling(), "so does a finished sampling"


def test_a_file_that_does_not_sample_leaves_a_text_greedy(tmp_path):
    request = with_file(tmp_path / "still", temperature=0.7, repetition_penalty=1.2).request()
    assert request.sampling == Sampling(repetition_penalty=1.2) and dict(request.defaulted) == {"repetition_penalty": 1.2}
    assert load(save_tiny_target(tmp_path / "none"), precision="fp32").request() == Request(), "no file, no defaults"


def test_what_a_file_asks_for_and_is_not_done_is_named(tmp_path):
    engine = with_file(tmp_path / "much", no_repeat_ngram_size=3, num_beams=1, suppress_tokens=[], bad_words_ids=[[5]], top_p=1.0)
    assert engine.generation_config.not_done == {"no_repeat_ngram_size": 3, "bad_words_ids": [[5]]}
    assert engine.generation_config.settings == {}


@pytest.mark.parametrize(
    "fields", [{"top_p": "much"}, {"top_p": 3}, {"do_sample": True, "temperature": -1}, {"top_k": -4}, {"do_sample": "yes"}]
)
def test_a_file_with_values_that_cannot_be_is_one_line_and_can_be_passed_over(tmp_path, fields):
    engine = with_file(tmp_path / "odd", **fields)
    with pytest.raises(EyasError, match=r"generation_config.json: .*; mend it, or pass over the file with --generation-config none"):
        engine.generate("hi", max_new_tokens=2)
    assert engine.generate("hi", max_new_tokens=2, generation_config="none").tokens
