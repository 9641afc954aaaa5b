"""Heads that others publish, of every shape that engines run: what is imported computes what those engines compute, guesses, trains on and
travels on, or is refused by name.

The oracle is `published`: the draft layer of vLLM, SGLang and SafeAILab, written down plainly over the file's own tensors.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from eyas.config import GREEDY, PLAIN, EyasError, TrainSettings, TreeShape
from eyas.decode.generate import Decoder
from eyas.diagnose.doctor import readings
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.eagle3_files import load_draft
from eyas.files.target import load_target
from eyas.files.tensors import save_tensors
from eyas.formats.importing import completed, resolve
from eyas.formats.layouts import find
from eyas.formats.portable import own_draft, write_own
from eyas.model.rows import Segment
from eyas.train.build import Setup, build
from eyas.train.features import Example
from eyas.train.trainer import Budget

V, D, WIDE = 263, 50, 32  # the target's tokens, the draft's, the target's width
SHAPE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": V,
    "draft_vocab_size": D,
    "tie_word_embeddings": False,
}


class Head:
    """A head as another trainer would leave it: random tensors under published names, and a config."""

    def __init__(self, width=WIDE, layers=1, qk_norm=False, biases=(), embedding=False, head=True, sees=None, turns=8, **config) -> None:
        self.sees, self.turns = sees, turns  # how many positions a row sees; how many entries of a head are rotated
        draw = torch.Generator().manual_seed(7)
        self.config = {**SHAPE, "hidden_size": width, "num_hidden_layers": layers, **config}
        self.config |= {"target_hidden_size": WIDE} if width != WIDE else {}
        heads = self.config["num_attention_heads"] * 8, self.config["num_key_value_heads"] * 8
        self.tensors: dict[str, torch.Tensor] = {}

        def add(name, *shape):
            noise = torch.randn(shape, generator=draw)
            self.tensors[name] = 1 + 0.2 * noise if "norm" in name else noise * (0.3 if len(shape) == 1 else 1.2 * shape[-1] ** -0.5)

        for layer in ["midlayer", *(f"layers.{number}" for number in range(1, layers))]:
            read = 2 * width if layer == "midlayer" else width
            sizes = {"self_attn.q_proj": (heads[0], read), "self_attn.k_proj": (heads[1], read), "self_attn.v_proj": (heads[1], read)}
            sizes |= {"self_attn.o_proj": (width, heads[0]), "mlp.gate_proj": (24, width), "mlp.up_proj": (24, width)}
            for name, shape in (sizes | {"mlp.down_proj": (width, 24)}).items():
                add(f"{layer}.{name}.weight", *shape)
                if name.split(".")[1][0] in biases:
                    add(f"{layer}.{name}.bias", shape[0])
            for name in ["input_layernorm", "post_attention_layernorm", *["hidden_norm"] * (layer == "midlayer")]:
                add(f"{layer}.{name}.weight", width)
            for name in ("q_norm", "k_norm") if qk_norm else ():
                add(f"{layer}.self_attn.{name}.weight", 8)
        add("fc.weight", width, 3 * WIDE)
        add("norm.weight", width)
        if head:
            add("lm_head.weight", self.config["draft_vocab_size"] or V, width)
        if embedding:
            add("embed_tokens.weight", V, width)
        ids = torch.arange(D) * 5
        if self.config["draft_vocab_size"] == D:
            self.tensors |= {"d2t": ids - torch.arange(D), "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)}

    def at(self, folder):
        folder.mkdir(exist_ok=True)
        save_tensors(folder, self.tensors)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def published(head: Head, embedding: torch.Tensor, tokens: list[int], features: torch.Tensor) -> torch.Tensor:
    """The outputs a [N, H] of rows at positions 0 .. N-1, row i reading token i and feature i, as engines compute them."""
    tensors, config = {name: tensor.double() for name, tensor in head.tensors.items()}, head.config
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"], config["rms_norm_eps"])  # noqa: E731
    dense = lambda x, name: F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))  # noqa: E731
    N, half = len(tokens), head.turns // 2
    far = torch.arange(N)[:, None] - torch.arange(N)  # how far each row lies behind another
    seen = (far >= 0) & (far < (head.sees or N))
    angles = torch.arange(N)[:, None].double() * config["rope_theta"] ** (-torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x):
        spun = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat([spun.real, spun.imag, x[..., 2 * half :]], -1)

    def attention(x, layer):
        q, k, v = (dense(x, f"{layer}.self_attn.{name}_proj").view(N, -1, 8) for name in "qkv")
        if f"{layer}.self_attn.q_norm.weight" in tensors:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k, v = (part.transpose(0, 1) for part in (rotated(q), rotated(k), v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return dense(read.transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")

    e, a = tensors.get("embed_tokens.weight", embedding.double())[tokens], features.double() @ tensors["fc.weight"].T
    for layer in ["midlayer", *(f"layers.{number}" for number in range(1, config["num_hidden_layers"]))]:
        first = layer == "midlayer"
        x = (
            torch.cat([norm(e, f"{layer}.input_layernorm"), norm(a, f"{layer}.hidden_norm")], -1)
            if first
            else norm(a, f"{layer}.input_layernorm")
        )
        a = a + attention(x, layer)
        y = norm(a, f"{layer}.post_attention_layernorm")
        a = a + dense(F.silu(dense(y, f"{layer}.mlp.gate_proj")) * dense(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return a


KINDS = {
    "as published": {},
    "an embedding of its own": {"embedding": True},
    "narrower": {"embedding": True, "width": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    "wider": {"embedding": True, "width": 48},
    "norms of queries and keys": {"qk_norm": True, "model_type": "qwen3", "architectures": ["Eagle3Qwen3ForCausalLM"]},
    "two layers": {"layers": 2},
    "three layers with norms": {"layers": 3, "qk_norm": True, "model_type": "qwen3"},
    "biases of attention": {"biases": "qkvo", "attention_bias": True},
    "Qwen 2's biases": {"biases": "qkv", "attention_bias": True, "model_type": "qwen2"},
    "biases everywhere": {"biases": "qkvogud", "attention_bias": True, "mlp_bias": True},
    "mrope": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "mrope under another key": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
    "no head": {"head": False, "draft_vocab_size": None},
    "no head, no ids": {"head": False, "draft_vocab_size": V, "eagle_config": {"eagle_aux_hidden_state_layer_ids": []}},
    "a head for every token": {"draft_vocab_size": V},
    "a window": {"sees": 3, "sliding_window": 3, "layer_types": ["sliding_attention"]},
    "Mistral's window": {"sees": 3, "sliding_window": 3, "model_type": "mistral"},
    "Qwen's window in two layers": {"sees": 4, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0,
                                    "model_type": "qwen3", "layers": 2, "qk_norm": True},
    "a window that is not used": {"sliding_window": 3, "use_sliding_window": False, "max_window_layers": 28},
    "a window of later layers": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 28, "model_type": "qwen2"},
    "half of a head rotated": {"turns": 4, "partial_rotary_factor": 0.5},
    "half of a head rotated, and a window": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}, "rope_theta": 500.0,
                                             "sees": 3, "turns": 4, "sliding_window": 3, "layer_types": ["sliding_attention"]},
}  # fmt: skip


def imported(folder, target):
    found = completed(find(folder), target)
    return resolve(found, target.config.num_hidden_layers).draft


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_imported_computes_what_engines_compute(kind, target, tmp_path):
    head = Head(**KINDS[kind])
    draft = imported(head.at(tmp_path / "theirs"), target)
    embedding, draw = target.embedding(), torch.Generator().manual_seed(3)
    network = draft.network(embedding, torch.float64)
    tokens, features = torch.randint(V, (9,), generator=draw).tolist(), torch.randn(9, 3 * WIDE, generator=draw).double()
    drafter = Eagle3Drafter(network, draft.vocab)
    drafter.reserve(1, 9)
    a = drafter.read(tokens, network.fuse(features), list(range(9)), [Segment(0, 9)]).detach()
    expected = published(head, embedding, tokens, features)
    assert float((a - expected).abs().max()) < 1e-9 * float(expected.abs().max())
    ready = Eagle3Drafter(draft.network(embedding).prepare(), draft.vocab)  # as decoding runs it: packed, float32, row by row
    ready.reserve(1, 9)
    g = ready.network.fuse(features.float())
    rows = [ready.read([token], g[row : row + 1], [row], [Segment(0, 1)]) for row, token in enumerate(tokens)]
    assert torch.allclose(torch.cat(rows).double(), expected, atol=1e-4)
    rows = head.tensors.get("lm_head.weight", target.head()).double()
    normed = F.rms_norm(expected, expected.shape[-1:], head.tensors["norm.weight"].double(), 1e-5)
    assert torch.allclose(network.logits(a), normed @ rows.T, atol=1e-9)
    assert draft.vocab.ids.tolist() == (list(range(V)) if head.config["draft_vocab_size"] != D else list(range(0, 5 * D, 5)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_kept_whole_and_its_trees_change_no_text(kind, place, target, tmp_path):
    draft = imported(Head(**KINDS[kind]).at(tmp_path / "theirs"), target)
    (tmp_path / "ours").mkdir()
    write_own(tmp_path / "ours", draft, {})
    again = own_draft(tmp_path / "ours")
    assert again.config == draft.config and set(again.weights) == set(draft.weights)
    loaded = load_target(place / "target", "fp32")
    network, vocab = load_draft(tmp_path / "ours", loaded.embedding.detach(), torch.float32)
    ready, drafter = loaded.prepare(), Eagle3Drafter(network.prepare(), vocab)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    texts = {}
    for name, shape in (("plain", PLAIN), ("tree", TreeShape.parse("20x4x5"))):
        *_, results = Decoder(ready, drafter if name == "tree" else None).run(prompts, shape, GREEDY, [0, 1], 20)
        texts[name] = [result.tokens for result in results]
    assert texts["tree"] == texts["plain"]


OUTER = ("architectures", "draft_vocab_size", "target_hidden_size", "eagle_config")


@pytest.mark.parametrize("kind", KINDS)
def test_in_speculators_layout_it_is_the_same_head(kind, target, tmp_path):
    head = Head(**KINDS[kind])
    plain = imported(head.at(tmp_path / "plain"), target)
    outer = {name: head.config.get(name) for name in OUTER if name != "eagle_config"} | {"norm_before_residual": False}
    layer = {name: value for name, value in head.config.items() if name not in OUTER}
    told = {"algorithm": "eagle3", "verifier": {"name_or_path": "owner/target", "architectures": ["LlamaForCausalLM"]}}
    head.config = {**outer, "speculators_model_type": "eagle3", "speculators_version": "0.9.0", "transformer_layer_config": layer,
                   "speculators_config": told, "embed_requires_grad": False, "model_type": "speculator_model",
                   "auto_map": {"": "config.Eagle3SpeculatorConfig"}, "tie_word_embeddings": False}  # fmt: skip
    head.tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in head.tensors.items()}
    again = imported(head.at(tmp_path / "theirs"), target)
    assert again.config == plain.config and again.facts == {"target": "owner/target"}
    assert again.weights.keys() == plain.weights.keys() and all(
        torch.equal(again.weights[name], plain.weights[name]) for name in plain.weights
    )


# ---- who owns what ----


def test_an_embedding_that_is_the_targets_is_not_kept_twice(target, tmp_path):
    head = Head(embedding=True)
    head.tensors["embed_tokens.weight"] = target.embedding().half()
    found = completed(find(head.at(tmp_path / "theirs")), target)
    assert not found.shape["own_embedding"] and "the embedding that it brings is the target's" in found.told


def test_without_a_target_an_embedding_is_kept_and_a_head_is_asked_for(target, tmp_path):
    found = find(Head(embedding=True).at(tmp_path / "theirs"))
    assert "embed_tokens.weight" in found.resolved(8).weights
    with pytest.raises(EyasError, match="no head of its own, so the target's counts; name the target with --target"):
        find(Head(head=False, draft_vocab_size=V).at(tmp_path / "headless")).resolved(8)


def test_a_tied_head_is_the_embedding_it_brings(target, tmp_path):
    draft = imported(Head(head=False, embedding=True, draft_vocab_size=V, tie_word_embeddings=True).at(tmp_path / "theirs"), target)
    assert torch.equal(draft.weights["lm_head.weight"], draft.weights["embed_tokens.weight"])
    headless = Head(head=False, draft_vocab_size=V, tie_word_embeddings=True).at(tmp_path / "headless")
    with pytest.raises(EyasError, match="vLLM takes the target's head, SGLang its embedding"):
        imported(headless, target)


# ---- the vocabulary ----

ALL = {"draft_vocab_size": V}
NONE, ZEROS = torch.zeros(V, dtype=torch.bool), torch.zeros(V, dtype=torch.int32)


@pytest.mark.parametrize("tables", [{}, {"t2d": NONE}, {"d2t": ZEROS}, {"d2t": ZEROS, "t2d": NONE}, {"d2t": ZEROS, "t2d": ~NONE}], ids=str)
def test_where_the_head_has_a_row_for_every_token_empty_tables_mean_nothing(tables, tmp_path):
    head = Head(**ALL)
    head.tensors |= tables
    found = find(head.at(tmp_path / "theirs"))
    assert found.vocab.ids.tolist() == list(range(V))
    assert bool(found.told) == ("t2d" not in tables or not tables["t2d"].any())


def test_of_two_tables_the_one_that_was_filled_counts(tmp_path):
    ids = list(range(0, 5 * D, 5))
    for name, change in {
        "no t2d": {"t2d": torch.zeros(V, dtype=torch.bool)},
        "no d2t": {"d2t": torch.zeros(D, dtype=torch.int64)},
    }.items():
        head = Head()
        head.tensors |= change
        found = find(head.at(tmp_path / name))
        assert found.vocab.ids.tolist() == ids and "never filled" in " ".join([*found.told, *found.wrong])
    head.tensors |= {"t2d": torch.zeros(V, dtype=torch.bool)}
    with pytest.raises(EyasError, match="d2t and t2d were never filled, so nothing says which 50 of 263 tokens"):
        find(head.at(tmp_path / "neither"))


# ---- names ----


@pytest.mark.parametrize("other", ["layers.1", "additional_layers.0", "model.layers.1"])
@pytest.mark.parametrize("norm", ["input_layernorm", "hidden_norm", "both"])
def test_the_norm_of_a_further_layer_has_two_names(other, norm, target, tmp_path):
    """vLLM reads input_layernorm, SGLang hidden_norm, and earlier SGLang called the layer additional_layers.0."""
    head = Head(layers=2)
    weights = imported(head.at(tmp_path / "usual"), target).weights
    held = head.tensors["layers.1.input_layernorm.weight"]
    head.tensors |= {"layers.1.hidden_norm.weight": held.clone()}
    if norm != "both":
        del head.tensors[f"layers.1.{'hidden_norm' if norm == 'input_layernorm' else 'input_layernorm'}.weight"]
    head.tensors = {name.replace("layers.1", other): tensor for name, tensor in head.tensors.items()}
    again = imported(head.at(tmp_path / "theirs"), target).weights
    assert set(again) == set(weights) and all(torch.equal(again[name], weights[name]) for name in weights)


def test_two_different_norms_of_one_layer_are_refused(tmp_path):
    head = Head(layers=2)
    head.tensors["layers.1.hidden_norm.weight"] = torch.ones(WIDE)
    with pytest.raises(EyasError, match=r"layers\.1 has an input_layernorm, which vLLM reads, and another hidden_norm, which SGLang reads"):
        find(head.at(tmp_path / "theirs"))


# ---- what a config says ----


NVIDIA = {"use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
          "next_layer_regular": True, "parallel_draft_step": 1, "eagle_aux_hidden_state_layer_ids": []}  # fmt: skip
HUGGING_FACE = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "initializer_range": 0.02, "attention_dropout": 0.0,
                "use_cache": True, "pretraining_tp": 1, "transformers_version": "4.51.0", "torch_dtype": "bfloat16", "pruned_heads": {},
                "return_dict": True, "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False, "max_window_layers": 28,
                "sliding_window": None, "use_sliding_window": False, "target_model_type": "qwen2_5_vl", "rope_scaling": None}  # fmt: skip


@pytest.mark.parametrize("fields", [{"eagle_config": NVIDIA}, HUGGING_FACE, {"layer_types": ["full_attention"] * 4}])
def test_fields_that_change_nothing_are_known(fields, tmp_path):
    assert find(Head(**fields).at(tmp_path / "theirs")).wrong == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_multiplier": 0.5}, "does not know the field 'attention_multiplier'"),
        ({"eagle_config": {"new_kind_of_norm": False}}, "does not know the field 'eagle_config.new_kind_of_norm'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "twist": 3}}, "does not know the field 'rope_scaling.twist'"),
        ({"a": 1, "b": 2}, "does not know the fields 'a', 'b'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 of heads 8 wide"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor must be a number"),
        ({"layer_types": ["sliding_attention"]}, "lacks sliding_window"),
        ({"layer_types": ["sliding_attention"], "sliding_window": "all"}, "sliding_window must be a whole number"),
        ({"layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "all the same window"),
        ({"layers": 2, "layer_types": ["full_attention"]}, "layer_types ['full_attention']"),
        ({"layer_types": ["chunked_attention"]}, "layer_types ['chunked_attention']"),
        ({"layer_types": 7}, "layer_types 7"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm is True"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step is 4"),
        ({"logit_scale": 0.25}, "logit_scale is 0.25"),
        ({"num_aux_hidden_states": 5}, "num_aux_hidden_states is 5, and its layer ids name 3"),
        ({"model_type": "gemma2"}, "model_type 'gemma2'; eyas computes"),
    ],
)
def test_a_field_that_may_change_something_is_refused_by_name(fields, words, tmp_path):
    folder = Head(**fields).at(tmp_path / "theirs")
    with pytest.raises(EyasError) as refused:
        find(folder)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("tensor", "words"), [("fc.bias", "unknown fc.bias"), ("mask_hidden", "unknown mask_hidden")])
def test_a_tensor_without_a_place_is_refused_by_name(tensor, words, tmp_path):
    head = Head()
    head.tensors[tensor] = torch.ones(WIDE)
    with pytest.raises(EyasError, match=words):
        find(head.at(tmp_path / "theirs"))


def test_a_narrow_head_without_an_embedding_is_refused(tmp_path):
    with pytest.raises(EyasError, match="is 16 wide and its target 32, so it needs an embedding of its own"):
        find(Head(width=16, num_attention_heads=2, num_key_value_heads=1).at(tmp_path / "theirs"))


def test_claims_against_the_tensors_are_told(tmp_path):
    claims = {"attention_bias": True, "use_qk_norm": True, "target_vocab_size": 99, "truncated_vocab_size": 98}
    lines = " ".join(find(Head(**claims).at(tmp_path / "theirs")).wrong)
    assert all(f"{name} {value}" in lines for name, value in claims.items())


# ---- going on ----


@pytest.mark.parametrize(
    "kind", ["narrower", "three layers with norms", "biases everywhere", "no head", "half of a head rotated, and a window"]
)
def test_it_can_be_trained_further(kind, place, target, tmp_path):
    draft = imported(Head(**KINDS[kind]).at(tmp_path / "theirs"), target)
    (tmp_path / "ours").mkdir()
    write_own(tmp_path / "ours", draft, {})
    loaded = load_target(place / "target", "fp32")
    examples = [Example([5, 6, 7, *range(10 * n, 10 * n + 20)], [-1] * 3 + [0] * 20, True) for n in range(1, 7)]
    settings = TrainSettings(unroll_steps=3, draft_vocab_size=len(draft.vocab), draft_layers=draft.config.draft_layers, tokens_per_batch=60,
                             warmup_steps=1, tree_every=0, sampled_columns=0)  # fmt: skip
    trainer = build(Setup(loaded, draft.config.taps, examples, None, settings, tmp_path / "out", start=tmp_path / "ours"))
    trainer.run(Budget(steps=3), lambda *_: None)
    after, before = own_draft(tmp_path / "out"), own_draft(tmp_path / "ours")
    assert after.config == before.config and torch.equal(after.vocab.ids, before.vocab.ids)
    moved = {name for name in before.weights if not torch.equal(after.weights[name], before.weights[name])}
    assert set(before.weights) - moved == {"embed_tokens.weight"} & set(before.weights), "all but an embedding of its own is trained"


@pytest.mark.parametrize("kind", ["narrower", "three layers with norms", "biases everywhere", "half of a head rotated, and a window"])
def test_the_doctor_can_read_it_otherwise(kind, target, tmp_path):
    """Each usual mistake undone is a draft that still fits its config."""
    draft, embedding = imported(Head(**KINDS[kind]).at(tmp_path / "theirs"), target), target.embedding()
    found = list(readings(draft, target))
    assert len({reading.cause for reading in found}) > 5 and all(reading.draft.network(embedding) for reading in found)
