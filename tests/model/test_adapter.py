"""A model run through transformers is the same target: chains, trees, batches, features and text are what transformers makes of them."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers as hf

import eyas
from eyas.config import EyasError, Sampling, TreeShape
from eyas.decode.generate import Decoder
from eyas.drafters.draft_model import ModelDrafter
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.adaptable import adapted_config, check_adaptable
from eyas.files.adapted import load_adapted
from eyas.files.eagle3_files import check_fits, save_draft
from eyas.files.hf_config import has_own_blocks
from eyas.files.target import load_target, target_config
from eyas.files.tensors import load_strictly, read_tensors
from eyas.model.adapter import AdaptedTarget
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.mask import ancestor_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.target import Target
from eyas.model.vocab import DraftVocab
from tests.tiny import byte_tokenizer, randomize

V = 61
END = 7
TAPS = (1, 2, 4)
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": END,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 5, "layer_types": LAYERS, "head_dim": 8}
BASES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**SHAPE, **GROUPED, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SHAPE, **GROUPED, **WINDOW, rope_parameters=BASES, query_pre_attn_scalar=16),
    "gemma2": lambda: hf.Gemma2Config(
        **SHAPE, **GROUPED, **WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=16
    ),
    "phi3": lambda: hf.Phi3Config(**SHAPE, **GROUPED, sliding_window=6),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SHAPE),
    "gpt2": lambda: hf.GPT2Config(**SHAPE),
    "phi": lambda: hf.PhiConfig(**SHAPE, **GROUPED),
    "olmo2": lambda: hf.Olmo2Config(**SHAPE, **GROUPED),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **SHAPE,
        **GROUPED,
        **WINDOW,
        global_head_dim=12,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=V,
        use_bidirectional_attention="vision",
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **SHAPE,
        **GROUPED,
        head_dim=8,
        attention_chunk_size=6,
        layer_types=[kind.replace("sliding", "chunked") for kind in LAYERS],
        moe_layers=[],
        intermediate_size_mlp=48,
        num_local_experts=2,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**SHAPE, **GROUPED, **WINDOW, num_local_experts=3, num_experts_per_tok=2),
    "cohere": lambda: hf.CohereConfig(**SHAPE, **GROUPED, logit_scale=0.3),
    "granite": lambda: hf.GraniteConfig(**SHAPE, **GROUPED, logits_scaling=3.0, residual_multiplier=0.7),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **SHAPE,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=4,
    ),
}
MAIN = ("gemma3", "phi3", "gpt_neox", "olmo2")  # these through every claim, the others through the shortest that covers most
DTYPES = {"gpt_oss": torch.float32, "deepseek_v3": torch.float32}  # PyTorch's product of grouped experts knows no float64
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # transformers takes norms, angles and softmax in float32, in float64 models too
TOKENS = [(5 * i * i + 3 * i + 11) % V for i in range(24)]
PARENTS = [-1, 0, 0, 1, 1, 2, 4, 4, 6, 6, 8]  # root first; up to six levels, so a window of five cuts off some ancestors


def save(family: str, directory: Path, **changes) -> Path:
    """A random model of this family as `save_pretrained` leaves it."""
    torch.manual_seed(3)
    config = FAMILIES[family]() if isinstance(family, str) else family
    for name, value in changes.items():
        setattr(config, name, value)
    network = hf.AutoModelForCausalLM.from_config(config)
    spread(network)
    network.save_pretrained(directory)
    return directory


@torch.no_grad()
def spread(network: torch.nn.Module) -> None:
    """Random weights large enough that rows differ, biases and norms too; one seed, one model."""
    randomize(network, 5)
    for name, parameter in network.named_parameters():
        if ("head" in name or "embed_out" in name) and parameter.dim() == 2:
            parameter.mul_(1.5)


@cache
def loaded(family: str) -> AdaptedTarget:
    with TemporaryDirectory() as directory:
        return load_adapted(save(family, Path(directory)), DTYPES.get(family, torch.float64)).prepare()


@cache
def theirs(family: str) -> torch.nn.Module:
    """The same model as transformers runs it, with its plainest attention."""
    with TemporaryDirectory() as directory:
        save(family, Path(directory))
        settings = {"dtype": DTYPES.get(family, torch.float64), "attn_implementation": "eager"}
        return hf.AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def own(family: str, tokens: list[int]) -> torch.Tensor:
    """Logits [n, V] of transformers' forward of one text."""
    with torch.no_grad():
        return theirs(family)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def read(target: AdaptedTarget | Target, tokens: list[int], taps=()):
    """One text in one pass."""
    return target(chain_rows(0, tokens, 0), target.new_cache(1, len(tokens)), taps)


