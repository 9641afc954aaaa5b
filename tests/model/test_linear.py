"""The native kernel and the packed products are the plain product; in the native one, a row does not depend on its company."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eyas.model import native
from eyas.model.linear import Dense

needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="no C compiler, or not an x86 CPU with AVX2")


def layers(*widths: int, inner: int = 64, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(inner, width, bias=bias) for width in widths]
    for layer in made:
        layer.weight.data = layer.weight.data.bfloat16().float()
    return made


@needs_kernel
@pytest.mark.parametrize("outputs", [1, 2, 7, 96, 97, 200])
def test_native_product_is_the_plain_product_and_rows_are_independent(outputs):
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, 73).bfloat16()
    x, weights = torch.randn(70, 73), native.packed(weight)
    whole = native.product(x, weights)
    torch.testing.assert_close(whole, x @ weight.float().t(), rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 65):
        for first in (0, 5):
            assert torch.equal(native.product(x[first : first + rows].contiguous(), weights), whole[first : first + rows])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_loose_ones(precision, bias):
    loose = [layer.to(precision) for layer in layers(24, 8, 8, bias=bias)]
    dense = Dense(*loose)
    x = torch.randn(5, 64).to(precision)
    expected = dense(x)
    dense.pack()
    torch.testing.assert_close(dense(x), expected, rtol=2e-2 if precision == torch.bfloat16 else 1e-5, atol=1e-2)
    assert dense(x).dtype == precision


@needs_kernel
def test_weights_that_bfloat16_cannot_hold_are_left_to_the_library():
    (layer,) = layers(16)
    layer.weight.data += 1e-4
    assert not native.fits(layer.weight.data)
    dense = Dense(layer)
    dense.pack()
    assert dense.kind != "native"


def test_the_kernel_can_be_left_out(monkeypatch):
    monkeypatch.setenv("EYAS_NATIVE", "0")
    native.kernel.cache_clear()
    try:
        assert native.kernel() is None
        dense = Dense(*layers(16))
        dense.pack()
        assert dense.kind == "onednn"
    finally:
        monkeypatch.undo()
        native.kernel.cache_clear()
