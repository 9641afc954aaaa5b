"""The EAGLE-3 network: a product that fuses the features, one decoder layer that reads [embedding ; g], a norm, and a head over the draft
vocabulary (arXiv 2503.01840, inference pipeline).

A draft may have more layers (ordinary ones, behind the first), another width than its target, biases, norms of queries and keys, a window.
Parameter names are the published ones (`fc`, `midlayer.*`, `norm`, `lm_head`), and `layers.1.*` and on for further layers. The embedding is
the target's, handed in and never saved; a draft with one of its own (`embed_tokens`) reads and saves that, and does not train it. Knows
tensors only: drafters/eagle3.py grows trees with the network, train/unroll.py trains it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import DraftConfig, TargetConfig, check_taps, default_taps
from eyas.kernels import native
from eyas.kernels.attention import Attend, NativeAttention, PassAttention
from eyas.kernels.layer import NativeLayer, NativeLayers
from eyas.kernels.linear import Dense
from eyas.kernels.step import NativeStep
from eyas.model.cache import Pool, pool_on
from eyas.model.transformer import MLP, Attention, Block, RMSNorm, Rotary, pack


class DraftBlock(nn.Module):
    """A decoder layer whose attention reads [input_layernorm(embedding) ; hidden_norm(feature)]; the residual is the un-normed feature."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(2 * config.hidden_size, config, config.attention_bias, config.attention_out_bias, config.qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.norm_before_residual = config.norm_before_residual

    def join(self, e_NH: Tensor, g_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [N, 2H], and the residual [N, H] that its output is added to: g itself (EAGLE-3), or its norm (heads made
        by others)."""
        normed_NH = self.hidden_norm(g_NH)
        return torch.cat([self.input_layernorm(e_NH), normed_NH], -1), normed_NH if self.norm_before_residual else g_NH

    def forward(self, e_NH: Tensor, g_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        both_N2H, residual_NH = self.join(e_NH, g_NH)
        a_NH, normed_NH = self.post_attention_layernorm.after(residual_NH, self.self_attn(both_N2H, rotation, attend))
        return a_NH + self.mlp(normed_NH)


class DraftNetwork(nn.Module):
    """The weights and arithmetic of one draft step. `embedding` [V, H] is the target's table, which a draft with an embedding of its own
    does not read."""

    levels: int | None = None  # how deep it can guess: as deep as is asked for

    def __init__(self, config: DraftConfig, embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        features = len(config.taps) * config.target_hidden_size
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in config.taps)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(features, config.rms_norm_eps)
        self.midlayer = DraftBlock(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.fuse_product, self.head = Dense(self.fc), Dense(self.lm_head)
        self.rotary = Rotary(config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        if config.draft_layers > 1:
            self.layers = nn.ModuleDict({str(number): Block(config) for number in range(1, config.draft_layers)})
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False)
        self.native: list[NativeLayers] = []  # once prepared, where the kernel can run the layers: its calls, in order
        self.one_call: NativeStep | None = None  # once prepared, where the kernel can run a whole step
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

    @property
    def window(self) -> int | None:
        """How many positions a row sees, itself included; None: all."""
        return self.config.sliding_window

    def join(self, tokens_N: Tensor, g_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the first layer's attention [N, 2H], from tokens and g, and the residual [N, H] that its output is added to."""
        return self.midlayer.join(self.embed(tokens_N), g_NH)

    @property
    def blocks(self) -> list[DraftBlock | Block]:
        """The decoder layers: the first reads what `join` gives, each other one its predecessor's output."""
        return [self.midlayer, *self.others]

    @property
    def others(self) -> list[Block]:
        """The layers behind the first."""
        return [block for block in self.layers.values() if isinstance(block, Block)] if self.config.draft_layers > 1 else []

    def fuse(self, features_NF: Tensor) -> Tensor:
        """g [N, H] from the features of all taps, side by side: low, middle and high (EAGLE-3, inference pipeline)."""
        return self.fuse_product(self.normed(features_NF))

    def normed(self, features_NF: Tensor) -> Tensor:
        """The features as fc reads them: normed, where the draft does so."""
        if self.config.norm_before_fc:
            features_NF = self.input_norm(features_NF)
        if self.config.fc_norm:
            parts = features_NF.chunk(len(self.fc_norm), -1)
            features_NF = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return features_NF

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self.table).to(self.dtype)

    @property
    def table(self) -> Tensor:
        """The embedding [V, H], its own or the target's."""
        return self.embed_tokens.weight if self.config.own_embedding else self.embedding[0]

    def step(self, tokens_N: Tensor, g_NH: Tensor, positions_N: Tensor, attention: PassAttention) -> Tensor:
        """a [N, H], the layers' output for g (or for what stands in for it) and the tokens that followed; float32 where the kernel runs the
        layers."""
        e_NH = self.embed(tokens_N)
        if self.native and isinstance(attention, NativeAttention):
            wide_NH, rotation = g_NH.to(torch.float32, copy=True), self.rotary(positions_N, torch.float32)
            for layers, beside_NH in zip(self.native, (e_NH.float(), None), strict=False):
                layers(wide_NH, rotation, attention, beside_NH=beside_NH)
            return wide_NH
        rotation = self.rotary(positions_N, self.dtype)
        a_NH = self.midlayer(e_NH, g_NH, rotation, attention.layer(0))
        for number, block in enumerate(self.others, 1):
            a_NH = block(a_NH, rotation, attention.layer(number))
        return a_NH

    def fed_back(self, a_NH: Tensor) -> Tensor:
        """What the next step reads in place of g: a itself, or with `norm_output` its norm (EAGLE-3.1)."""
        return self.norm(a_NH.to(self.dtype)) if self.config.norm_output else a_NH

    def logits(self, a_NH: Tensor) -> Tensor:
        """The logits [N, D] over the draft vocabulary, from the network's outputs a."""
        return self.head(self.native[-1].normed(a_NH) if self.native and a_NH.dtype == torch.float32 else self.norm(a_NH.to(self.dtype)))

    def logits_at(self, level: int, a_NH: Tensor) -> Tensor:
        """The logits [N, D] of the children of nodes at depth `level`; the head is the same at every depth."""
        return self.logits(a_NH)

    def prepare(self, bits: int = 16) -> DraftNetwork:
        """Pack weights for inference: 16 bits as they are, or rounded to 8.

        Logits are float32 from here on, as the target's are: bfloat16 would make many candidates equal.
        """
        first, others = self.midlayer, self.others
        for block in self.blocks:
            pack(block, bits)
        unknown = self.config.norm_before_residual or self.config.rotary_dim < self.config.head_dim  # to the kernel
        if not unknown and all(NativeLayer.fits(block.self_attn, block.mlp) for block in self.blocks):
            norms = (first.hidden_norm, first.post_attention_layernorm, first.input_layernorm)
            self.native = [NativeLayers([NativeLayer(first.self_attn, first.mlp, *norms)], self.norm)]
            if others:  # one call runs layers of one shape only
                alike = [NativeLayer(each.self_attn, each.mlp, each.input_layernorm, each.post_attention_layernorm) for each in others]
                self.native.append(NativeLayers(alike, self.norm, first=1))
        self.fuse_product.pack(bits=bits)
        self.head.pack(torch.float64 if self.dtype == torch.float64 else torch.float32, bits)
        for layer in (self.fc, self.lm_head):
            layer.register_parameter("weight", None)
        head, table = self.head.weight, self.table.detach()
        if len(self.native) == 1 and isinstance(head, native.Packed) and NativeStep.reads(table, self.dtype):
            self.one_call = NativeStep(self.native[0], head, table, self.rotary)
        self.pool = pool_on(self.device)
        return self.eval().requires_grad_(False)


def draft_config(target: TargetConfig, draft_vocab_size: int, taps: tuple[int, ...] | None = None, **settings: Any) -> DraftConfig:
    """The shape of a draft with the target's own width, heads and rotary base: one such layer (or more), whose first attention reads twice
    the width."""
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
