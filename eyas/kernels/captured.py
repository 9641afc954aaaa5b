"""Runs passes of few rows in fixed shapes, which CUDA launches as one graph instead of kernel after kernel.

Rows are padded to one of a few counts, and keys are read in windows that double, so a handful of graphs serve every tree and text. On a CPU
the same fixed shapes run without a graph: slower, and used by tests alone. Knows rows, slabs of keys and shapes; what a pass computes is
handed in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache as remembered
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from eyas.checks import EyasError
from eyas.kernels import fused
from eyas.kernels.attention import Attend, PassAttention, attention_of_each, grouped_attention

if TYPE_CHECKING:
    from eyas.model.cache import Slabs
    from eyas.model.rows import Segment

ROWS = (1, 8, 16, 32, 64)  # padding costs hardly anything; a pass of more rows spends its time in products, not in launches
WINDOW = 512  # keys of the smallest window; slabs have a multiple of it
BATCHES = (1, 2, 4, 8, 16, 32)  # sequences of a round of several; those that pad cost their rows
MOST_ROWS = 512  # of such a round's pass: more of them take a card so long that launches do not count, and their logits too much memory
RUNS = 3  # how often making a graph on CUDA runs its function: twice before the capture, and in it

# tokens [R], positions [R], attention, further inputs [R, ...] -> outputs [R, ...]
Run = Callable[..., tuple[Tensor | None, ...]]


class Memory:
    """What several graphs share: one runs at a time, and what it gives is used before the next one runs."""

    handle: Any = None  # PyTorch's name for it


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what was launched on it. Only CUDA returns from a launch before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Fixed(NamedTuple):
    """One sequence's pass in fixed shapes, as its cache lays it out: R rows, of which the last ones may pad."""

    window: int  # how many keys are read
    places: Tensor  # [R] int64: at which index of the slab each row's key goes
    masks: tuple[Tensor, ...]  # what else says which rows see which keys, in shapes that R and the window settle
    attention: Callable[..., PassAttention]  # of slabs, and of places and masks on their device; holds no cache, or it would never go


class FixedCache(Protocol):
    """What a pass in fixed shapes asks of a cache."""

    @property
    def slabs(self) -> Slabs: ...

    def fixed(self, segment: Segment, rows: int, group: int) -> Fixed:
        """How the rows of a segment lie in a pass of `rows`. `group`: query heads that share a key head."""
        ...


class StaticAttention:
    """Attention of R rows over the first keys of a cache of one sequence. `places_R` says at which index of the slab each row's key goes,
    `seen_RW` which keys of the window it sees."""

    def __init__(self, slabs: Slabs, places_R: Tensor, seen_RW: Tensor, *, group: int) -> None:
        self.slabs, self.places, self.seen, self.group = slabs, places_R, seen_RW, group

    @cached_property
    def bias(self) -> Tensor:
        """[group * R, W] that is added to scores: 0 or -inf"""
        return bias_of(self.seen, self.slabs.keys.dtype).repeat(self.group, 1)

    def layer(self, layer: int) -> StaticAttend:
        return StaticAttend(self, self.slabs.keys[layer, 0], self.slabs.values[layer, 0])


