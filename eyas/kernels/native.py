"""An optional native kernel, built once with the machine's C compiler and left out where there is none: products with weights
of 16, 8 or 4 bits, attention over a cache, and whole decoder layers.

Measured with two Zen 3 cores on SmolLM2-135M, all products of a pass: 10 ms for 1 to 4 rows, 11 for six, 16 for eight, 24 for sixteen,
where oneDNN with packed float32 weights takes 30, 46 (eight) and 67. A row's result does not depend on the other rows of its pass.
`EYAS_NATIVE=0` leaves the kernel out, `EYAS_NATIVE=avx2` builds it without AVX-512. Knows a compiler, a cache and pointers; linear.py,
attention.py and layer.py choose when to use it.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eyas.config import cache_dir
from eyas.kernels import pages
from eyas.kernels.grouped import GROUP, Grouped, grouped

SOURCE = Path(__file__).with_name("native.c")
PARTS = tuple(SOURCE.with_name(name) for name in ("native.c", "team.h", "board.h", "native_avx2.h", "native_avx512.h"))
FLAGS = ["-O3", "-fPIC", "-pthread"]


class Plan(ctypes.Structure):
    """native.c's `plan`."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("rows", "views", "heads", "kv_heads", "width", "stride", "capacity")),
        *((name, ctypes.c_void_p) for name in ("home", "place", "source", "slot", "prefix", "start", "other", "shard", "base", "first")),
        *((name, ctypes.c_long) for name in ("shards", "shift", "apart")),
    ]


class Matrix(ctypes.Structure):
    """native.c's `matrix`."""

    _fields_ = [("w", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("bits", "inputs", "outputs", "rounded"))]


class Layer(ctypes.Structure):
    """native.c's `layer`."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("width", "inner")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("norm", "mlp_norm", "beside_norm", "q_norm", "k_norm", "qkv_bias", "o_bias")),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
    ]


class Around(ctypes.Structure):
    """native.c's `around`: what a draft's step has besides its layers."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "origin", "token", "parent", "position", "norm")),
        ("head", Matrix),
        *((name, ctypes.c_long) for name in ("wide", "names", "asked", "best")),
        *((name, ctypes.c_void_p) for name in ("row", "heat", "noise", "scores", "whole", "value", "id")),
    ]


@cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel, or None where it cannot be built or run."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    fit = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if os.environ.get("EYAS_NATIVE") == "0" or not (compiler and fit and platform.system() == "Linux"):
        return None
    try:
        with built(compiler) as path:
            library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    pointer, plan, long, whole = ctypes.c_void_p, ctypes.POINTER(Plan), ctypes.c_long, ctypes.c_int
    library.eyas_product.argtypes = [pointer, ctypes.POINTER(Matrix), pointer, long, pointer, whole]
    library.eyas_norm.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_float]
    library.eyas_attention.argtypes = [plan, *[pointer] * 3, whole, pointer, pointer, ctypes.POINTER(Meeting), whole]
    cache = [pointer, pointer, whole, long]
    end = [pointer, ctypes.POINTER(Meeting), long, long, ctypes.POINTER(Around), whole]
    library.eyas_layers.argtypes = [plan, ctypes.POINTER(Layer), long, *[pointer] * 4, long, *cache, pointer, long, pointer, *end]
    library.eyas_join.argtypes = [plan, ctypes.POINTER(Meeting), whole]
    library.eyas_phases.restype = library.eyas_turned.restype = library.eyas_joined.restype = long
    library.eyas_computed_again.restype = long
    library.eyas_post.argtypes = [pointer, ctypes.c_uint32]
    library.eyas_await.argtypes = [pointer, ctypes.c_uint32, long, long]
    return library


def computed_again() -> int:
    """How many tasks of passes were computed a second time so far, because the thread that had them was without a core for a while."""
    loaded = kernel()
    return 0 if loaded is None else int(loaded.eyas_computed_again())