def path_to(node: int) -> list[int]:
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def tree_rows(slot: int, start: int, tokens: list[int]) -> Rows:
    positions = torch.tensor([start + len(path_to(node)) - 1 for node in range(len(PARENTS))])
    return Rows(torch.tensor(tokens), positions, [Segment(slot, len(PARENTS), ancestor_mask(PARENTS))])


# ---- passes ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_a_text_are_those_of_transformers(family):
    torch.testing.assert_close(read(loaded(family), TOKENS).logits, own(family, TOKENS), **CLOSE)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "gemma2", "gpt_oss"])
def test_the_window_of_these_models_matters_to_these_tests(family):
    far = read(loaded(family), TOKENS).logits[-1]
    wide = deepcopy(theirs(family))
    wide.config.sliding_window = 1000
    for part in wide.modules():
        if hasattr(part, "config"):
            part.config = wide.config
    with torch.no_grad():
        assert (wide(input_ids=torch.tensor([TOKENS])).logits[0, -1] - far).abs().max() > 1e-2


@pytest.mark.parametrize("family", MAIN)
def test_prefill_and_one_row_at_a_time_is_the_text_read_at_once(family):
    target = loaded(family)
    store, logits = target.new_cache(1, len(TOKENS)), []
    for start, end in pairwise([0, 10, *range(11, len(TOKENS) + 1)]):
        logits.append(target(chain_rows(0, TOKENS[start:end], start), store).logits)
        store.keep(0, range(end - start))
    torch.testing.assert_close(torch.cat(logits), own(family, TOKENS), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_of_a_tree_has_the_logits_of_its_path_read_as_a_text(family):
    target, text, guesses = loaded(family), TOKENS[:9], TOKENS[9 : 9 + len(PARENTS)]
    store = target.new_cache(1, 9 + len(PARENTS))
    target(chain_rows(0, text, 0), store)
    store.keep(0, range(9))
    out = target(tree_rows(0, 9, guesses), store)
    for node in range(len(PARENTS)):
        path = [guesses[row] for row in path_to(node)]
        torch.testing.assert_close(out.logits[node], own(family, text + path)[-1], **CLOSE)


@pytest.mark.parametrize("family", MAIN)
def test_sequences_of_a_pass_do_not_mix(family):
    """A tree behind a long text, one row behind a short one and a whole text, in one pass and out of slot order."""
    target, guesses = loaded(family), TOKENS[3 : 3 + len(PARENTS)]
    store = target.new_cache(3, 40)
    for slot, length in ((0, 4), (2, 17)):
        target(chain_rows(slot, TOKENS[:length], 0), store)
        store.keep(slot, range(length))
    parts = [tree_rows(2, 17, guesses), chain_rows(0, [20], 4), chain_rows(1, TOKENS[5:15], 0)]
    rows = Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "positions")), [p.segments[0] for p in parts])
    logits = target(rows, store).logits.split([len(PARENTS), 1, 10])
    for node in range(len(PARENTS)):
        wanted = own(family, TOKENS[:17] + [guesses[row] for row in path_to(node)])
        torch.testing.assert_close(logits[0][node], wanted[-1], **CLOSE)
    torch.testing.assert_close(logits[1][0], own(family, [*TOKENS[:4], 20])[-1], **CLOSE)
    torch.testing.assert_close(logits[2], own(family, TOKENS[5:15]), **CLOSE)