class StaticAttend:
    """The attention of one layer, whose cache has `keys` and `values` [k, T, d]."""

    def __init__(self, of: StaticAttention, keys: Tensor, values: Tensor) -> None:
        self.of, self.keys, self.values = of, keys, values

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.of.seen.shape[1]
        self.keys.index_copy_(1, self.of.places, k.transpose(0, 1))
        self.values.index_copy_(1, self.of.places, v.transpose(0, 1))
        return grouped_attention(q, self.keys[:, :window], self.values[:, :window], self.of.bias)

    def of_heads(self, heads_NHd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor | None:
        """The same from queries, keys and values before their rotation, by kernels that do it all; None where they do not suit."""
        if not (fused.suits(heads_NHd) and fused.suits_heads(heads_NHd.shape[2], rotation[0].shape[-1])):
            return None
        q = fused.turned_and_kept(heads_NHd, rotation, self.keys, self.values, self.of.places)
        return fused.attention(q, self.keys, self.values, self.of.seen)


class Seats(NamedTuple):
    """How many sequences a pass in fixed shapes has, and where their keys lie."""

    count: int  # some of them may be none: they pad
    scattered: bool  # in any slots, whose keys are copied together to be read; else in the first ones, each in the slot of its number

    def attention(self, slabs: Slabs, slots_B: Tensor, places_BR: Tensor, seen_BRW: Tensor, group: int) -> PassAttention:
        """The attention of R rows for each of B sequences, which lie as `StaticAttention` has it in these slots."""
        if self.count == 1:
            return StaticAttention(slabs, places_BR[0], seen_BRW[0], group=group)
        return SlotsAttention(slabs, slots_B, places_BR, seen_BRW, group, self.scattered)


class SlotsAttention:
    """Attention of R rows for each of B sequences over the first keys of its slot, by PyTorch's operations."""

    def __init__(self, slabs: Slabs, slots_B: Tensor, places_BR: Tensor, seen_BRW: Tensor, group: int, scattered: bool) -> None:
        self.slabs, self.slots, self.scattered, self.window = slabs, slots_B, scattered, seen_BRW.shape[2]
        self.homes, self.places = slots_B[:, None].expand_as(places_BR).flatten(), places_BR.flatten()
        self.bias = bias_of(seen_BRW, slabs.keys.dtype).repeat(1, group, 1)[:, None]

    def layer(self, layer: int) -> Attend:
        slabs = self.slabs.keys[layer], self.slabs.values[layer]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for slab, new in zip(slabs, (k, v), strict=True):
                slab[self.homes, :, self.places] = new
            keys, values = (slab[:, :, : self.window] for slab in slabs)
            if self.scattered:
                return attention_of_each(q, keys.index_select(0, self.slots), values.index_select(0, self.slots), self.bias)
            return attention_of_each(q, keys[: len(self.slots)], values[: len(self.slots)], self.bias)

        return attend


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of keys that are seen or not: 0 or -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@remembered
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's graphs are captured: only one, since each stream brings a workspace."""
    return torch.cuda.Stream(device)


def captures(device: torch.device) -> bool:
    """Whether graphs are captured there; elsewhere a function is run as it is."""
    return device.type == "cuda"


def capture(
    run: Run, inputs: Sequence[Tensor], device: torch.device, memory: Memory | None
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...]]:
    """A graph of a function on CUDA and its outputs. Replaying one overwrites the outputs of others in the same memory. Raises whatever
    stands in the way."""
    with torch.cuda.device(device):
        stream, current = side_stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):  # what PyTorch makes on first use must exist before the capture
                for _ in range(RUNS - 1):
                    run(*inputs)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # of this thread alone: another may ask events or take memory meanwhile, as nccl's does
            with torch.cuda.graph(graph, pool=memory and memory.handle, stream=stream, capture_error_mode="thread_local"):
                return graph, run(*inputs)
        finally:
            torch.cuda.set_stream(current)  # a capture that ends in an error leaves its own stream in place


class NotCaptured(EyasError):
    """CUDA could not capture a function; the message says why."""


class Graph:
    """A function of tensors of fixed shapes; on CUDA captured once and replayed."""

    made = 0  # graphs made in this process; a round that makes one is slower than others, so its time tells nothing
    refused = 0  # those of them that could not be captured

    def __init__(self, run: Run, inputs: Sequence[Tensor], memory: Memory | None = None) -> None:
        """Raises `NotCaptured`, and says so once a process, where CUDA cannot capture it."""
        self.run: Run | None = run
        self.inputs, self.graph = inputs, None
        self.device = inputs[0].device
        Graph.made += 1
        if not captures(self.device):
            run(*inputs)  # on CUDA it runs before the capture too, so tests see what such a run leaves behind
            return
        try:
            self.graph, self.outputs = capture(run, inputs, self.device, memory)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not Graph.refused:
                print(f"CUDA cannot capture these steps as one graph ({why}); they are launched one by one, slower", file=sys.stderr)
            Graph.refused += 1
            raise NotCaptured(f"CUDA cannot capture these steps as one graph ({why})") from error
        self.run = None  # it holds the slabs, which hold this graph: nothing of the circle would be freed

    def __call__(self) -> tuple[Tensor | None, ...]:
        """The function's outputs for what `inputs` hold now. The next call overwrites them, of this graph or of one in the same memory."""
        if self.graph is None:
            assert self.run is not None
            return self.run(*self.inputs)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.outputs


