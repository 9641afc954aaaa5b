"""The blocks that target and draft are both built from: RMSNorm, rotary embedding, attention over a cache, gated MLP.

Rows are flat: [N, H] of any number of sequences. Linear layers and norms know nothing of sequences; only attention does, through the
`attend` function that it is handed. Parameter names are Hugging Face's, so state dicts load as they are.

Axes: N rows, H model width, q/k heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import EyasError, rope_kind, short
from eyas.kernels import fused
from eyas.kernels.attention import Attend
from eyas.kernels.captured import StaticAttend
from eyas.kernels.linear import Dense

TABLE = 4096  # positions whose rotary angles are kept


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x_NH: Tensor, added_NH: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and the norm of it."""
        if fused.suits(x_NH):
            return fused.added_norm(x_NH, added_NH, self.weight, self.eps)
        total = x_NH + added_NH
        return total, self(total)


class Rotary:
    """cos and sin of positions. Angles are taken in float64 whatever the model's format: bfloat16 cannot count past 256."""

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None, positions: int) -> None:
        self.frequencies, self.attention_scale = rotary_frequencies(head_dim, theta, scaling, positions)
        self.tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def __call__(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, d] of these positions, in this number format. On a CPU they come from a table, since rounds ask for few rows
        and often."""
        if positions_N.device.type != "cpu" or int(positions_N.max()) >= TABLE:
            return self.computed(positions_N, dtype)
        cos, sin = self.table(dtype)
        return cos[positions_N], sin[positions_N]

    def rows(self, positions: Sequence[int]) -> tuple[tuple[Tensor, Tensor], Sequence[int]]:
        """Float32 cos and sin on the CPU [.., 1, d], and which of their rows are these positions'."""
        if max(positions) < TABLE:
            return self.table(torch.float32), positions
        return self.computed(torch.tensor(positions, device="cpu"), torch.float32), range(len(positions))

    def table(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self.tables:
            self.tables[dtype] = self.computed(torch.arange(TABLE, device="cpu"), dtype)
        return self.tables[dtype]

    def computed(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.frequencies.device != positions_N.device:
            self.frequencies = self.frequencies.to(positions_N.device)
        angles = positions_N.double()[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        return (angles.cos() * self.attention_scale).to(dtype), (angles.sin() * self.attention_scale).to(dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None, positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies [d/2] and the factor on cos and sin; scaled forms (llama3, yarn, linear, ...) are transformers' own."""
    if not scaling or rope_kind(scaling) is None:
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope_kind(scaling)
    if not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS:
        raise EyasError(f"rotary scaling {short(kind)} is not known; known are {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    parameters = {**scaling, "rope_type": kind, "rope_theta": theta}
    try:
        config = LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=positions, rope_parameters=parameters
        )
        with torch.device("cpu"):  # models are built on "meta", where a table has no values
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.double(), float(scale)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise EyasError(f"rotary scaling {short(scaling)} lacks what {kind} needs ({short(str(error))})") from None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [N, heads, d], halves rotated as Hugging Face's Llama does. Where cos and sin are narrower than a head,
    its first entries are rotated and the others are not."""
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Attention(nn.Module):
    """Makes queries, keys and values of rows; the caller's `attend` knows which rows see which."""

    def __init__(self, input_size: int, config: Any, bias: bool = False, out_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(input_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(input_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=out_bias)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps), RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = qk_norm
        self.qkv, self.out = Dense(self.q_proj, self.k_proj, self.v_proj), Dense(self.o_proj)

    def forward(self, x_NI: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = self.qkv(x_NI).view(x_NI.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        if isinstance(attend, StaticAttend) and not self.qk_norm and (attended := attend.of_heads(heads, rotation)) is not None:
            return self.out(attended)
        qk, v = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])], 1)
        qk = rotate(qk, *rotation)
        return self.out(attend(qk[:, : self.heads], qk[:, self.heads :], v))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.gate_up, self.down = Dense(self.gate_proj, self.up_proj), Dense(self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if fused.suits(gate_up):
            return self.down(fused.gated(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer: x + attention(norm x), then + mlp(norm x)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.hidden_size, config, config.attention_bias, config.attention_out_bias, config.qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False))  # a draft's may have some

    def forward(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_NH, normed_NH = self.post_attention_layernorm.after(x_NH, self.self_attn(self.input_layernorm(x_NH), rotation, attend))
        return x_NH + self.mlp(normed_NH)


def pack(module: nn.Module, bits: int = 16) -> None:
    """Pack every dense product under `module` for inference, and drop the weights that it was packed from."""
    for child in module.modules():
        for dense in [value for value in vars(child).values() if isinstance(value, Dense)]:
            dense.pack(bits=bits)
            for layer in dense.layers:
                layer.register_parameter("weight", None)
