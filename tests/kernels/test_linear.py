"""The native kernel and the packed products are the plain product; in the native one, a row does not depend on its company."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eyas.kernels import native
from eyas.kernels.grouped import grouped
from eyas.kernels.linear import Dense

ROWS = (*range(1, 18), 33, 65)
needs_kernel = pytest.mark.skipif(native.kernel() is None, reason="no C compiler, or not an x86 CPU with AVX2")


@pytest.fixture(params=["1", "avx2"])
def kernel(request, monkeypatch):
    """The kernel for this machine, and the one for machines without AVX-512."""
    monkeypatch.setenv("EYAS_NATIVE", request.param)
    native.kernel.cache_clear()
    yield native.kernel()
    monkeypatch.undo()
    native.kernel.cache_clear()


def layers(*widths: int, inner: int = 64, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(inner, width, bias=bias) for width in widths]
    for layer in made:
        layer.weight.data = layer.weight.data.bfloat16().float()
    return made


@needs_kernel
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 7, 96, 97, 200])
def test_native_product_is_the_plain_product_and_rows_are_independent(kernel, outputs, rounded):
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, 74).bfloat16()
    x, weights = torch.randn(70, 74), native.packed(weight, rounded=rounded)
    whole = native.product(x, weights)
    plain = [each @ weight.float().t() for each in (x, x.bfloat16().float())[: 1 + rounded]]  # what a CPU that rounds x makes, or another
    assert any(torch.allclose(whole, each, rtol=1e-5, atol=1e-5) for each in plain)
    for rows in ROWS:
        for first in (0, 5):
            assert torch.equal(native.product(x[first : first + rows].contiguous(), weights), whole[first : first + rows])


@needs_kernel
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_no_rows_give_no_rows(kernel, bits):
    weights = native.packed(torch.randn(20, 64).bfloat16(), bits)
    assert native.product(torch.empty(0, 64), weights).shape == (0, 20)


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [32, 64, 1536])
@pytest.mark.parametrize("outputs", [1, 16, 97, 200])
def test_the_native_product_of_few_bits_is_that_of_their_values_and_rows_are_independent(kernel, outputs, inputs, bits):
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs) * torch.rand(outputs, 1), torch.randn(70, inputs) * 10 ** torch.randn(70, 1)
    x[3], x[4], weight[0, :32] = 0, 1e-35, 0.1
    weights, values = native.packed(weight, bits), grouped(weight, bits).weight
    whole, wanted = native.product(x, weights), x.double() @ values.double().t()
    assert ((whole - wanted).abs() <= 1e-30 + 2e-4 * (x.double().norm(dim=1)[:, None] * values.double().norm(dim=1))).all()
    for rows in ROWS:
        for first in (0, 5):
            assert torch.equal(native.product(x[first : first + rows].contiguous(), weights), whole[first : first + rows])


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits_are_as_near_as_their_steps(bits):
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    made = grouped(weight, bits)
    half_step = made.scale.float().repeat_interleave(32, 1) / 2
    assert ((made.weight - weight).abs() <= half_step * 1.01 + 1e-3).all()
    again = grouped(made.weight.bfloat16(), bits)  # a model published in so few bits, kept as bfloat16, comes back as it was
    assert (again.whole.int() - made.whole.int()).abs().max() <= (0 if bits == 4 else 1)  # bfloat16 has as many bits as these
    torch.testing.assert_close(again.weight, made.weight, rtol=0, atol=0.02)


def test_a_weight_that_comes_in_no_whole_groups_stays_as_it_is():
    dense = Dense(*layers(24, inner=40))
    x = torch.randn(5, 40)
    expected = dense(x)
    dense.pack(bits=4)
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)


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
def test_an_odd_number_of_inputs_is_left_to_the_library():
    assert not native.fits(torch.zeros(16, 73))


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
