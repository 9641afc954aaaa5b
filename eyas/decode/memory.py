"""What something would take of a machine's or a GPU's memory, and what is free: said before any of it is taken, or once there is none left.

Knows numbers of bytes; knows nothing of what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from eyas.config import EyasError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_on(device: torch.device) -> float | None:
    """The bytes of a device's memory that this process may still take, those among them that PyTorch holds and does not use; None where the
    system does not say."""
    if device.type != "cuda":
        return free_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_bytes() -> float | None:
    """The bytes of memory that this process may still take; None where the system does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    limit = limited_bytes()
    return free if limit is None else min(free, limit)


def limited_bytes() -> float | None:
    """What a container's limit leaves; None where there is no such limit."""
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()).get("file", "0")
        return None if most == "max" else max(int(most) - used + int(files), 0)  # what files hold there is given back when asked for
    except (OSError, ValueError):
        return None


def check_memory(parts: Mapping[str, float], way_out: str) -> None:
    """Raise `EyasError` where these parts (what each is -> bytes) together are more than is free. `way_out`: what the user may lower."""
    free, needed = free_bytes(), sum(parts.values())
    if free is not None and needed > free:
        told = " and ".join(f"{size / 1e9:,.1f} GB for {what}" for what, size in parts.items() if size > 0.01 * needed)
        raise EyasError(f"this takes {told}, and {free / 1e9:,.1f} GB are free; {way_out}")


def would_fit(parts: Mapping[str, float], count: int, room: float | None) -> str:
    """In words, how many of `count` texts that together take these parts fit into `room` bytes at a time, at least one less than did not
    fit; nothing where the room is not known."""
    if room is None:
        return ""
    most = min(int(room * count / max(sum(parts.values()), 1)), count - 1)
    return f": of {count} about {most} would fit" if most > 0 else ": as it is not one fits beside the model"
