"""The one door to dense products: several matrices that read the same input, as one product, packed where that is measured to win.

Knows devices and number formats; knows nothing of attention or of models.

Measured (two Zen 3 cores, 8 rows by 3072x576): PyTorch's float32 product 450 us, oneDNN with weights packed once 229 us; its bfloat16
product 1426 us, since that CPU has no bfloat16 instructions. So on a CPU weights are packed once, in bfloat16 where the CPU multiplies
bfloat16 and in float32 elsewhere (bfloat16 weights are exact in float32; only the result is rounded).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR_ROWS = 8  # oneDNN lays weights out for a row count; verification passes have about this many


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions that oneDNN uses (AVX-512 or better)."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "AVX512" in capability()


def capability() -> str:
    """The CPU's instruction set as PyTorch names it, say AVX2."""
    return torch.backends.cpu.get_cpu_capability()


class Dense:
    """y = x W^T + b for the stacked rows of one or several `nn.Linear`; x [N, in] -> y [N, sum of out].

    Until `pack` is called it reads the layers as they are, so a module that trains sees every new weight.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.onednn = False

    def pack(self, result: torch.dtype | None = None) -> None:
        """Stack and pack the weights for inference. `result` is the number format of y (default: that of the weights)."""
        weight = torch.cat([layer.weight.detach() for layer in self.layers])
        bias = None if self.layers[0].bias is None else torch.cat([layer.bias.detach() for layer in self.layers])
        self.result = result or weight.dtype
        self.onednn = (
            weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
        )
        if self.onednn:
            exact = self.result == torch.float32 or not cpu_multiplies_bfloat16()
            weight = weight.float() if exact else weight
            bias = None if bias is None else bias.to(weight.dtype)
        self.compute = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) if self.onednn else weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            outputs = [layer(x) for layer in self.layers]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x.to(self.compute), self.weight, self.bias, "none", [], "").to(self.result)
        return F.linear(x, self.weight, self.bias).to(self.result)