@pytest.mark.parametrize("family", [*MAIN, "deepseek_v3"])
def test_keeping_a_path_and_going_on_is_the_plain_text(family):
    target, text, guesses = loaded(family), TOKENS[:9], TOKENS[9 : 9 + len(PARENTS)]
    store, path = target.new_cache(2, 40), path_to(9)
    target(chain_rows(1, text, 0), store)
    store.keep(1, range(9))
    target(tree_rows(1, 9, guesses), store)
    store.keep(1, path)
    written = text + [guesses[row] for row in path]
    assert store.lengths == [0, len(written)]
    wanted = own(family, written + TOKENS[:6])[len(written) :]
    torch.testing.assert_close(target(chain_rows(1, TOKENS[:6], len(written)), store).logits, wanted, **CLOSE)
    store.copy_prefix(store, 1, 0, 11)  # and another slot may begin with what this one holds, in this cache or a new one
    other = target.new_cache(1, 20)
    other.copy_prefix(store, 1, 0, 11)
    for held in (store, other):
        held.cut(0, 10)
        torch.testing.assert_close(target(chain_rows(0, TOKENS[:3], 10), held).logits, own(family, written[:10] + TOKENS[:3])[10:], **CLOSE)
    store.clear(1)
    torch.testing.assert_close(target(chain_rows(1, TOKENS, 0), store).logits, own(family, TOKENS), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_inputs_of_the_tapped_layers_and_hidden_is_what_the_head_reads(family):
    target = loaded(family)
    out = read(target, TOKENS, TAPS)
    with torch.no_grad():
        states = theirs(family)(input_ids=torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.features, torch.cat([states[layer][0] for layer in TAPS], -1), **CLOSE)
    torch.testing.assert_close(out.hidden, states[-1][0], **CLOSE)
    torch.testing.assert_close(target.head(out.hidden), out.logits, **CLOSE)
    assert read(target, TOKENS).features is None


def test_logits_come_only_for_the_rows_asked_for():
    target, every = loaded("gemma3"), read(loaded("gemma3"), TOKENS).logits
    for asked in (slice(-1, None), torch.tensor([3, 7])):
        some = target(chain_rows(0, TOKENS, 0), target.new_cache(1, 24), (), asked).logits
        torch.testing.assert_close(some, every[asked], **CLOSE)


def test_the_cache_may_be_made_within_inference_and_used_outside_it():
    target = loaded("olmo2")
    store = target.new_cache(1, 24)
    with torch.inference_mode():
        target(chain_rows(0, TOKENS[:9], 0), store)
    store.keep(0, [0, 2, 4])
    assert target(chain_rows(0, TOKENS[:3], 3), store).logits.isfinite().all()


def test_llama_through_the_adapter_is_our_own_target(tmp_path):
    save("llama", tmp_path)
    adapted = loaded("llama")
    target = Target(target_config(tmp_path)).double()
    load_strictly(target, read_tensors(tmp_path), "llama")
    assert has_own_blocks(tmp_path) and isinstance(load_target(tmp_path, "fp32"), Target)
    assert adapted_config(tmp_path) == target.config
    ours, through = read(target.prepare(), TOKENS, TAPS), read(adapted, TOKENS, TAPS)
    for name in ("logits", "features", "hidden"):
        torch.testing.assert_close(getattr(through, name), getattr(ours, name), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loose_matrices_and_two_numbers_make_the_logits(family, tmp_path):
    target = load_adapted(save(family, tmp_path), DTYPES.get(family, torch.float64))
    assert target.blocks is None and target.embedding.shape == (V, 32)
    out = read(target, TOKENS)
    raw = out.hidden @ target.head_weight.T + (0 if target.head_bias is None else target.head_bias)
    logits, cap = target.logit_scale * raw, target.logit_softcap
    torch.testing.assert_close(logits if cap is None else cap * torch.tanh(logits / cap), out.logits, **CLOSE)


def test_our_own_target_has_the_same_interface(tmp_path):
    save("llama", tmp_path)
    target = load_target(tmp_path, "fp32")
    assert torch.equal(target.embedding, target.model.embed_tokens.weight) and torch.equal(target.head_weight, target.lm_head.weight)
    assert (target.logit_scale, target.logit_softcap, target.head_bias, len(target.blocks)) == (1.0, None, None, 5)


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_bfloat16_stays_near_and_its_logits_are_wide(family, tmp_path):
    target = load_adapted(save(family, tmp_path), torch.bfloat16).prepare()
    logits = read(target, TOKENS).logits
    assert target.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert (logits - own(family, TOKENS)).norm() < 0.1 * own(family, TOKENS).norm()


# ---- text ----


@cache
def draft(family: str) -> tuple[DraftNetwork, DraftVocab]:
    target = loaded(family)
    network = DraftNetwork(draft_config(target.config, 31, TAPS), target.embedding).double()
    randomize(network, 1)
    return network, DraftVocab(torch.randperm(V, generator=torch.Generator().manual_seed(2))[:31].sort().values, V)


def written(family: str, drafter=None, shape: str = "chain:1", sampling: Sampling = Sampling(), count: int = 30) -> list[list[int]]:  # noqa: B008
    """Two texts of different prompts, together."""
    prompts = [TOKENS[:5], TOKENS[3:17]]
    *_, texts = Decoder(loaded(family), drafter).run(prompts, TreeShape.parse(shape), sampling, [4, 5], count)
    return [text.tokens[text.prompt_length :] for text in texts]


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_leaves_the_text_as_it_is(family, temperature):
    plain = written(family, sampling=Sampling(temperature))
    assert written(family, Eagle3Drafter(*draft(family)), "12x3x4", Sampling(temperature)) == plain
    assert written(family, Eagle3Drafter(*draft(family)), "chain:3", Sampling(temperature)) == plain


def test_a_target_that_drafts_for_itself_is_always_right():
    """Every guess of a model about itself comes true, so its trees are read right as a draft model too."""
    target = loaded("gemma3")
    decoder = Decoder(target, ModelDrafter(target, V))
    *_, (text,) = decoder.run([TOKENS[:9]], TreeShape.parse("chain:3"), Sampling(1.0), [4], 21)
    assert text.tokens[9:] == written_alone("gemma3", TOKENS[:9], 21) and set(text.accepted_lengths) <= {4, len(text.tokens[9:]) % 4}


def written_alone(family: str, prompt: list[int], count: int) -> list[int]:
    *_, (text,) = Decoder(loaded(family)).run([prompt], TreeShape.parse("chain:1"), Sampling(1.0), [4], count)
    return text.tokens[len(prompt) :]


@pytest.mark.parametrize("family", MAIN)
def test_greedy_text_is_that_of_transformers_generate(family):
    for prompt, ours in zip((TOKENS[:5], TOKENS[3:17]), written(family)):
        settings = {"do_sample": False, "max_new_tokens": 30, "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
        wanted = theirs(family).generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert ours == wanted


# ---- configs ----


def test_a_config_comes_from_the_files(tmp_path):
    save("gemma3", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    config = target_config(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (V, 32, 5, 48)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.max_position_embeddings == 128 and config.eos_token_ids == (7, 9) and not config.tie_word_embeddings
    assert config.rope_theta == 50_000.0 and config.rope_scaling["rope_type"] == "linear"  # of the layers that see everything
    check_fits(draft_config(config, 20, TAPS), config)


def test_configs_with_names_of_their_own_are_read(tmp_path):
    hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=3).save_pretrained(tmp_path)
    config = target_config(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings, config.intermediate_size) == (32, 2, 64, 128)
    assert config.num_key_value_heads == 4 and config.eos_token_ids == (3,)


def test_longrope_ends_where_its_frequencies_would_change(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = hf.Phi3Config(**{**SHAPE, "max_position_embeddings": 512}, original_max_position_embeddings=64, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    assert target_config(tmp_path).max_position_embeddings == 64 and target_config(tmp_path).rope_scaling is None


def test_a_llama_with_what_our_blocks_lack_goes_through_transformers(tmp_path):
    save(hf.LlamaConfig(**SHAPE, mlp_bias=True, hidden_act="gelu"), tmp_path)
    assert not has_own_blocks(tmp_path) and isinstance(load_target(tmp_path, "fp32"), AdaptedTarget)


# ---- refusals ----


def one_line(directory: Path, config: hf.PreTrainedConfig | dict) -> str:
    """The message with which a directory that holds nothing but this config is refused."""
    if isinstance(config, dict):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
    else:
        config.save_pretrained(directory)
    with pytest.raises(EyasError) as caught:
        target_config(directory)
    with pytest.raises(EyasError) as again:
        load_target(directory, "fp32")
    assert str(again.value) == str(caught.value) and "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: hf.MambaConfig(), "'mamba' model: a state-space.* keeps one running state, so a tree of guesses cannot be checked"),
        (lambda: hf.Mamba2Config(), "'mamba2' model: a state-space"),
        (lambda: hf.RwkvConfig(), "'rwkv' model: a state-space"),
        (lambda: hf.JambaConfig(), "'jamba' model: a state-space"),
        (lambda: hf.RecurrentGemmaConfig(), "'recurrent_gemma' model: a state-space, recurrent"),
        (lambda: hf.Qwen3NextConfig(), "'qwen3_next' model: a state-space, recurrent, convolution or linear-attention layer"),
        (lambda: hf.MiniMaxConfig(), "'minimax' model: a state-space"),
        (lambda: hf.Lfm2Config(full_attn_idxs=[2, 5]), "'lfm2' model: a state-space"),
        (lambda: hf.T5Config(), "'t5' model: an encoder reads its prompt"),
        (lambda: hf.VoxtralConfig(), "'voxtral' model: it wraps a text model with images or sound in a way of its own; give a directory"),
        (lambda: hf.BloomConfig(), "'bloom' model: transformers computes its attention inside the model"),
        (lambda: hf.ViTConfig(), "'vit' model: transformers has no causal language model of this type"),
        (lambda: hf.Gemma3TextConfig(use_bidirectional_attention=True), "'gemma3_text' model: its rows see later ones"),
        (lambda: {"model_type": "tomorrow", "auto_map": {"AutoConfig": "x.Y"}}, "'tomorrow' model, which transformers .* does not know"),
        (lambda: {"model_type": "gpt_neox", "hidden_size": "wide"}, "config.json cannot be used"),
    ],
)
def test_what_cannot_be_a_target_is_refused_from_its_config_alone(tmp_path, config, reason):
    import re

    assert re.search(reason, one_line(tmp_path / "model", config()))


def test_a_model_that_computes_something_else_than_its_attention_says_is_found_at_loading(tmp_path, monkeypatch):
    """What no config tells: here a layer that mixes neighbouring rows, as a convolution would."""
    save("olmo2", tmp_path)
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

    plain = Olmo2MLP.forward
    monkeypatch.setattr(Olmo2MLP, "forward", lambda self, x: plain(self, x + x.roll(1, 1)))
    with pytest.raises(EyasError, match=r"olmo2.* cannot be a target: its logits differ from transformers' own by"):
        load_adapted(tmp_path, torch.float32)


def test_an_encoder_s_mask_is_found_at_loading(tmp_path):
    save(hf.BertConfig(**SHAPE, is_decoder=False), tmp_path)
    with pytest.raises(EyasError, match="see later ones"):
        load_adapted(tmp_path, torch.float32)


def test_weights_load_strictly(tmp_path):
    save("olmo2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(EyasError, match=r"does not fit: missing model.layers.5.*and \d+ more") as caught:
        load_adapted(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EyasError, match="transformers cannot load") as gone:
        load_adapted(tmp_path, torch.float32)
    assert "\n" not in str(caught.value) + str(gone.value)


def test_an_adapted_target_cannot_be_cut(tmp_path):
    with pytest.raises(EyasError, match="'olmo2' target cannot be cut to its first layers; name a smaller model with --draft-model"):
        loaded("olmo2").shallow(2)


def test_check_adaptable_reads_no_weights(tmp_path):
    FAMILIES["gpt_neox"]().save_pretrained(tmp_path)
    assert check_adaptable(tmp_path).model_type == "gpt_neox"


# ---- from the outside ----


def test_a_saved_gpt_neox_runs_through_eyas_load_and_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": end}
    target = save(hf.GPTNeoXConfig(**shape), tmp_path / "target")
    tokenizer.save_pretrained(target)
    config = target_config(target)
    network = DraftNetwork(draft_config(config, 200, TAPS), load_target(target, "fp32").embedding)
    randomize(network, 1)
    (tmp_path / "draft").mkdir()
    save_draft(tmp_path / "draft", network, DraftVocab(torch.arange(200), len(tokenizer)), 5)
    engine = eyas.load(target, tmp_path / "draft", precision="fp32")
    plain = engine.generate("Where is the nest?", method="plain", max_new_tokens=12)
    drafted = engine.generate("Where is the nest?", tree="8x2x3", max_new_tokens=12)
    assert drafted.tokens == plain.tokens and len(plain.tokens) <= 12
    from eyas import cli

    words = ["generate", "Where is the nest?", "--target", target, "--precision", "fp32", "--method", "plain", "--max-new-tokens", 12]
    assert cli.main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.strip() == plain.text.strip()
    assert cli.main([str(word) for word in [*words[:6], "--method", "draft-model"]]) == 2
    assert "'gpt_neox' target cannot be cut" in capsys.readouterr().err