class Threads:
    """How many threads a call of the kernel has: PyTorch's number. While the kernel's own work, PyTorch's rest: one that has done its part
    of an operation waits for the next one without leaving its core, which the kernel's then lack (measured: an eighth of a round)."""

    def __init__(self) -> None:
        self.lock, self.depth, self.count = threading.Lock(), 0, 0

    def __call__(self) -> int:
        return self.count or torch.get_num_threads()

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Leave the cores to the kernel's threads; what PyTorch computes meanwhile, it computes with one."""
        with self.lock:
            self.count, self.depth = self.count or torch.get_num_threads(), self.depth + 1
            count = self.count
        torch.set_num_threads(1)
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                self.count *= self.depth > 0
            torch.set_num_threads(count)


threads = Threads()
LAGGING: list[Any] = []  # what a thread that lags behind may still read; it must not be freed


def settled(lagging: int, *read: Any) -> None:
    """Hold what a call `read` where one of the kernel's threads has not left that call yet: it has no core, and will find out later that
    its work was done by others. What was held before is let go once no thread lags."""
    if lagging:
        LAGGING.append(read)
    elif (held := len(LAGGING)) and not library().eyas_lagging():  # asked anew: since `lagging` was seen, another caller's job may have run
        del LAGGING[:held]


def kernel_name() -> str:
    """Which kernel this is: two of one name sum alike. "none" where there is none."""
    loaded = kernel()
    return "none" if loaded is None else Path(loaded._name).stem


def library() -> ctypes.CDLL:
    """The loaded kernel, for callers that chose it because it is there."""
    loaded = kernel()
    assert loaded is not None, "the native kernel was chosen and cannot be loaded"
    return loaded


@contextmanager
def built(compiler: str) -> Iterator[Path]:
    """The compiled kernel of this source on this machine, made on first use; where it cannot be kept it is this process's alone."""
    flags = [*FLAGS, f"-march={'haswell' if os.environ.get('EYAS_NATIVE') == 'avx2' else 'native'}"]
    source = b"".join(part.read_bytes() for part in PARTS)
    key = hashlib.sha256(source + " ".join([*flags, compiler, cpu_name()]).encode()).hexdigest()[:16]
    final = cache_dir() / "native" / f"{key}.so"
    if final.exists():
        yield final
        return
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / final.name
        subprocess.run([compiler, *flags, "-shared", str(SOURCE), "-o", str(made), "-lm"], check=True, capture_output=True)
        yield kept(made, final) or made


def kept(made: Path, final: Path) -> Path | None:
    """A file copied to where it is kept, whole or not at all; None where it cannot be."""
    work = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, work)
        os.replace(work, final)
    except OSError:
        with suppress(OSError):
            work.unlink()  # a disk may have been full half-way
        return None
    return final


