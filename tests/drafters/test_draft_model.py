"""A draft model guesses with the target's own noise: one that is the target guesses every draw, at any temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from eyas.config import EyasError, Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.generate import Decoder
from eyas.decode.sampling import Noise, draw
from eyas.decode.sequence import Result, result_of
from eyas.drafters import draft_model
from eyas.drafters.draft_model import ModelDrafter
from eyas.engine import Engine
from eyas.files.target import load_target
from eyas.model.rows import chain_rows
from tests.tiny import byte_tokenizer, tiny_target

V = 53
TARGET = tiny_target()


def decode(drafter, prompts, shape, sampling, length, target=TARGET) -> list[Result]:
    *_, texts = Decoder(target, drafter).run(prompts, TreeShape.parse(shape), sampling, range(len(prompts)), length)
    return [result_of(text) for text in texts]


def logits_behind(model, text: list[int]) -> torch.Tensor:
    return model(chain_rows(0, text, 0), model.new_cache(1, len(text)), (), slice(-1, None)).logits[0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(1.0), Sampling(2.0)], ids=str)
def test_the_target_as_its_own_draft_is_always_right(sampling):
    """tau = K + 1 at every temperature: under shared noise the draft does not guess what is likely but what will be drawn."""
    for K, rounds in ((1, 7), (3, 4), (5, 3)):
        length = 1 + rounds * (K + 1)  # the last round is whole too
        for result in decode(ModelDrafter(TARGET, V), [[1], [2, 3, 4], [5] * 9], f"chain:{K}", sampling, length):
            assert result.accepted_lengths == {K + 1: rounds}
            assert result.tau == K + 1


def test_the_first_child_is_the_draw_and_the_tree_holds_it_at_every_level():
    sampling, prompt = Sampling(1.0), [4, 9, 30]
    (result,) = decode(ModelDrafter(TARGET, V), [prompt], "20x3x4", sampling, 1 + 5 * 5)
    assert result.accepted_lengths == {5: 5}


def test_a_shallow_draft_proposes_what_the_first_layers_would_draw():
    sampling, text, noise = Sampling(0.8), [3, 1, 4, 1, 5, 9], Noise(17, V)
    for layers in (1, 3, 4):
        model = TARGET.shallow(layers)
        drafter = ModelDrafter(model, V)
        drafter.reserve(1, 40)
        drafter.observe(0, text, None)
        (tree,) = drafter.propose([TreeRequest(0, text[-1], 5, TreeShape.chain(4), sampling, noise.at)])
        expected = list(text)
        for _ in range(4):
            expected.append(draw(logits_behind(model, expected), sampling, noise.at(len(expected))))
        assert tree.tokens == expected[5:]


def test_a_shallow_draft_is_right_sometimes_and_a_deeper_one_more_often():
    def tau(layers: int) -> float:
        results = decode(ModelDrafter(TARGET.shallow(layers), V), [[i, i + 1] for i in range(20)], "chain:2", Sampling(1.0), 16)
        return sum(result.tau for result in results) / 20

    assert 1 < tau(1) < tau(4) < 3


def test_a_shallow_draft_has_at_least_one_layer_and_fewer_than_the_target():
    for layers in (0, 5, 9, -1):
        with pytest.raises(EyasError, match=f"has 5 layers; a shallow draft needs 1 to 4, not {layers}"):
            TARGET.shallow(layers)


def test_trees_of_a_batch_are_the_trees_alone_and_text_may_wait_unread(monkeypatch):
    monkeypatch.setattr(draft_model, "CATCH_UP", 4)  # long texts are read in several passes
    texts = [[token % V for token in range(start, start + length)] for start, length in ((0, 1), (5, 4), (9, 13), (2, 30))]
    model, sampling, shape = TARGET.shallow(2), Sampling(1.0), TreeShape.parse("9x2x3")

    def requests():
        return [TreeRequest(i, text[-1], len(text) - 1, shape, sampling, Noise(i, V).at) for i, text in enumerate(texts)]

    drafter = ModelDrafter(model, V)
    drafter.reserve(4, 60)
    for i, text in enumerate(texts):
        drafter.observe(i, text, None)
    together = drafter.propose(requests())
    monkeypatch.undo()
    for i, text in enumerate(texts):
        alone = ModelDrafter(model, V)
        alone.reserve(4, 60)
        for token in text:  # many empty rounds
            alone.observe(i, [token], None)
        (tree,) = alone.propose(requests()[i : i + 1])
        assert (tree.tokens, tree.parents) == (together[i].tokens, together[i].parents)
        assert tree.scores == pytest.approx(together[i].scores, abs=1e-9)


def test_a_forgotten_sequence_leaves_no_trace():
    drafter = ModelDrafter(TARGET.shallow(2), V)
    drafter.reserve(1, 60)
    request = TreeRequest(0, 8, 2, TreeShape.parse("9x2x3"), Sampling(), None)
    trees = []
    for earlier in ([], [1, 2, 3, 4, 5]):
        drafter.observe(0, earlier, None)
        if earlier:
            drafter.propose([TreeRequest(0, 5, 4, TreeShape.chain(2), Sampling(), None)])
        drafter.forget(0)
        drafter.observe(0, [6, 7, 8], None)
        trees += drafter.propose([request])
        drafter.forget(0)
    assert trees[0] == trees[1]


SHARED = "the draft model has 53 tokens, the target 54; they must share a vocabulary"


def test_another_vocabulary_is_refused():
    with pytest.raises(EyasError, match=SHARED):
        ModelDrafter(TARGET, 54)
    with pytest.raises(EyasError, match=SHARED):
        an_engine(vocab_size=54).use_draft_model(TARGET)


def an_engine(**changes) -> Engine:
    return Engine(tiny_target(prepare=False, **changes), byte_tokenizer(), Path("tiny"), None, "fp32")


@pytest.mark.parametrize("prepare", [False, True])
def test_a_draft_model_may_be_fresh_or_an_engines_own_target(prepare):
    engine = an_engine()
    settings = {"seed": 1, "max_new_tokens": 16, "ignore_eos": True}
    plain = engine.generate([3, 4, 5], method="plain", **settings)
    engine.use_draft_model(tiny_target(prepare=prepare))
    found = engine.generate([3, 4, 5], method="draft-model", tree="chain:3", **settings)
    assert found.tokens == plain.tokens and found.tau > 3, "a draft model that is the target is always right"


def test_a_target_of_transformers_may_be_prepared_before_it_drafts(tmp_path):
    sizes = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path)
    model = load_target(tmp_path, "fp32").prepare()
    assert model.prepare() is model
    engine = an_engine()
    engine.use_draft_model(model)
    assert len(engine.generate([3, 4, 5], method="draft-model", tree="chain:2", max_new_tokens=4, ignore_eos=True).tokens) == 4


@pytest.mark.parametrize("given", ["owner/draft", Path("draft"), None])
def test_what_is_no_loaded_model_is_one_line(given):
    with pytest.raises(EyasError, match=r"a draft model is a loaded one, as eyas\.load\(\.\.\)\.target gives it, not "):
        an_engine().use_draft_model(given)
