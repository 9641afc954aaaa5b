"""What a change of the native kernel brings: a pass of the target by the kernel of another checkout and by this one's, which take turns.

    python benchmarks/two_kernels.py --before CHECKOUT [--precisions bf16,int8,q4] [--rows 1,2,4,6,8,12,16,32,64] [--seconds 2]

CHECKOUT is a working tree of this project (`git worktree add`) whose kernel is called in the same way. Both kernels are in one process,
with the same packed weights, behind the same text. Medians in ms by rows of a pass; the median of the ratios of two passes that followed
each other, which a machine's slow moments hardly move; and whether both give the same bits. Works where the native kernel does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from ctypes import CDLL
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import engine_for, in_turn, options, parsed, rounded, tell

from eyas.config import EyasError
from eyas.kernels import native
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment, chain_rows

CONTEXT = 160  # tokens of the text
ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64)
LEAST_TURNS = 5


def kernel_of(checkout: Path) -> CDLL:
    """The kernel built from a checkout's source. Raises `EyasError` where there is none."""
    source = checkout / "eyas" / "kernels" / native.SOURCE.name
    if not source.exists():
        raise EyasError(f"{source} is not there; give a working tree of this project")
    with patch.multiple(native, SOURCE=source, PARTS=[source.with_name(part.name) for part in native.PARTS]):
        loaded = native.kernel.__wrapped__()
    if loaded is None:
        raise EyasError(f"the native kernel of {checkout} cannot be built or run here")
    return loaded


@torch.inference_mode()
def compared(target: TargetModel, kernels: dict[str, CDLL], rows: int, seconds: float) -> dict[str, Any]:
    """Passes of so many rows, siblings behind a text, by either kernel in turn."""
    vocab_size = target.config.vocab_size
    cache = target.new_cache(1, CONTEXT + rows)
    target(chain_rows(0, [7 % vocab_size] * CONTEXT, 0), cache, (), slice(-1, None))
    cache.keep(0, range(CONTEXT))
    siblings = Segment(0, rows, torch.eye(rows, dtype=torch.bool))
    given = Rows(torch.arange(rows) % vocab_size, torch.full((rows,), CONTEXT), [siblings])
    taken: dict[str, list[float]] = {name: [] for name in kernels}
    logits: dict[str, torch.Tensor] = {}
    ends, turn = time.perf_counter() + seconds, 0
    while turn <= LEAST_TURNS or time.perf_counter() < ends:
        for name in in_turn(list(kernels), turn):
            with patch.object(native, "library", lambda name=name: kernels[name]):
                started = time.perf_counter()
                logits[name] = target(given, cache, ()).logits
                taken[name].append(time.perf_counter() - started)
        turn += 1
    before, after = (each[1:] for each in taken.values())  # the first pass of a shape is slow
    ratio = statistics.median(one / other for one, other in zip(before, after, strict=True))
    told = {name: 1e3 * statistics.median(each[1:]) for name, each in taken.items()}
    return {**rounded(told, 2), "before_over_after": round(ratio, 3), "same_bits": torch.equal(*logits.values())}


def main(words: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--before", type=Path, default=None)
    parser.add_argument("--precisions", default="bf16,int8,q4")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number of rows")
    given = parsed(parser, words, {"before": "."}, rows="1,8", seconds=0.01)
    kernels = {"before": kernel_of(Path(__file__).parents[1] if given.quick else given.before), "after": native.library()}
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for precision in given.precisions.split(","):
        target = engine_for(given, precision).target
        found[precision] = {f"{rows} rows": compared(target, kernels, int(rows), given.seconds) for rows in given.rows.split(",")}
    tell(found, given.out)


if __name__ == "__main__":
    main()