def cpu_name() -> str:
    """The CPU's name and features, which decide what -march=native builds: machines may share a cache directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor()


def fits(weight: Tensor) -> bool:
    """Whether the kernel can hold these weights exactly in 16 bits: they lie on the CPU and are bfloat16 values."""
    return weight.device.type == "cpu" and weight.shape[1] % 2 == 0 and torch.equal(weight, weight.to(torch.bfloat16).to(weight.dtype))


class Packed(NamedTuple):
    """Weights [O, I] as the kernel reads them, the last block of 16 outputs filled with 0."""

    blocks: Tensor  # [blocks, ..]: bfloat16 [I / 2, 16, 2], pairs of inputs side by side; with fewer bits the bytes of native.c's records
    bits: int
    inputs: int  # I
    outputs: int  # O
    rounded: bool  # whether the product may round x to bfloat16, with 16 bits

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.blocks.data_ptr(), self.bits, self.inputs, 16 * self.blocks.shape[0], self.rounded)

    @property
    def scratch(self) -> int:
        """How many float32 numbers of scratch memory a product needs for each row."""
        return self.inputs + self.inputs // GROUP + 1


def packed(weight_OI: Tensor, bits: int = 16, rounded: bool = False) -> Packed:
    """A matrix packed for the kernel with `bits` bits: 16, 8 or 4."""
    outputs, inputs = weight_OI.shape
    padded = F.pad(weight_OI, (0, 0, 0, -outputs % 16))
    if bits == 16:
        blocks = padded.to(torch.bfloat16).view(-1, 16, inputs // 2, 2).transpose(1, 2).contiguous()
    else:
        blocks = records(grouped(padded, bits))
    return Packed(pages.laid(blocks), bits, inputs, outputs, rounded)


def records(weights: Grouped) -> Tensor:
    """The bytes of native.c's records, [blocks, G, ..]: scales, with 4 bits least values too, then whole numbers as [pair of inputs,
    output, 2]."""
    whole, halves = weights.whole.view(torch.uint8), [each for each in weights[1:] if each is not None]
    O, G, _ = whole.shape
    if weights.least is None:
        numbers = whole.view(O // 16, 16, G, 16, 2).permute(0, 2, 3, 1, 4)
    else:
        low, high = whole.view(O // 16, 2, 8, G, 16, 2).permute(1, 0, 3, 4, 2, 5)
        numbers = low | high << 4
    parts = [half.view(O // 16, 16, G).transpose(1, 2).contiguous().view(torch.uint8) for half in halves]
    return torch.cat([*parts, numbers.flatten(2)], -1)


def product(x_NI: Tensor, weights: Packed) -> Tensor:
    """The product x W^T, float32 [N, O], of contiguous float32 x."""
    N, matrix = len(x_NI), weights.matrix
    y = torch.empty(N, matrix.outputs, dtype=torch.float32, device="cpu")
    scratch = torch.empty(N * weights.scratch, dtype=torch.float32, device="cpu")
    lagging = library().eyas_product(x_NI.data_ptr(), matrix, y.data_ptr(), N, scratch.data_ptr(), threads())
    settled(lagging, x_NI, weights, y, scratch)
    return y if matrix.outputs == weights.outputs else y[:, : weights.outputs].contiguous()


def normed(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """RMSNorm of contiguous float32 rows with a float32 weight, row by row; for few rows it takes a fifth of the time of PyTorch's."""
    y = torch.empty_like(x_NH)
    library().eyas_norm(x_NH.data_ptr(), weight_H.data_ptr(), y.data_ptr(), *x_NH.shape, eps)
    return y


class RowPlan(NamedTuple):
    """Where the N rows of a pass lie in a cache and which cached rows they see, through n views: a row's sight of one slot. All int64.
    Where keys are not sharded, view i is row i's."""

    home: Tensor  # [N] slot where a row's key and value go; -1: nowhere
    place: Tensor  # [N] their index in that slot
    slot: Tensor  # [n]
    prefix: Tensor  # [n] how many of its slot's first rows a view sees
    start: Tensor  # [n + 1] where a view's part of `other` begins; it ends where the next view's begins
    other: Tensor  # for each view the indices behind its prefix that it sees, ascending
    source: Tensor | None = None  # [n] a view's row, where keys are sharded
    shard: Tensor | None = None  # [n] the shard that a view sees
    base: Tensor | None = None  # [n] where the shard's first block of rows begins in the slot
    first: Tensor | None = None  # [N + 1] where a row's views begin, which ascend by shard
    shards: int = 0  # of all keys; 0: they are not sharded
    shift: int = 62  # a block has 2 ** shift rows
    apart: int = 0  # rows from one block of a shard to its next

    def shape(self, heads: int, kv_heads: int, stride: int, keys: Tensor) -> Plan:
        """The kernel's plan for rows of `stride` numbers over keys [.., slots, k, capacity, d]."""
        sizes = (len(self.home), len(self.slot), heads, kv_heads, keys.shape[-1], stride, keys.shape[-2])
        placed = (self.home, self.place, self.source, self.slot, self.prefix, self.start, self.other)
        pointers = (None if part is None else part.data_ptr() for part in (*placed, self.shard, self.base, self.first))
        return Plan(*sizes, *pointers, self.shards, self.shift, self.apart)


