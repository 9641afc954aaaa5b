"""The EAGLE-3 network: fuse three features, one decoder layer that reads [embedding ; feature], a norm, a head over the draft vocabulary.

Parameter names are the published ones (`fc`, `midlayer.*`, `norm`, `lm_head`). Knows tensors only: how a tree is grown with it is
drafters/eagle3.py, how it learns is train/unroll.py. The embedding is the target's, handed in and never saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import DraftConfig, TargetConfig, check_taps, default_taps
from eyas.kernels.attention import Attend, NativeAttention, PassAttention
from eyas.kernels.layer import NativeLayer, NativeLayers
from eyas.kernels.linear import Dense
from eyas.model.cache import Pool, pool_on
from eyas.model.transformer import MLP, Attention, RMSNorm, Rotary, pack


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

    def step(self, tokens_N: Tensor, g_NH: Tensor, positions_N: Tensor, attention: PassAttention) -> Tensor:
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
        for layer in (self.fc, self.lm_head):
            layer.register_parameter("weight", None)
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
