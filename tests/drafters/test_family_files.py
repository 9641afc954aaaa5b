"""Drafts of every method on disk: what is saved comes back, published layouts load, and what does not fit is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch

import eyas
from eyas.config import EyasError
from eyas.engine import kind_of
from eyas.files.target import load_target
from eyas.files.tensors import read_tensors, save_tensors
from eyas.methods import METHODS, trained
from tests.tiny import save_tiny_target
from tests.tiny_family import tiny_network

FAMILY = [name for name in trained() if name != "eagle3"]
SERVED = [(name, method.draft) for name, method in METHODS.items() if method.draft in FAMILY]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def drafts(target, tmp_path_factory):
    """A saved random draft of each method, and the network it was saved from."""
    loose, root, found = load_target(target, "fp32"), tmp_path_factory.mktemp("drafts"), {}
    for name in FAMILY:
        network, vocab = tiny_network(name, loose, size=200)
        directory = root / name
        directory.mkdir()
        facts = {"target": "tiny", "accuracies": [[0.5, 0.2, 0.1], [0.4, 0.1, 0.1]]} if METHODS[name].static else {"target": "tiny"}
        METHODS[name].decoding().save(directory, network, vocab, loose.config.num_hidden_layers, None, facts)
        found[name] = directory, network, vocab
    return found


def said(engine, method: str, **settings) -> list[int]:
    return engine.generate("Where is the nest?", method=method, seed=3, max_new_tokens=12, **settings).tokens


def published(source, directory, config: dict, tensors: dict[str, torch.Tensor], name: str):
    """A directory as others publish it: their config, weights in a file of their name."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_tensors(directory, tensors)
        (directory / "model.safetensors").rename(directory / name)
    else:
        torch.save(tensors, directory / name)
    return directory


@pytest.mark.parametrize("method", FAMILY)
def test_a_saved_draft_comes_back_as_it_was(method, target, drafts):
    directory, network, vocab = drafts[method]
    again, ids = METHODS[method].decoding().load(directory, load_target(target, "fp32"))
    assert kind_of(directory) == method and torch.equal(ids.ids, vocab.ids)
    own = dict(network.named_parameters())
    assert own.keys() == dict(again.named_parameters()).keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter.bfloat16(), own[name].bfloat16()), name


@pytest.mark.parametrize(("method", "draft"), SERVED)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_decodes_with_it(method, draft, temperature, target, drafts):
    engine = eyas.load(target, drafts[draft][0], precision="fp32")
    plain = said(engine, "plain", temperature=temperature)
    assert said(engine, method, temperature=temperature) == said(engine, method, tree="7x2x3", temperature=temperature) == plain
    assert engine.default_method in METHODS and METHODS[engine.default_method].draft == draft


def test_a_static_method_decodes_with_the_tree_that_its_accuracies_make(target, drafts):
    for method in (name for name in FAMILY if METHODS[name].static):
        engine = eyas.load(target, drafts[method][0], precision="fp32")
        assert engine.network.accuracies == [[0.5, 0.2, 0.1], [0.4, 0.1, 0.1]]
        assert engine.shape("auto", method) == engine.network.static_tree() and engine.shape("auto", method).counts
        assert engine.planner("auto", method, eyas.Sampling()) is None


def test_a_draft_for_another_method_is_named(target, drafts):
    engine = eyas.load(target, drafts["medusa"][0], precision="fp32")
    with pytest.raises(
        EyasError, match=r"medusa is no eagle3 draft, which eagle3 needs; name one with --draft, train one with `eyas train`,"
    ):
        said(engine, "eagle3")
    with pytest.raises(EyasError, match=r"train one with `eyas train --method mtp`"):
        said(engine, "mtp")
    engine = eyas.load(target, drafts["mtp"][0], precision="fp32")  # whose network has no static tree
    with pytest.raises(EyasError, match=r"is no medusa draft, which medusa needs"):
        said(engine, "medusa")


# ---- layouts as published ----


def whole_vocabulary(method: str, target):
    loose = load_target(target, "fp32")
    return tiny_network(method, loose, size=loose.config.vocab_size)


def assert_holds(method: str, directory, target, network) -> None:
    """Over the whole vocabulary, the weights that were published."""
    again, vocab = METHODS[method].decoding().load(directory, load_target(target, "fp32"))
    own, found = dict(network.named_parameters()), dict(again.named_parameters())
    assert len(vocab) == vocab.vocab_size and own.keys() == found.keys()
    for name in own:
        assert torch.equal(found[name], own[name].half().float()), name


