"""What planners learned on this machine: prices, timed once, and calibration; kept in a file and moved by every round that is served.

A damaged file only means timing again. Knows a target, a clock and a file; planner.py plans rounds.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eyas.config import EyasError, Sampling, cache_dir
from eyas.decode.plan.calibration import Calibration
from eyas.decode.plan.pauses import Gain, Pauses
from eyas.decode.plan.planner import Planner
from eyas.decode.plan.prices import Prices
from eyas.decode.plan.shapes import Shapes
from eyas.files.disk import replace_text
from eyas.kernels.captured import synchronize
from eyas.kernels.linear import capability
from eyas.methods import EARLIER
from eyas.model.protocols import TargetModel
from eyas.model.rows import Rows, Segment, chain_rows

TIMED_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96)
TIMED_CONTEXT = 160  # rows of text before the rows that are timed
TIMED_REPEATS = 5
DRAFT_STEP_SHARE = {1: 0.15, 16: 0.25}  # rows of the draft's pass -> its assumed price, as a share of the target's pass of one row


class PlanStore:
    """Prices and calibrations of one target and draft. They move while they are used; `save` writes them to the file."""

    def __init__(self, target: TargetModel, directory: Path, draft: Path | None, precision: str) -> None:
        """`directory`: the target's; `draft`: the draft's, where there is one. With precision and machine they are the key in the file."""
        self.target, self.path = target, cache_dir() / "plans.json"
        where = (machine(), target.device, torch.get_num_threads())
        arranged = getattr(target, "arrangement", None)  # of sharded keys
        self.key = "|".join(map(str, (*where, directory.resolve(), draft_key(draft), precision, *filter(None, [arranged]))))
        self.known: dict[str, Any] = self.read().get(self.key, {})
        self.planned: dict[str, tuple[Prices, Calibration, dict[int, Gain], Shapes]] = {}
        self.passes: Prices | None = None
        self.frozen = False  # True in a measurement: nothing is learned or saved

    def planner(self, method: str, sampling: Sampling) -> Planner:
        """A planner for one call by a method, written with `+copy` where copying joins it. Calls share prices, calibration and what pauses
        learned; a pause under way belongs to its call alone. Times passes where no price is known yet."""
        if self.passes is None:
            self.passes = prices(self.known.get("passes")) or self.time()
        kind = f" {'greedy' if sampling.greedy else 'sampled'}{' adjusted' * sampling.adjusted}"
        name = method + kind
        if name not in self.planned:
            before = next((old for old, now in EARLIER.items() if now == method), method)
            found = self.known.get(name, self.known.get(before + kind))
            known: dict[str, Any] = found if isinstance(found, dict) else {}
            alone = self.passes.of(1)
            steps = prices(known.get("steps")) or Prices({rows: share * alone for rows, share in DRAFT_STEP_SHARE.items()}, assumed=True)
            counts = known.get("calibration")
            self.planned[name] = steps, Calibration(counts if isinstance(counts, dict) else None), {}, Shapes(known.get("rounds"))
        steps, calibration, gains, shapes = self.planned[name]
        calibration.frozen = self.frozen
        if self.frozen:
            gains, shapes = copy.deepcopy((gains, shapes))
        return Planner(self.passes, steps, calibration, Pauses(gains), shapes)

    def time(self) -> Prices:
        print("timing passes (once on this machine) ...", file=sys.stderr, flush=True)
        return Prices(time_passes(self.target))

    def read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}

    def save(self) -> None:
        """Write what was learned to the file, whole or not at all. A file that cannot be written only means timing again next time."""
        if self.passes is None or self.frozen:
            return
        learned = {
            name: {"steps": steps.table(), "calibration": counts.as_dict()} | ({"rounds": rounds} if (rounds := shapes.table()) else {})
            for name, (steps, counts, _, shapes) in self.planned.items()
        }
        self.known |= {"passes": self.passes.table()} | learned
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(self.read() | {self.key: self.known}))
        except OSError as error:
            print(f"what was learned of prices cannot be kept ({error.strerror}: {self.path})", file=sys.stderr)


def prices(table: Any) -> Prices | None:
    """The prices that a value of a file holds, or None where it is no table of prices."""
    try:
        seconds = {int(rows): float(price) for rows, price in table.items()}
    except (AttributeError, TypeError, ValueError):
        return None
    return Prices(seconds) if seconds and all(rows > 0 and 0 < price < 1e4 for rows, price in seconds.items()) else None


@torch.inference_mode()
def time_passes(target: TargetModel) -> dict[int, float]:
    """Rows of a pass -> its seconds, after a text of up to TIMED_CONTEXT rows: the lower quartile of a few repeats. All numbers of rows
    take turns, so that a slow moment of the machine hits all alike."""
    config = target.config
    context = min(TIMED_CONTEXT, max(1, config.max_position_embeddings // 2))
    rows_fit = [rows for rows in TIMED_ROWS if context + rows <= config.max_position_embeddings]
    if not rows_fit:
        raise EyasError(
            f"the target reads {config.max_position_embeddings} tokens at most; its trees cannot be planned, name one with --tree"
        )
    cache = target.new_cache(1, context + max(rows_fit))
    target(chain_rows(0, [7 % config.vocab_size] * context, 0), cache, (), slice(-1, None))
    cache.keep(0, range(context))
    taken: dict[int, list[float]] = {rows: [] for rows in rows_fit}
    for _ in range(TIMED_REPEATS + 1):
        for rows in rows_fit:
            tokens, mask = torch.arange(rows) % config.vocab_size, torch.eye(rows, dtype=torch.bool)
            positions = torch.full((rows,), context)
            started = time.perf_counter()
            target(Rows(tokens, positions, [Segment(0, rows, mask)]), cache, ())
            synchronize(target.device)
            taken[rows].append(time.perf_counter() - started)
    return {rows: sorted(seconds[1:])[TIMED_REPEATS // 4] for rows, seconds in taken.items()}


def machine() -> str:
    return f"{platform.machine()} {capability()} {platform.node()}"


def draft_key(draft: Path | None) -> str:
    """What tells one draft's files from another's: the sizes and times of its weight files."""
    files: list[Path] = sorted(draft.glob("*.safetensors")) if draft else []
    return "-".join(f"{file.stat().st_size}.{int(file.stat().st_mtime)}" for file in files)
