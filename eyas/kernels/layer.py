"""Decoder layers as one native call, where the kernel can run them; transformer.py's `Block` is the plain form beside it.

The residual stream is float32 whatever the model's number format; keys and values have the cache's. A row's result does not depend on the
other rows of its pass. Knows packed products, norms and a cache's rows; knows nothing of targets or drafts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eyas.kernels import native
from eyas.kernels.attention import NativeAttention, PassAttention

if TYPE_CHECKING:
    from eyas.kernels.linear import Dense
    from eyas.model.protocols import DecoderLayer
    from eyas.model.transformer import MLP, Attention, RMSNorm, Rotary


class NativeLayer:
    """One layer's packed weights, as the kernel reads them. Without `norm`, q, k and v read x itself (EAGLE-1's layer); with `beside_norm`
    they read a second input beside x (EAGLE-3's layer)."""

    def __init__(self, attention: Attention, mlp: MLP, norm: RMSNorm | None, mlp_norm: RMSNorm, beside_norm: RMSNorm | None = None) -> None:
        qkv, o, gate_up, down = attention.qkv, attention.out, mlp.gate_up, mlp.down
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        heads = (attention.q_norm, attention.k_norm) if attention.qk_norm else (None, None)
        norms = [None if each is None else each.weight.detach().float() for each in (norm, mlp_norm, beside_norm, *heads)]
        packed = [packed_of(dense) for dense in (qkv, o, gate_up, down)]
        self.kept = (norms, packed, qkv.bias, o.bias)  # what the structure points to
        width, inner, matrices = mlp_norm.weight.shape[0], packed[-1].inputs, [weights.matrix for weights in packed]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*norms, qkv.bias, o.bias)]
        self.layer = native.Layer(width, inner, mlp_norm.eps, *pointers, *matrices)
        outs = matrices[0].outputs + matrices[2].outputs + max(matrices[1].outputs, matrices[3].outputs)
        self.scratch_width = outs + self.heads * attention.head_dim + max(weights.scratch for weights in packed)

    @staticmethod
    def fits(attention: Attention, mlp: MLP) -> bool:
        """Whether the kernel can run a layer: all its products are packed for the kernel, and the MLP has no biases."""
        dense = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        return all(each.kind == "native" for each in dense) and mlp.gate_up.bias is None and mlp.down.bias is None


def packed_of(dense: Dense) -> native.Packed:
    """The weights of a dense product as the kernel reads them."""
    assert isinstance(dense.weight, native.Packed), "`NativeLayer.fits` says where they are packed so"
    return dense.weight


class NativeLayers:
    """Layers of one shape that one call of the kernel runs one after another, and the norm behind the last, if there is one."""

    def __init__(self, layers: Sequence[NativeLayer], norm: RMSNorm | None = None, first: int = 0) -> None:
        """`first`: which layer of the cache holds the keys of the first of these layers."""
        self.layers, self.norm, self.first = layers, norm, first
        self.norm_weight = None if norm is None else norm.weight.detach().float()
        self.array = (native.Layer * len(layers))(*(each.layer for each in layers))
        self.scratch_width = max(each.scratch_width for each in layers)

    def __call__(
        self,
        x_NH: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: NativeAttention,
        beside_NH: Tensor | None = None,
        taps: Sequence[int] = (),
        around: native.Around | None = None,
        kept: object = None,
    ) -> Tensor:
        """Run the layers on x (float32, contiguous), which is changed in place; cos and sin are float32 [N,1,d]. Returns x as it entered
        each layer of `taps`, in ascending order: float32 [N, taps * H]. `around`: what else is done, of a draft's step (step.py); `kept`:
        what has the memory to which it points."""
        keys, values = attention.cache.keys, attention.cache.values
        if self.first:
            keys, values = keys[self.first :], values[self.first :]
        some, (N, H) = self.layers[0], x_NH.shape
        plan = attention.plan(some.heads, some.kv_heads, some.layer.qkv.outputs)
        features, scratch = (torch.empty(N, width, dtype=torch.float32, device="cpu") for width in (len(taps) * H, self.scratch_width))
        given = None if beside_NH is None else beside_NH.data_ptr()
        (cos, sin), wanted = rotation, (ctypes.c_long * len(taps))(*sorted(taps))
        cached = (keys.data_ptr(), values.data_ptr(), keys.dtype == torch.float32, keys.stride(0) * keys.element_size())
        turning = (cos.data_ptr(), sin.data_ptr(), cos.shape[-1])
        qkv = scratch.view(-1)[: N * some.layer.qkv.outputs].view(N, -1)
        for stage in attention.stages(len(self.layers), qkv):
            lagging = native.library().eyas_layers(
                plan, self.array, len(self.layers), x_NH.data_ptr(), given, *turning, *cached,
                wanted, len(taps), features.data_ptr(), scratch.data_ptr(), attention.meeting, *stage, around, native.threads(),
            )  # fmt: skip
            native.settled(lagging, self, attention, x_NH, beside_NH, rotation, keys, values, wanted, features, scratch, around, kept)
        return features

    def normed(self, x_NH: Tensor) -> Tensor:
        """The norm behind the last layer, of float32 rows, in float32."""
        assert self.norm is not None and self.norm_weight is not None, "these layers have no norm behind the last"
        return native.normed(x_NH, self.norm_weight, self.norm.eps)


class OneLayer:
    """One layer on its own. The kernel runs it once it is prepared, where the kernel can; else the block computes it."""

    def __init__(self, block: DecoderLayer, norm: RMSNorm | None) -> None:
        """`norm`: the norm before the block's attention, if it has one."""
        self.block, self.norm = block, norm
        self.native: NativeLayers | None = None

    def prepare(self) -> None:
        """Hand the layer to the kernel, where that can run it. Call it once the block's products are packed."""
        attention, mlp = self.block.self_attn, self.block.mlp
        if NativeLayer.fits(attention, mlp):
            self.native = NativeLayers([NativeLayer(attention, mlp, self.norm, self.block.post_attention_layernorm)])

    def __call__(self, x_NH: Tensor, rotary: Rotary, positions_N: Tensor, attention: PassAttention) -> Tensor:
        """The layer's output [N, H]; float32 where the kernel runs it."""
        if self.native and isinstance(attention, NativeAttention):
            wide_NH = x_NH.to(torch.float32, copy=True).contiguous()
            self.native(wide_NH, rotary(positions_N, torch.float32), attention)
            return wide_NH
        return self.block(x_NH, rotary(positions_N, x_NH.dtype), attention.layer(0))
