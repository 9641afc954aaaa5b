"""The EAGLE-3 network: fuse three features, one decoder layer that reads [embedding ; feature], a norm, a head over the draft vocabulary.

Parameter names are the published ones (`fc`, `midlayer.*`, `norm`, `lm_head`). Knows tensors only: how a tree is grown with it is
drafters/eagle3.py, how it learns is train/unroll.py. The embedding is the target's, handed in and never saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import DraftConfig, EyasError, TargetConfig, default_taps
from eyas.model.attention import Attend, NativeAttention, PlainAttention
from eyas.model.captured import Pool, StaticAttention, pool_on
from eyas.model.layer import NativeLayer, NativeLayers
from eyas.model.linear import Dense
from eyas.model.target import check_taps
from eyas.model.transformer import MLP, Attention, RMSNorm, Rotary, pack
from eyas.model.vocab import DraftVocab
from eyas.model.weights import check_tensors, load_strictly, read_json, read_tensors, save_tensors


class DraftBlock(nn.Module):
    """A decoder layer whose attention reads [input_layernorm(embedding) ; hidden_norm(feature)]; the residual is the un-normed feature."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(2 * config.hidden_size, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.norm_before_residual = config.norm_before_residual

    def join(self, e_NH: Tensor, g_NH: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [N, 2H], and what it is added to [N, H]: the feature as it came (EAGLE-3), or its norm (heads of others)."""
        normed_NH = self.hidden_norm(g_NH)
        return torch.cat([self.input_layernorm(e_NH), normed_NH], -1), normed_NH if self.norm_before_residual else g_NH

    def forward(self, e_NH: Tensor, g_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        both_N2H, residual_NH = self.join(e_NH, g_NH)
        a_NH = residual_NH + self.self_attn(both_N2H, rotation, attend)
        return a_NH + self.mlp(self.post_attention_layernorm(a_NH))


class DraftNetwork(nn.Module):
    """Weights and arithmetic of one draft step. `embedding` [V, H] is the target's table."""

    levels: int | None = None  # how deep it can guess: as deep as is asked for

    def __init__(self, config: DraftConfig, embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in range(3))
        if config.norm_before_fc:
            self.input_norm = RMSNorm(3 * config.target_hidden_size, config.rms_norm_eps)
        self.midlayer = DraftBlock(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.fuse_product, self.head = Dense(self.fc), Dense(self.lm_head)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.native: NativeLayers | None = None  # once prepared, where the kernel can run the layer
        self.pool: Pool | None = None  # once prepared on CUDA, where steps are captured
        self.embedding = [embedding]  # in a list: not this module's own, so not in its state dict

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def wants(self) -> tuple[int, ...]:
        return self.config.taps

    def join(self, tokens_N: Tensor, g_NH: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of tokens and features, and what it is added to."""
        return self.midlayer.join(self.embed(tokens_N), g_NH)

    @property
    def block(self) -> DraftBlock:
        return self.midlayer

    def fuse(self, features_N3H: Tensor) -> Tensor:
        """g [N, H] from low, middle and high features side by side (EAGLE-3, inference pipeline)."""
        if self.config.norm_before_fc:
            features_N3H = self.input_norm(features_N3H)
        if self.config.fc_norm:
            parts = features_N3H.chunk(3, -1)
            features_N3H = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return self.fuse_product(features_N3H)

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self.embedding[0]).to(self.dtype)

    def step(
        self, tokens_N: Tensor, g_NH: Tensor, positions_N: Tensor, attention: NativeAttention | PlainAttention | StaticAttention
    ) -> Tensor:
        """a [N, H], float32 where the kernel runs the layer: what it makes of features (or its own earlier output) and the tokens that
        followed."""
        e_NH = self.embed(tokens_N)
        if self.native and isinstance(attention, NativeAttention):
            wide_NH = g_NH.to(torch.float32, copy=True)
            self.native(wide_NH, self.rotary(positions_N, torch.float32), attention, beside_NH=e_NH.float())
            return wide_NH
        return self.midlayer(e_NH, g_NH, self.rotary(positions_N, self.dtype), attention.layer(0))

    def fed_back(self, a_NH: Tensor) -> Tensor:
        """What stands in for g at the next step: a itself, or its norm under `norm_output` (EAGLE-3.1)."""
        return self.norm(a_NH.to(self.dtype)) if self.config.norm_output else a_NH

    def logits(self, a_NH: Tensor) -> Tensor:
        """[N, D]"""
        return self.head(self.native.normed(a_NH) if self.native and a_NH.dtype == torch.float32 else self.norm(a_NH.to(self.dtype)))

    def logits_at(self, level: int, a_NH: Tensor) -> Tensor:
        """Of what lies one deeper than nodes at depth `level`: the same head at every depth."""
        return self.logits(a_NH)

    def prepare(self, bits: int = 16) -> DraftNetwork:
        """Pack weights for inference, as 8-bit ones where asked for.

        Logits are float32 from here on, as the target's are: bfloat16 would make many candidates equal.
        """
        pack(self.midlayer, bits)
        block = self.midlayer
        if NativeLayer.fits(block.self_attn, block.mlp) and not self.config.norm_before_residual:
            norms = (block.hidden_norm, block.post_attention_layernorm, block.input_layernorm)
            self.native = NativeLayers([NativeLayer(block.self_attn, block.mlp, *norms)], self.norm)
        self.fuse_product.pack(bits=bits)
        self.head.pack(torch.float64 if self.dtype == torch.float64 else torch.float32, bits)
        self.fc.weight = self.lm_head.weight = None
        self.pool = pool_on(self.device)
        return self.eval().requires_grad_(False)


def draft_config(target: TargetConfig, draft_vocab_size: int, taps: tuple[int, ...] | None = None, **settings: Any) -> DraftConfig:
    """A draft with the target's own width, heads and rotary base: one layer of it, attention twice as wide at the input."""
    return DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=target.head_dim,
        target_hidden_size=target.hidden_size,
        taps=check_taps(taps or default_taps(target.num_hidden_layers), target.num_hidden_layers),
        max_position_embeddings=target.max_position_embeddings,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        rope_scaling=target.rope_scaling,
        **settings,
    )


FACTS = ("target", "target_sha256", "chat_template_sha256")  # what a draft's config.json says of the target it was trained for


def save_draft(
    directory: Path,
    network: DraftNetwork,
    vocab: DraftVocab,
    target_layers: int,
    weights: Mapping[str, Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (bfloat16; the network's own, or others of its) and config.json in the layout that SafeAILab, SGLang and vLLM read,
    into an existing directory. Of `facts` those in FACTS are kept."""
    own = dict(network.named_parameters())
    tensors = {name: (weights or own)[name].detach().to(torch.bfloat16) for name in own} | vocab.as_tensors()
    save_tensors(directory, tensors)
    known = {name: (facts or {})[name] for name in FACTS if name in (facts or {})} | {"weights_sha256": tensors_hash(tensors)}
    (directory / "config.json").write_text(json.dumps(config_to_file(network.config, target_layers, known), indent=1))


def config_to_file(config: DraftConfig, target_layers: int, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json: engines' keys, and eyas's own facts in words under `eyas`."""
    keys = engine_keys(config) | {
        "eyas": {
            "taps_are_inputs_of_layers": list(config.taps),
            "target_layers": target_layers,
            "rope_theta_trained_with": config.rope_theta,
            "state_fed_back": "after the final norm" if config.norm_output else "before the final norm",
            **(facts or {}),
        },
    }
    if config.taps != default_taps(target_layers) or config.norm_before_fc:  # of the default taps all engines think alike
        keys |= layer_ids(config)
    return keys


def layer_ids(config: DraftConfig) -> dict[str, Any]:
    """Both spellings, so that the folder is right in whichever engine it ends up: vLLM reads the first, by input, SGLang the second, by
    output."""
    taps = list(config.taps)
    if taps[0] == 0:  # the output of no layer
        return {"eagle_aux_hidden_state_layer_ids": taps}
    eagle: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps], "use_aux_hidden_state": True}
    if config.norm_before_fc:
        eagle["norm_before_fc"] = True  # where SGLang looks for it
    return {"eagle_aux_hidden_state_layer_ids": taps, "eagle_config": eagle}


def engine_keys(config: DraftConfig) -> dict[str, Any]:
    """What every engine that reads such a config.json calls the draft's shape; layer ids, which they count differently, are not here.

    target_hidden_size only where it is another width: SafeAILab takes its presence for "the embedding is in this file".
    """
    left_out = ("taps", "rope_scaling", *(["target_hidden_size"] if config.target_hidden_size == config.hidden_size else []))
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        **{key: value for key, value in asdict(config).items() if key not in left_out},
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes, however they are spread over files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_from_file(directory: Path) -> DraftConfig:
    path = directory / "config.json"
    raw = read_json(path)
    own = raw["eyas"] if isinstance(raw.get("eyas"), dict) else {}
    if (method := own.get("method", "eagle3")) != "eagle3":
        raise EyasError(f"{directory} is a draft for method {method}; what was asked for is made for eagle3's drafts only")
    if "draft_vocab_size" not in raw or not own:
        raise EyasError(f"{directory} is not a draft of eyas's making (its config.json lacks draft_vocab_size or eyas); see `eyas import`")
    fields = {"target_hidden_size": raw.get("hidden_size")} | {key: raw[key] for key in DraftConfig.__dataclass_fields__ if key in raw}
    try:
        return DraftConfig(**{**fields, "taps": tuple(own["taps_are_inputs_of_layers"])})
    except (TypeError, KeyError) as error:
        raise EyasError(f"{path} lacks what a draft's config must say ({error}); take it from the original") from None
    except EyasError as error:
        raise EyasError(f"{path}: {error}") from None


def load_draft(directory: Path, embedding: Tensor, dtype: torch.dtype) -> tuple[DraftNetwork, DraftVocab]:
    """Network and vocabulary of a saved draft, on the embedding's device; strict about every tensor."""
    config, tensors = config_from_file(directory), read_tensors(directory)
    vocab = vocab_of(tensors, config, f"draft {directory}")
    return network_of(config, tensors, embedding, dtype, f"draft {directory}"), vocab


def vocab_of(tensors: dict[str, Tensor], config: DraftConfig, what: str) -> DraftVocab:
    """Takes `d2t` and `t2d`, both of which a draft of eyas's making has, out of the tensors."""
    if missing := [name for name in ("d2t", "t2d") if name not in tensors]:
        raise EyasError(f"{what} does not fit: missing {', '.join(missing)}")
    vocab = DraftVocab.from_tensors({name: tensors.pop(name) for name in ("d2t", "t2d")}, config.vocab_size)
    if len(vocab) != config.draft_vocab_size:
        raise EyasError(f"{what} does not fit: d2t names {len(vocab)} tokens, its config {config.draft_vocab_size}")
    return vocab


def checked_network(config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, what: str) -> DraftNetwork:
    """A network without memory that these weights fit by name and shape: a config may claim any size."""
    with torch.device("meta"):
        network = DraftNetwork(config, embedding)
    check_tensors(network, tensors, what)
    return network


def network_of(config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, dtype: torch.dtype, what: str) -> DraftNetwork:
    """A network with these weights."""
    network = checked_network(config, tensors, embedding, what).to(dtype).to_empty(device=embedding.device)
    load_strictly(network, tensors, what)
    return network


def check_fits(config: DraftConfig, target: TargetConfig) -> None:
    """A draft for another target is refused with what differs."""
    pairs = {
        "hidden size": (config.target_hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
    }
    wrong = [f"{name} {draft} against the target's {own}" for name, (draft, own) in pairs.items() if draft != own]
    if config.hidden_size != config.target_hidden_size == target.hidden_size:  # it reads the target's embeddings
        wrong.append(f"its own width {config.hidden_size} against the target's {target.hidden_size}")
    try:
        check_taps(config.taps, target.num_hidden_layers)
    except EyasError:
        wrong.append(f"taps {config.taps} of a target with {target.num_hidden_layers} layers")
    if wrong:
        raise EyasError(f"this draft was trained for another target: {'; '.join(wrong)}; use the matching draft")