def fixed_call(run: Run, key: tuple, slabs: Slabs, *given: Tensor) -> tuple[Tensor | None, ...] | None:
    """The outputs of `run` for these tensors, whose shapes the key settles, over these slabs; the next call over them overwrites these.
    `run` must hold no cache, or its slabs would never be idle. None where it cannot be captured, which is tried once over these
    slabs: then it may have written what it writes, and has changed nothing else."""
    if key not in slabs.graphs:
        with torch.inference_mode(False):  # made inside a round, they may be written to outside one
            inputs = [each.to(slabs.keys.device, copy=True) for each in given]  # a first run writes where this one will
        slabs.graphs[key] = graph_over(slabs, run, inputs)
    elif (held := slabs.graphs[key]) is not None:
        for each, new in zip(held.inputs, given, strict=True):
            each.copy_(new, non_blocking=True)
    graph = slabs.graphs[key]
    return graph and graph()


def graph_over(slabs: Slabs, run: Run, inputs: Sequence[Tensor]) -> Graph | None:
    """A graph of `run`; None where it cannot be captured and its steps may be launched one by one instead."""
    if slabs.memory.handle is None and slabs.keys.is_cuda:
        slabs.memory.handle = torch.cuda.graph_pool_handle()
    try:
        return Graph(run, inputs, slabs.memory)
    except NotCaptured:
        slabs.memory.handle = None  # a capture that ended in an error may not have let go of it
        if slabs.captured_alike:
            raise
        return None


def fits(cache: FixedCache, segments: Sequence[Segment]) -> bool:
    """Whether a pass may run in fixed shapes: one sequence, in a cache from a pool, and few rows."""
    return cache.slabs.pooled and len(segments) == 1 and segments[0].count <= ROWS[-1]


def padded(count: int) -> int:
    """How many rows a pass of `count` rows has in fixed shapes."""
    return next(size for size in ROWS if size >= count)


def fixed_pass(
    run: Run, key: tuple, group: int, cache: FixedCache, tokens: Tensor, positions: Tensor, segment: Segment, *others: Tensor
) -> tuple[Tensor | None, ...] | None:
    """The outputs [N, ...] of `run` for these rows, in fixed shapes. `tokens` and `positions` [N] are on the CPU, `others` [N, ...] on the
    device. None as `fixed_call` has it.

    `key`: everything besides the shapes that the graph depends on; `group`: query heads for each key head.
    """
    count = segment.count
    rows = padded(count)
    fixed = cache.fixed(segment, rows, group)
    laid = torch.zeros(3, rows, dtype=torch.int64)
    laid[0] = fixed.places
    laid[1:, :count] = torch.stack([tokens, positions])
    slabs, key = cache.slabs.of(segment.slot), (*key, rows, fixed.window)
    if key not in slabs.graphs:
        slabs.graphs[key] = graph_of(run, fixed, slabs, laid, others)
    graph, given = slabs.graphs[key], (laid, *fixed.masks)
    if graph is None:
        return None
    for held, new in zip(graph.inputs, given, strict=False):
        held.copy_(new, non_blocking=True)
    for held, new in zip(graph.inputs[len(given) :], others, strict=True):
        held[:count].copy_(new)
    return tuple(part if part is None else part[:count].clone() for part in graph())


def graph_of(run: Run, fixed: Fixed, slabs: Slabs, laid: Tensor, others: Sequence[Tensor]) -> Graph | None:
    """A graph of `run` with inputs of its own, shaped like this pass's. `run` must hold no cache, or its slabs would never be idle."""
    rows, device, masks, attention = laid.shape[1], slabs.keys.device, len(fixed.masks), fixed.attention

    def whole(laid: Tensor, *further: Tensor) -> tuple[Tensor | None, ...]:
        places, tokens, positions = laid
        return run(tokens, positions, attention(slabs, places, *further[:masks]), *further[masks:])

    with torch.inference_mode(False):  # made inside a round, they may be written to outside one
        inputs = [each.to(device, copy=True) for each in (laid, *fixed.masks)]  # a first run writes where this pass will
        inputs += [torch.zeros((rows, *each.shape[1:]), dtype=each.dtype, device=device) for each in others]
    return graph_over(slabs, whole, inputs)


def window_of(keys: int, most: int) -> int:
    """The smallest window that holds `keys` keys; never more than the `most` that there are."""
    window = WINDOW
    while window < keys:
        window *= 2
    return min(window, most)


def layout_seen(segment: Segment, length: int, rows: int, window: int) -> Tensor:
    """Which keys of the window each row sees, bool [R, window]. Padding rows see the first key, since a row that saw none would have no
    softmax."""
    count, seen = segment.count, torch.zeros(rows, window, dtype=torch.bool)
    among = torch.ones(count, count, dtype=torch.bool).tril() if segment.mask is None else segment.mask
    free = length + count - among.shape[1]
    seen[:count, :free] = True
    seen[:count, free : length + count] = among
    seen[count:, 0] = True
    return seen
