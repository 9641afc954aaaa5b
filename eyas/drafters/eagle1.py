"""EAGLE-1 as a drafter (Li et al. 2024, arXiv 2401.15077): it guesses the target's next feature, and the target's own head reads it.

The next feature (the last hidden state, which the head reads) is easier to guess from the one before than the next token from the last. But
the next feature depends on the token that was drawn, which the feature before does not know: "I" may go on with "am" or "always". So the
draft is given that token too, one position ahead: from f_j and t_{j+1} it guesses f_{j+1}, and it goes on from its own guess. It is trained
on true features, so it never sees its own errors (EAGLE-3 does, and drops the features). Its tree has the same shape every round (EAGLE-2's
has not).

The network's tensors have the published names. Knows the network and its files; eagle3.py grows trees with it, since both read in the same
way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eyas.config import TargetConfig, TreeShape
from eyas.decode.plan.static_tree import tree_for
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files import draft_files
from eyas.kernels.attention import Attend, PassAttention
from eyas.kernels.layer import OneLayer
from eyas.kernels.linear import Dense
from eyas.model.protocols import TargetModel
from eyas.model.shared_weights import FrozenHead, SharedWeights
from eyas.model.transformer import MLP, Attention, RMSNorm, Rotary, pack
from eyas.model.vocab import DraftVocab

PUBLISHED_TREE = "static:4.3.2.2.1.3.2.2.1.0.0.0.0.3.0.0.0.0.0.0.0.2"  # SafeAILab's 25 guesses: the root's four best children, and so on
NOT_OURS = ("embed_tokens.weight", "lm_head.weight")  # tensors of published files that are the target's own


class Eagle1Block(nn.Module):
    """A decoder layer without a norm before attention, as published."""

    def __init__(self, shape: TargetConfig) -> None:
        super().__init__()
        self.self_attn = Attention(shape.hidden_size, shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_NH = x_NH + self.self_attn(x_NH, rotation, attend)
        return x_NH + self.mlp(self.post_attention_layernorm(x_NH))


class Eagle1Network(SharedWeights, nn.Module):
    """The network of EAGLE-1: `fc`, then one layer. `embedding` [V, H] and `head` are the target's; `token_left_out`: the ablation that
    never sees the drawn token."""

    window: int | None = None  # its rows see all of the text

    def __init__(self, shape: TargetConfig, embedding: Tensor, head: nn.Linear, bias: bool = True, token_left_out: bool = False) -> None:
        super().__init__()
        self.shape, self.token_left_out = shape, token_left_out
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=bias)
        self.layers = nn.ModuleList([Eagle1Block(shape)])
        self.fused, self.run = Dense(self.fc), OneLayer(self.blocks[0], None)
        self.rotary = Rotary(shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings)
        self.share(embedding, head)

    @property
    def blocks(self) -> list[Eagle1Block]:
        return [cast("Eagle1Block", layer) for layer in self.layers]

    def fuse(self, features_NH: Tensor) -> Tensor:
        return features_NH

    def join(self, tokens_N: Tensor, f_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [N, H], from tokens and features, twice: it is also the residual that attention's output is added to."""
        e_NH = self.embed(tokens_N)
        x_NH = self.fused(torch.cat([torch.zeros_like(e_NH) if self.token_left_out else e_NH, f_NH.to(self.dtype)], -1))
        return x_NH, x_NH

    def step(self, tokens_N: Tensor, f_NH: Tensor, positions_N: Tensor, attention: PassAttention) -> Tensor:
        """The next features [N, H] as it guesses them, from features (or its own guesses) and the tokens that followed."""
        return self.run(self.join(tokens_N, f_NH)[0], self.rotary, positions_N, attention)

    def fed_back(self, f_NH: Tensor) -> Tensor:
        return f_NH

    def logits_at(self, level: int, f_NH: Tensor) -> Tensor:
        """The logits [N, D] of what follows guessed features: the head reads them as true ones, whatever their depth."""
        return self.head(f_NH)

    def static_tree(self, nodes: int | None = None) -> TreeShape:
        return tree_for(self.accuracies, PUBLISHED_TREE, nodes)

    def prepare(self, bits: int = 16) -> Eagle1Network:
        """Pack weights for inference."""
        pack(self.layers, bits)
        self.run.prepare()
        return self.packed([self.fused], bits)


drafter = Eagle3Drafter  # the same rounds: read true features, then the draft's own


# ---- files ----


def reads(config: dict[str, Any], directory: Path) -> bool:
    """Whether a directory with this config.json holds an EAGLE-1 draft. Published ones have a Llama's config of one layer, without a draft
    vocabulary."""
    names = ("draft_vocab_size", "medusa_num_heads", "num_nextn_predict_layers")
    return config.get("num_hidden_layers", 1) == 1 and "hidden_size" in config and not any(name in config for name in names)


check = draft_files.check_sizes


def config_of(network: Eagle1Network, target_layers: int) -> dict[str, Any]:
    left_out = {"token_left_out": True} if network.token_left_out else {}
    told = {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1, "bias": network.fc.bias is not None}
    return {**draft_files.shape_keys(network.shape), **told, **left_out}


save = draft_files.saver("eagle1", config_of)


def load(directory: Path, target: TargetModel) -> tuple[Eagle1Network, DraftVocab]:
    fields, tensors, vocab = draft_files.read(directory, target.config)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in NOT_OURS}
    shape, embedding = draft_files.shape_of(fields, target.config), target.embedding.detach()
    with torch.device("meta"):
        bias, left_out = fields.flag("bias", "fc.bias" in tensors), fields.flag("token_left_out")
        network = Eagle1Network(shape, embedding, FrozenHead.of(target, vocab), bias, left_out)
    return draft_files.filled(network, tensors, embedding, directory, fields), vocab
