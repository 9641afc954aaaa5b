"""The blocks that target and draft are both built from: RMSNorm, rotary embedding, attention over a cache, gated MLP.

Rows are flat: [N, H] of any number of sequences. Linear layers and norms never know about sequences; attention alone does, through the
`attend` function it is handed. Parameter names are Hugging Face's, so state dicts load as they stand.

Axes: N rows, H model width, q/k heads, d head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.model.cache import KVCache
from eyas.model.linear import Dense
from eyas.model.mask import behind_prefix, causal_mask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [N,q,d], k [N,k,d], v [N,k,d] -> [N, q*d]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary:
    """cos and sin of positions. Angles are taken in float64 whatever the model's format: bfloat16 cannot count past 256."""

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None, positions: int) -> None:
        self.frequencies, self.attention_scale = rotary_frequencies(head_dim, theta, scaling, positions)

    def __call__(self, positions_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [N, 1, d] in the working number format."""
        if self.frequencies.device != positions_N.device:
            self.frequencies = self.frequencies.to(positions_N.device)
        angles = positions_N.double()[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        return (angles.cos() * self.attention_scale).to(dtype), (angles.sin() * self.attention_scale).to(dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None, positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies [d/2] and the factor on cos and sin; scaled forms (llama3, yarn, linear, ...) are transformers' own."""
    if not scaling or scaling.get("rope_type", scaling.get("type")) in (None, "default"):
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = scaling.get("rope_type", scaling.get("type"))
    parameters = {**scaling, "rope_type": kind, "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=positions, rope_parameters=parameters
    )
    with torch.device("cpu"):  # models are built on "meta", where a table has no values
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.double(), float(scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [N, heads, d], halves rotated as Hugging Face's Llama does."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Attention(nn.Module):
    """Queries, keys and values of rows; who sees whom is the caller's `attend`."""

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
        qk, v = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads :]
        if self.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])], 1)
        qk = rotate(qk, *rotation)
        return self.out(attend(qk[:, : self.heads], qk[:, self.heads :], v))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.gate_up, self.down = Dense(self.gate_proj, self.up_proj), Dense(self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer: x + attention(norm x), then + mlp(norm x)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.hidden_size, config, config.attention_bias, config.attention_out_bias, config.qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_NH = x_NH + self.self_attn(self.input_layernorm(x_NH), rotation, attend)
        return x_NH + self.mlp(self.post_attention_layernorm(x_NH))


def pack(module: nn.Module) -> None:
    """Pack every dense product under `module` for inference and drop the loose weights it was made from."""
    for child in module.modules():
        for dense in [value for value in vars(child).values() if isinstance(value, Dense)]:
            dense.pack()
            for layer in dense.layers:
                layer.weight = None


class Segment(NamedTuple):
    """The rows of a pass that belong to one sequence, in the order of the pass."""

    slot: int
    count: int
    # bool [count, k + count]: who sees the last k committed rows and these; committed rows before those are seen by all. None: causal.
    mask: Tensor | None = None


class CachedAttention:
    """Attention of one pass: each segment's rows see the committed rows of its slot and each other under its mask."""

    def __init__(self, cache: KVCache, segments: list[Segment], group: int, dtype: torch.dtype) -> None:
        self.cache = cache
        starts = [0, *itertools.accumulate(segment.count for segment in segments)]
        singles = [i for i, segment in enumerate(segments) if segment.count == 1 and segment.mask is None]
        batched = set(singles) if len(singles) > max(3, cache.slots // 2) else set()  # where a padded product pays
        self.loose = [(segment, slice(starts[i], starts[i + 1])) for i, segment in enumerate(segments) if i not in batched]
        self.biases = [self._bias(segment, group, dtype) for segment, _ in self.loose]
        self.singles = Singles(cache, [segments[i].slot for i in singles], [starts[i] for i in singles], dtype) if batched else None

    def _bias(self, segment: Segment, group: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [group * count, length + count], or None where all is seen."""
        if segment.count == 1 and (segment.mask is None or bool(segment.mask.all())):
            return None
        among = causal_mask(segment.count) if segment.mask is None else segment.mask
        governed = among.shape[1] - segment.count
        seen = behind_prefix(among, self.cache.lengths[segment.slot] - governed).to(self.cache.keys.device)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf")).repeat(group, 1)

    def layer(self, layer: int) -> Attend:
        """The `attend` function of one layer."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(self.loose) == 1 and not self.singles:  # one sequence: nothing to gather
                keys, values = self.cache.write(layer, self.loose[0][0].slot, k, v)
                return grouped_attention(q, keys, values, self.biases[0])
            out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
            for (segment, rows), bias in zip(self.loose, self.biases):
                keys, values = self.cache.write(layer, segment.slot, k[rows], v[rows])
                out[rows] = grouped_attention(q[rows], keys, values, bias)
            if self.singles:
                out[self.singles.rows] = self.singles.attend(layer, q[self.singles.rows], k[self.singles.rows], v[self.singles.rows])
            return out

        return attend


class Singles:
    """Many sequences of one row each: one padded product over all slots instead of one a sequence.

    Slots without a row here are computed and ignored: cheaper than gathering the keys of the others.
    """

    def __init__(self, cache: KVCache, slots: list[int], rows: list[int], dtype: torch.dtype) -> None:
        device = cache.keys.device
        self.cache = cache
        self.rows, self.slots = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        self.ends = torch.tensor([cache.lengths[slot] for slot in slots], device=device)
        self.longest = int(self.ends.max()) + 1
        every_end = torch.zeros(cache.slots, dtype=torch.int64, device=device).index_copy_(0, self.slots, self.ends)
        hidden = torch.arange(self.longest, device=device)[None] > every_end[:, None]
        self.bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots, :, self.ends], values[self.slots, :, self.ends] = k, v
        every_q = q.new_zeros(self.cache.slots, *q.shape[1:]).index_copy_(0, self.slots, q)
        q_bkgd = every_q.view(self.cache.slots, k.shape[1], -1, q.shape[-1])
        bias = self.bias.expand(-1, q_bkgd.shape[1], q_bkgd.shape[2], -1)
        out = F.scaled_dot_product_attention(q_bkgd, keys[:, :, : self.longest], values[:, :, : self.longest], attn_mask=bias)
        return out.reshape(self.cache.slots, -1)[self.slots]


def grouped_attention(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of n rows over t keys, [n, q * d]; query heads of a group are folded into the row axis (measured 7x faster in decode)."""
    n, heads, d = q_nqd.shape
    kv_heads = k_ktd.shape[0]
    folded = q_nqd.view(n, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, d)
    out = F.scaled_dot_product_attention(folded, k_ktd[None], v_ktd[None], attn_mask=bias)
    return out.view(kv_heads, heads // kv_heads, n, d).permute(2, 0, 1, 3).reshape(n, heads * d)


def attention_with_lse(q_nqd: Tensor, k_ktd: Tensor, v_ktd: Tensor, seen_nt: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with log-sum-exp [n, q] of the scores, so that results over parts of the keys can be merged: out = sum of e^lse_i out_i."""
    groups = q_nqd.shape[1] // k_ktd.shape[0]
    keys, values = k_ktd.repeat_interleave(groups, 0), v_ktd.repeat_interleave(groups, 0)
    scores = torch.einsum("nqd,qtd->nqt", q_nqd, keys) * q_nqd.shape[-1] ** -0.5
    if seen_nt is not None:
        scores = scores.masked_fill(~seen_nt[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)  # a row that sees none of these keys: out 0, lse -inf, so it merges as nothing
    return torch.einsum("nqt,qtd->nqd", (scores - shift[..., None]).exp(), values).flatten(1), lse
