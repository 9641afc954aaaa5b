"""Memory in large pages, where the system grants them on request (Linux, madvise): what every pass reads, weights and cached keys, then
costs fewer walks through page tables.

Measured with two Zen 4 cores on SmolLM2-135M: a plain step takes 0.80 of the time in bf16, 0.88 in q4; a tree of 16 rows 0.93.
Knows bytes; knows nothing of what they hold.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from functools import cache

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a large page
CHUNK = 16 * PAGE  # taken at once for matrices, few of which fill a page
SMALL = 16 << 10  # bytes up to which a matrix stays where it is
ALIGNED = 64  # bytes: a line of the cache
HUGEPAGE = 14  # madvise's word for it

lock = threading.Lock()
chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the last one


@cache
def libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def taken(size: int) -> Tensor:
    """So many bytes that begin with a page and have not been written yet."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu")
    memory = memory[-memory.data_ptr() % PAGE :][:size]
    if (library := libc()) is not None:
        library.madvise(memory.data_ptr(), size // PAGE * PAGE, HUGEPAGE)
    return memory


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`, in large pages on the CPU where it fills some."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < 2 * PAGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return taken(size).zero_().view(dtype).view(shape)


def laid(matrix: Tensor) -> Tensor:
    """A contiguous matrix on the CPU beside those that came before it."""
    global chunk
    size = matrix.nbytes
    if size < SMALL:
        return matrix
    with lock:
        if len(chunk) < size:
            chunk = taken(max(CHUNK, -(-size // PAGE) * PAGE))
        place, chunk = chunk[:size], chunk[-(-size // ALIGNED) * ALIGNED :]
    return place.view(matrix.dtype).view(matrix.shape).copy_(matrix)