def llama(target) -> dict:
    config = json.loads((target / "config.json").read_text())
    return {key: config[key] for key in config if key not in ("eos_token_id", "num_hidden_layers")}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_eagle_1_and_2_load_as_published(file, target, tmp_path):
    """SafeAILab's: a Llama's config of one layer, `fc` and `layers.0` without an input norm, the target's embedding once more."""
    network, _ = whole_vocabulary("eagle1", target)
    tensors = {name: value.detach().half() for name, value in network.named_parameters()}
    tensors["embed_tokens.weight"] = network.embedding[0].half()
    config = {**llama(target), "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "model_type": "llama"}
    directory = published(target, tmp_path / "draft", config, tensors, file)
    assert kind_of(directory) == "eagle1"
    engine = eyas.load(target, directory, precision="fp32")
    assert said(engine, "eagle2", tree="9x3x3") == said(engine, "eagle1") == said(engine, "plain")
    assert str(engine.shape("auto", "eagle1")) == "static:4.3.2.2.1.3.2.2.1.0.0.0.0.3.0.0.0.0.0.0.0.2"
    assert_holds("eagle1", directory, target, network)


def test_eagle_1_without_a_bias_loads_too(target, tmp_path):
    network, _ = whole_vocabulary("eagle1", target)
    tensors = {name: value.detach().half() for name, value in network.named_parameters() if name != "fc.bias"}
    directory = published(
        target, tmp_path / "draft", {**llama(target), "num_hidden_layers": 1, "bias": False}, tensors, "pytorch_model.bin"
    )
    engine = eyas.load(target, directory, precision="fp32")
    assert said(engine, "eagle1") == said(engine, "plain")


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_medusa_loads_as_published(file, target, tmp_path):
    """Its config says blocks, the base model's name, and fewer heads than there are; its weights are `{head}.{place}`."""
    network, _ = whole_vocabulary("medusa", target)
    tensors = {name: value.detach().half() for name, value in network.named_parameters()}
    assert {"0.0.linear.weight", "0.0.linear.bias", "0.1.weight", "3.1.weight"} < tensors.keys()
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    directory = published(target, tmp_path / "draft", config, tensors, file)
    assert kind_of(directory) == "medusa"
    engine = eyas.load(target, directory, precision="fp32")
    assert said(engine, "medusa") == said(engine, "plain") and engine.shape("auto", "medusa").levels == 4
    assert_holds("medusa", directory, target, network)


def deepseek(target):
    """A config with DeepSeek-V3's keys, and its one module as the layer behind the target's own, with embedding and head once more."""
    network, _ = tiny_network("mtp", load_target(target, "fp32"), size=load_target(target, "fp32").config.vocab_size, unroll_steps=1)
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    before = f"model.layers.{layers}."
    tensors = {before + name.split(".", 2)[2]: value.detach().half() for name, value in network.named_parameters()}
    assert {before + name for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")} < tensors.keys()
    tensors |= {
        before + "embed_tokens.weight": network.embedding[0].half(),
        before + "shared_head.head.weight": network.embedding[0].half(),
    }
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(32).half()  # a whole checkpoint has the target's layers too
    config = {**llama(target), "num_hidden_layers": layers, "num_nextn_predict_layers": 1, "model_type": "deepseek_v3"}
    return config, tensors, network


def test_multi_token_prediction_loads_as_deepseek_names_it(target, tmp_path):
    config, tensors, network = deepseek(target)
    directory = published(target, tmp_path / "draft", config, tensors, "model.safetensors")
    assert kind_of(directory) == "mtp"
    engine = eyas.load(target, directory, precision="fp32")
    assert engine.network.levels == 1
    assert said(engine, "mtp", tree="chain:3") == said(engine, "plain")
    assert_holds("mtp", directory, target, network)


def test_what_is_not_computed_or_does_not_fit_is_one_line(target, drafts, tmp_path):
    def refused(directory) -> str:
        with pytest.raises(EyasError) as caught:
            eyas.load(target, directory, precision="fp32")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config, tensors, _ = deepseek(target)
    latent = tensors | {"model.layers.5.self_attn.kv_a_proj_with_mqa.weight": torch.ones(2, 2)}
    assert "latent attention or experts" in refused(published(target, tmp_path / "latent", config, latent, "model.safetensors"))
    for method, (directory, *_) in drafts.items():
        told = json.loads((directory / "config.json").read_text())
        own = read_tensors(directory)
        other = published(target, tmp_path / f"{method}-wide", {**told, "hidden_size": 64}, own, "model.safetensors")
        assert "hidden size 64 against the target's 32" in refused(other)
        lacking = {name: tensor for name, tensor in own.items() if name != next(name for name in own if name not in ("d2t", "t2d"))}
        assert "missing" in refused(published(target, tmp_path / f"{method}-lacking", told, lacking, "model.safetensors"))
        unknown = {**told, "eyas": {"method": "eagle9"}}
        assert "method 'eagle9', which is not known here" in refused(
            published(target, tmp_path / f"{method}-unknown", unknown, own, "model.safetensors")
        )
        heads = {**told, "num_attention_heads": 0}
        if method != "medusa":
            assert "0 heads over" in refused(published(target, tmp_path / f"{method}-heads", heads, own, "model.safetensors"))
        shares = {**told, "eyas": {**told["eyas"], "accuracies": [[7]]}}
        assert "accuracies must be lists of shares" in refused(
            published(target, tmp_path / f"{method}-shares", shares, own, "model.safetensors")
        )
