"""All dense products: several matrices that read the same input become one product, in the fastest form the device offers.

Knows devices and number formats; knows nothing of attention or of models. On a CPU weights are packed once:

- bfloat16 result, and the CPU multiplies bfloat16: oneDNN with weights packed for few rows;
- else, where weights are bfloat16 values: the native kernel (native.py), which reads them as such and sums in float32;
- else oneDNN with float32 weights packed.

On other devices it is PyTorch's own product. On CUDA bfloat16 weights of a float32 result stay as they are where the product can sum in
float32.

Weights of 8 or 4 bits (grouped.py), where they are asked for: the native kernel multiplies them as they are; elsewhere they are widened to
the weights' number format again.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.kernels import grouped, native
from eyas.kernels.lowered import part_of_thread

PACKED_FOR_ROWS = 8  # oneDNN packs weights for a number of rows; verification passes have about this many


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that oneDNN uses; AVX-512 alone has none."""
    asked = (getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(has() for has in asked)


def capability() -> str:
    """The CPU's instruction set as PyTorch names it, such as AVX2."""
    return torch.backends.cpu.get_cpu_capability()


@cache
def sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies matrices of this number format to a float32 result without rounding it first (torch 2.8 and CUDA)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        torch.mm(*torch.ones(2, 16, 16, dtype=dtype, device=device), out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


class Dense:
    """y = x W^T + b for the stacked rows of one or several `nn.Linear`; x [N, in] -> y [N, sum of out].

    Until `pack` is called it reads the layers as they are, so a module that trains sees every new weight. A thread that trains in bfloat16
    on a CPU computes it so (lowered.py).
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self.weight: Tensor | native.Packed | None = None
        self.bias: Tensor | None = None
        self.kind = "loose"

    def pack(self, result: torch.dtype | None = None, bits: int = 16) -> None:
        """Stack and pack the weights for inference. `result` is the number format of y (default: that of the weights).

        `bits`: 8 or 4 rounds the weights to this many bits, where their inputs come in whole groups; 16 leaves them as they are.
        """
        weights = [layer.weight.detach() for layer in self.layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if self.layers[0].bias is None else torch.cat([layer.bias.detach() for layer in self.layers])
        self.result = result or weight.dtype
        bits = bits if grouped.fits(weight) else 16
        self.kind = self.choose(weight, bits)
        if self.kind == "native":
            self.weight = native.packed(weight, bits, weight.dtype == torch.bfloat16)
            self.bias = None if bias is None else bias.float()
            return
        if bits < 16:
            weight = grouped.grouped(weight, bits).weight.to(weight.dtype)
        if self.kind == "onednn":
            exact = self.result == torch.float32 or not cpu_multiplies_bfloat16()
            weight, bias = (weight.float(), None if bias is None else bias.float()) if exact else (weight, bias)
            self.compute = weight.dtype
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        elif self.kind == "wide":
            weight = weight.T
        elif self.kind == "torch":  # a wider result, such as logits, is computed wide: rounding first would make many of them equal
            weight, bias = weight.to(self.result), None if bias is None else bias.to(self.result)
        self.weight, self.bias = weight, bias

    def choose(self, weight: Tensor, bits: int) -> str:
        """How the product is computed: "native", "onednn", "wide" (summed in float32 on CUDA) or "torch"."""
        if self.result == torch.float32 and sums_wide(weight.device, weight.dtype):
            return "wide"
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return "torch"
        if bits < 16 and native.kernel():
            return "native"
        if native.kernel() and native.fits(weight):
            return "native"
        return "onednn" if torch.backends.mkldnn.is_available() else "torch"

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            if (part := part_of_thread.get()) is not None:
                return part.product(self.layers, x)
            outputs = [layer(x) for layer in self.layers]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if isinstance(self.weight, native.Packed):
            y = native.product(x.float().contiguous(), self.weight)
            return (y if self.bias is None else y + self.bias).to(self.result)
        if self.kind == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x.to(self.compute), self.weight, self.bias, "none", [], "").to(self.result)
        if self.kind == "wide":
            y = torch.mm(x.to(self.weight.dtype), self.weight, out_dtype=self.result)
            return y if self.bias is None else y + self.bias
        return F.linear(x.to(self.result), self.weight, self.bias)
