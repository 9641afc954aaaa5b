"""Attention with log-sum-exps over very many keys on a GPU, against the card's bandwidth; and several processes on one card.

    python benchmarks/gpu_tree_attention.py [--device cuda] [--keys 131072 262144 524288 1048576] [--rows 1 16 64] [--out F.json]

Shapes of Llama 3.1 8B (32 heads, 8 key heads of 128, bfloat16), random numbers, one layer: a million keys take 4.3 GB. Each kernel of
PyTorch's that hands out log-sum-exps reads the keys in one piece and cut into parts whose states are joined, since few queries over one
piece leave most of a card idle; gigabytes a second stand beside those of a copy on the same card. Then processes on the one card hold
a share each and their states meet over gloo: seconds of such a layer, and how far the result is from one process's. `--quick` runs the same
on a CPU, with the flash kernel alone (`--kernels flash flex` can be had there too).
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import options, parsed, tell
from torch import Tensor, distributed
from torch.nn.attention import flex_attention as flexible
from tree_attention import forked

Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q [p,k,m,d], keys and values [p,k,t,d] -> [p,k,m,d], lse [p,k,m]


@dataclass(frozen=True)
class Shape:
    """Of attention: query heads, key heads, their width."""

    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    def drawn(self, rows: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [k, groups * rows, d], the heads of a group one below another, and keys and values [k, t, d]."""
        draw = torch.Generator(device).manual_seed(1)
        sizes = (self.heads // self.kv_heads * rows, keys, keys)
        q, k, v = (torch.randn(self.kv_heads, size, self.width, dtype=torch.bfloat16, device=device, generator=draw) for size in sizes)
        return q, k, v


# ---- kernels ----


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def efficient(q: Tensor, k: Tensor, v: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """With a bias that hides nothing, as a share has that is padded to a fixed size."""
    bias = torch.zeros(1, 1, 1, k.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:3], -1) if biased else None
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]
    return out, lse[..., : q.shape[2]]  # it pads them


def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    call = flexible.flex_attention if q.device.type == "cpu" else compiled_flex()
    if not hasattr(flexible, "AuxRequest"):  # before torch 2.9
        return call(q, k, v, return_lse=True)
    out, more = call(q, k, v, return_aux=flexible.AuxRequest(lse=True))
    return out, more.lse


@functools.cache
def compiled_flex() -> Any:
    return torch.compile(flexible.flex_attention, dynamic=False)


KERNELS: dict[str, Kernel] = {
    "flash": flash,
    "efficient": functools.partial(efficient, biased=False),
    "efficient, bias": functools.partial(efficient, biased=True),
    "flex": flex,
}


def parted(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, parts: int) -> Tensor:
    """The state [k, m, d + 1] of q over keys cut into so many parts."""
    keys, values = (each.unflatten(1, (parts, -1)).transpose(0, 1) for each in (k, v))
    out, lse = kernel(q.expand(parts, *q.shape), keys, values)
    return joined(out.float(), lse.float())


def joined(out: Tensor, lse: Tensor) -> Tensor:
    """One state [.., d + 1] of those along the first axis."""
    whole = lse.logsumexp(0)
    return torch.cat([((lse - whole).exp()[..., None] * out).sum(0), whole[..., None]], -1)


# ---- what is timed ----


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of repeated calls behind a few that are not counted; on a card by its own clock."""
    taken = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            torch.cuda.synchronize()
            taken.append(began.elapsed_time(ended) / 1e3)
        else:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])


def bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return 2 * size / seconds(lambda: to.copy_(source), device, repeats)


@torch.inference_mode()
def kernels(shape: Shape, given: Any, device: torch.device) -> list[dict[str, Any]]:
    """A line for each number of keys and rows, kernel and number of parts."""
    found = []
    for keys, rows in itertools.product(given.keys, given.rows):
        drawn = shape.drawn(rows, keys, device)
        exact = parted(flash, *drawn, 1)
        for name, parts in itertools.product(given.kernels, given.parts):
            line = line_of(functools.partial(parted, KERNELS[name], *drawn, parts), exact, given.repeats)
            if "ms" in line:
                line["gb_a_second"] = round(sum(each.nbytes for each in drawn[1:]) / line["ms"] / 1e6, 1)
            found.append({"keys": keys, "rows": rows, "kernel": name, "parts": parts, **line})
    return found


def line_of(call: Callable[[], Tensor], exact: Tensor, repeats: int) -> dict[str, Any]:
    """How long a call takes and how far it is from the flash kernel's result over all keys at once; or why it cannot be done."""
    try:
        off, taken = (call() - exact).abs().max().item(), seconds(call, exact.device, repeats)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error).splitlines()[0][:200]}
    return {"ms": round(1e3 * taken, 4), "off_by": float(f"{off:.1e}")}


def of_several(_: int, shape: Shape, given: Any) -> dict[str, Any]:
    """One process of several on one card: its share of the keys, and a layer's states over gloo."""
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    device, keys, rows, parts = torch.device(given.device), given.keys[0], given.rows[-1], given.parts[-1]
    held = keys // parts // count * parts  # of each
    q, k, v = shape.drawn(rows, held * count, device)
    whole = parted(flash, q, k, v, parts)
    k, v = (each[:, held * rank : held * (rank + 1)].clone() for each in (k, v))

    def layer() -> Tensor:
        mine = parted(flash, q, k, v, parts).cpu()
        everyone = [torch.empty_like(mine) for _ in range(count)]
        distributed.all_gather(everyone, mine)
        states = torch.stack(everyone).to(device)
        return joined(states[..., :-1], states[..., -1])

    off, bits = (layer() - whole).abs().max().item(), zlib.crc32(layer().cpu().numpy().tobytes())
    alone = seconds(lambda: parted(flash, q, k, v, parts), device, given.repeats)
    taken = seconds(layer, device, given.repeats)
    everyones: list[Any] = [None] * count
    distributed.all_gather_object(everyones, bits)
    distributed.destroy_process_group()
    line = {
        "processes": count,
        "keys": held * count,
        "rows": rows,
        "own_share_ms": round(1e3 * alone, 4),
        "layer_ms": round(1e3 * taken, 4),
    }
    return line | {"off_by": float(f"{off:.1e}"), "same_bits": len({*everyones}) == 1}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--keys", type=int, nargs="+", default=[1 << 17, 1 << 18, 1 << 19, 1 << 20])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--repeats", type=int, default=20)
    given = parsed(parser, words, device="cpu", keys=[512], rows=[1, 4], parts=[1, 4], kernels=["flash"], processes=[2], repeats=1)
    device, shape = torch.device(given.device), Shape(4, 2, 16) if given.quick else Shape()
    on_card = device.type == "cuda"
    several = [forked(count, functools.partial(of_several, shape=shape, given=given))[0] for count in given.processes]  # CUDA is not up yet
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_card else "cpu", "torch": torch.__version__}
    found["copy_gb_a_second"] = round(bandwidth(device, 1 << (32 if on_card else 20), given.repeats) / 1e9, 1)
    found["kernels"] = kernels(shape, given, device)
    found["processes"] = several
    tell(found, given.out)


if __name__ == "__main__":
    main()
