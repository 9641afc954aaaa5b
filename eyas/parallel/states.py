"""Attention over some keys leaves a state; states over different keys become the state over all of them.

The paper's point: attention is the derivative of a log-sum-exp, and log-sum-exp and max are associative, so partial results may meet in any
order. Rounding is not associative, so here they meet in one order. This is the plain form; the kernel's is in native.c (`meet`, `join`).

A state is [.., d + 1]: a head's output [d], and the log of the sum of its scores' exponentials; -inf where no key was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Tensor


def meet(a: State, b: State) -> State:
    """The state over a's keys and b's; to the last bit a or b itself where the other saw none."""
    la, lb = a[..., -1:], b[..., -1:]
    most = torch.maximum(la, lb)
    ea, eb = (la - most).exp(), (lb - most).exp()
    whole = torch.cat([(ea * a[..., :-1] + eb * b[..., :-1]) / (ea + eb), most + (ea + eb).log()], -1)
    return torch.where(lb == float("-inf"), a, torch.where(la == float("-inf"), b, whole))


def join(known: Mapping[tuple[int, int], State], low: int, size: int) -> State | None:
    """The state over shards [low, low + size), from known states of subtrees (first shard, size); None where none of them lies there."""
    if (low, size) in known:
        return known[low, size]
    if size == 1:
        return None
    first, second = (join(known, start, size // 2) for start in (low, low + size // 2))
    if first is None or second is None:
        return first if second is None else second
    return meet(first, second)


def merged(states: Tensor) -> State:
    """The state over the keys of all states [parts, .., d + 1], taken together at once: a few launches however many there are, in an order
    of the library's."""
    lse = states[..., -1:]
    most = lse.amax(0)
    most = most.masked_fill(most == float("-inf"), 0.0)  # where nothing was seen: else inf - inf
    weights = (lse - most).exp()
    total = weights.sum(0)
    return torch.cat([(weights * states[..., :-1]).sum(0) / total.clamp(min=1.0), most + total.log()], -1)


def empty(rows: int, heads: int, width: int, like: Tensor) -> State:
    """States [rows, heads, width + 1] of rows that have seen no key."""
    state = like.new_zeros(rows, heads, width + 1)
    state[..., -1] = float("-inf")
    return state