def row_plan(numbers: array[int], sizes: Sequence[int], heads: int, kv_heads: int, stride: int, keys: Tensor) -> Plan:
    """What `RowPlan.shape` gives, where `numbers` are home, place, prefix, start and other one behind the other, of these sizes: for few
    rows making tensors takes longer than all else."""
    home, place, prefix, start, other, _ = itertools.accumulate([8 * size for size in sizes], initial=numbers.buffer_info()[0])
    size = (sizes[0], sizes[0], heads, kv_heads, keys.shape[-1], stride, keys.shape[-2])
    return Plan(*size, home, place, None, home, prefix, start, other, None, None, None, 0, RowPlan._field_defaults["shift"], 0)


class Meeting(ctypes.Structure):
    """native.c's `meeting`: where states are while layers run over sharded keys."""

    _fields_ = [
        ("pieces", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("piece", "piece_size", "order")),
        ("block", ctypes.c_long),
        ("states", ctypes.c_void_p),
        ("own", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("low", "size", "sent")),
        ("others", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("shard", "received")),
    ]


def joined(states: Tensor, firsts: Tensor, wanted: tuple[Tensor, Tensor], shards: int) -> Tensor:
    """States of subtrees of the tree over all shards, joined to those of larger ones.

    `states`: float32 [n, R, H, d + 1], contiguous, of subtrees whose first shards are `firsts` [n], ascending. `wanted`: the first shards
    and the sizes [m] of those that are made. Numbers are int64. Returns [m, R, H, d + 1].
    """
    count, rows, heads, state = states.shape
    low, size = wanted
    made = states.new_empty(len(low), rows, heads, state)
    plan = Plan(rows, 0, heads, heads, state - 1, 0, 0, *[None] * 10, shards, 0, 0)
    given = (count, firsts.data_ptr(), None, None, 0, states.data_ptr())
    meeting = Meeting(*given, len(low), *(each.data_ptr() for each in (low, size, made)), 0, None, None)
    settled(library().eyas_join(plan, meeting, threads()), states, firsts, wanted, made)
    return made


def attends(keys: Tensor) -> bool:
    """Whether the kernel can attend over a cache [.., capacity, d]."""
    return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.bfloat16) and kernel() is not None


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, plan: RowPlan, lse: Tensor | None = None) -> Tensor:
    """Write k, v [N,k,d] of the rows into keys, values [slots,k,capacity,d], then compute attention of q [N,q,d] over what each view sees.

    Returns [n, q*d] in q's number format; all sums are float32. `lse`: float32 [n, q], to be filled with the log-sum-exps of the scores.
    """
    out = torch.empty(len(plan.slot), q.shape[1] * q.shape[2], dtype=torch.float32, device="cpu")
    attend(torch.cat([q, k, v], 1).float(), q.shape[1], keys, values, plan, (out, lse))
    return out.to(q.dtype)


def attend(
    rows: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    plan: RowPlan,
    filled: tuple[Tensor | None, Tensor | None] = (None, None),
    meeting: Meeting | None = None,
    kept: object = None,
) -> None:
    """As `attention`, with q, k and v side by side in float32 rows [N, q + k + k, d], of which `heads` are q's. `filled`: out and lse, or
    with `meeting` neither: then it is its `sent` that is filled, with states of the subtrees that it names. `kept`: what has the memory to
    which `meeting` points; a thread that lags may read it after this call."""
    shape = plan.shape(heads, (rows.shape[1] - heads) // 2, rows.shape[1] * rows.shape[2], keys)
    pointers = (rows.data_ptr(), keys.data_ptr(), values.data_ptr(), keys.dtype == torch.float32)
    outputs = (None if each is None else each.data_ptr() for each in filled)
    lagging = library().eyas_attention(shape, *pointers, *outputs, meeting, threads())
    settled(lagging, plan, rows, keys, values, filled, kept)
