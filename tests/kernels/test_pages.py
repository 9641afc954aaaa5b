"""What is laid in large pages is what it was, and lies beside nothing else's numbers."""

from __future__ import annotations

import pytest
import torch

from eyas.kernels import pages


def test_matrices_laid_beside_each_other_keep_their_numbers():
    matrices = [torch.randn(rows, 96).to(dtype) for rows, dtype in ((1, torch.float32), (300, torch.bfloat16), (301, torch.float32))]
    laid = [pages.laid(matrix) for matrix in matrices]
    for matrix, found in zip(matrices, laid, strict=True):
        assert torch.equal(matrix, found) and found.dtype == matrix.dtype
    laid[1].zero_()
    assert torch.equal(matrices[2], laid[2])
    assert laid[0] is matrices[0], "what is small stays where it is"
    assert all(found.data_ptr() % pages.ALIGNED == 0 for found in laid[1:])


def test_a_matrix_larger_than_a_chunk_has_its_own(monkeypatch):
    monkeypatch.setattr(pages, "CHUNK", pages.PAGE)
    matrix = torch.randn(3 * pages.PAGE // 4)
    assert torch.equal(pages.laid(matrix), matrix)


@pytest.mark.parametrize("rows", [3, 70_000])
@pytest.mark.parametrize("known", [True, False])
def test_zeros_are_zeros_whether_the_system_knows_large_pages_or_not(rows, known, monkeypatch):
    if not known:
        monkeypatch.setattr(pages, "libc", lambda: None)
    found = pages.zeros((2, rows, 64), torch.bfloat16, torch.device("cpu"))
    assert found.shape == (2, rows, 64) and found.dtype == torch.bfloat16 and not found.any()
    if rows > 3:
        assert found.data_ptr() % pages.PAGE == 0
