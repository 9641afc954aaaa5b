"""Runs one sequence's pass of few rows in fixed shapes, which CUDA launches as one graph instead of kernel after kernel.

Rows are padded to one of a few counts, and keys are read in windows that double, so a handful of graphs serve every tree and text. On a CPU
the same fixed shapes run without a graph: slower, and used by tests alone. Knows rows, slabs of keys and shapes; what a pass computes is
handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as remembered
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from eyas.kernels import fused
from eyas.kernels.attention import PassAttention, grouped_attention

if TYPE_CHECKING:
    from eyas.model.cache import Slabs
    from eyas.model.rows import Segment

ROWS = (1, 8, 16, 32, 64)  # padding costs hardly anything; a pass of more rows spends its time in products, not in launches
WINDOW = 512  # keys of the smallest window; slabs have a multiple of it
RUNS = 3  # how often making a graph on CUDA runs its function: twice before the capture, and in it

# tokens [R], positions [R], attention, further inputs [R, ...] -> outputs [R, ...]
Run = Callable[..., tuple[Tensor | None, ...]]


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
        bias_RW = torch.zeros(self.seen.shape, dtype=self.slabs.keys.dtype, device=self.seen.device).masked_fill_(~self.seen, float("-inf"))
        return bias_RW.repeat(self.group, 1)

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


@remembered
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's graphs are captured: only one, since each stream brings a workspace."""
    return torch.cuda.Stream(device)


class Graph:
    """A function of tensors of fixed shapes; on CUDA captured once and replayed."""

    made = 0  # graphs made in this process; a round that makes one is slower than others, so its time tells nothing

    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self.run: Run | None = run
        self.inputs, self.graph = inputs, None
        self.device = inputs[0].device
        Graph.made += 1
        if self.device.type != "cuda":
            run(*inputs)  # on CUDA it runs before the capture too, so tests see what such a run leaves behind
        else:
            with torch.cuda.device(self.device):
                stream = side_stream(self.device)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # what PyTorch makes on first use must exist before the capture
                    for _ in range(RUNS - 1):
                        run(*inputs)
                torch.cuda.current_stream().wait_stream(stream)
                self.graph = torch.cuda.CUDAGraph()
                # of this thread alone: another may ask events or take memory meanwhile, as nccl's does
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.outputs = run(*inputs)
            self.run = None  # it holds the slabs, which hold this graph: nothing of the circle would be freed

    def __call__(self) -> tuple[Tensor | None, ...]:
        """The function's outputs for what `inputs` hold now. The next call overwrites them."""
        if self.graph is None:
            assert self.run is not None
            return self.run(*self.inputs)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.outputs


def fixed_call(run: Run, key: tuple, slabs: Slabs, *given: Tensor) -> tuple[Tensor | None, ...]:
    """The outputs of `run` for these tensors, whose shapes the key settles, over these slabs; the next call overwrites them. `run` must
    hold no cache, or its slabs would never be idle."""
    if (graph := slabs.graphs.get(key)) is not None:
        for held, new in zip(graph.inputs, given, strict=True):
            held.copy_(new, non_blocking=True)
    else:
        with torch.inference_mode(False):  # made inside a round, they may be written to outside one
            inputs = [each.to(slabs.keys.device, copy=True) for each in given]  # a first run writes where this one will
        graph = slabs.graphs[key] = Graph(run, inputs)
    return graph()


def fits(cache: FixedCache, segments: Sequence[Segment]) -> bool:
    """Whether a pass may run in fixed shapes: one sequence, in a cache from a pool, and few rows."""
    return cache.slabs.pooled and len(segments) == 1 and segments[0].count <= ROWS[-1]


def padded(count: int) -> int:
    """How many rows a pass of `count` rows has in fixed shapes."""
    return next(size for size in ROWS if size >= count)


def fixed_pass(
    run: Run, key: tuple, group: int, cache: FixedCache, tokens: Tensor, positions: Tensor, segment: Segment, *others: Tensor
) -> tuple[Tensor | None, ...]:
    """The outputs [N, ...] of `run` for these rows, in fixed shapes. `tokens` and `positions` [N] are on the CPU, `others` [N, ...] on the
    device.

    `key`: everything besides the shapes that the graph depends on; `group`: query heads for each key head.
    """
    count = segment.count
    rows = padded(count)
    fixed = cache.fixed(segment, rows, group)
    laid = torch.zeros(3, rows, dtype=torch.int64)
    laid[0] = fixed.places
    laid[1:, :count] = torch.stack([tokens, positions])
    graphs, key = cache.slabs.graphs, (*key, rows, fixed.window)
    if key not in graphs:
        graphs[key] = graph_of(run, fixed, cache.slabs, laid, others)
    graph, given = graphs[key], (laid, *fixed.masks)
    for held, new in zip(graph.inputs, given, strict=False):
        held.copy_(new, non_blocking=True)
    for held, new in zip(graph.inputs[len(given) :], others, strict=True):
        held[:count].copy_(new)
    return tuple(part if part is None else part[:count].clone() for part in graph())


def graph_of(run: Run, fixed: Fixed, slabs: Slabs, laid: Tensor, others: Sequence[Tensor]) -> Graph:
    """A graph of `run` with inputs of its own, shaped like this pass's. `run` must hold no cache, or its slabs would never be idle."""
    rows, device, masks, attention = laid.shape[1], slabs.keys.device, len(fixed.masks), fixed.attention

    def whole(laid: Tensor, *further: Tensor) -> tuple[Tensor | None, ...]:
        places, tokens, positions = laid
        return run(tokens, positions, attention(slabs, places, *further[:masks]), *further[masks:])

    with torch.inference_mode(False):  # made inside a round, they may be written to outside one
        inputs = [each.to(device, copy=True) for each in (laid, *fixed.masks)]  # a first run writes where this pass will
        inputs += [torch.zeros((rows, *each.shape[1:]), dtype=each.dtype, device=device) for each in others]
    return Graph(whole, inputs)


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
