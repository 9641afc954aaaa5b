"""Several processes that train one draft, as `torchrun` starts them: each takes a part of every batch, gradients are summed.

Knows ranks and tensors; knows nothing of drafts. Each gradient is a share of one mean over the whole batch, so the sum over processes is
the gradient of one process on that batch; DistributedDataParallel would average means over parts, which differ in their anchors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from eyas.config import EyasError
from eyas.parallel.peers import join_group

WAIT = timedelta(hours=48)  # how long the other processes wait while the first lets the target write
# how gloo and nccl say that a process does not answer
GONE = re.compile(r"(?:closed|reset) by peer|broken pipe|ncclRemoteError|timed out|timeout", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process's number among the processes that train together, and how many these are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str = "cpu") -> Ranks:
        """Meet the other processes, where `torchrun` started several."""
        return (
            cls(distributed.get_rank(), distributed.get_world_size())
            if join_group("nccl" if device.startswith("cuda") else "gloo", WAIT)
            else cls()
        )

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Raise `EyasError` where another process is found gone within the block."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not GONE.search(str(error)):
                raise
            told = f"one of the {self.count} processes that train together is gone, so all end; torchrun's report names it"
            raise EyasError(f"{told}. Go on with --resume") from error

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the first process's: fits differ in their last bits from machine to machine, and all must train one draft."""
        with torch.no_grad():
            if not self.first:
                for tensor in tensors:
                    tensor.zero_()
            self.sum(tensors)

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's value, for all: clocks differ, and all must stop at the same step."""
        if self.count == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.broadcast(told, src=0)
        return float(told)

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether this is so in one of the processes."""
        told = torch.tensor(float(value), device=device)
        self.sum([told])
        return bool(told)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Hand the first `sent[0]` rows to the first process, the next `sent[1]` to the second, ..; returns the rows that came, of which
        `received[0]` are from the first, .. ."""
        came = rows.new_empty(sum(received), *rows.shape[1:])
        distributed.all_to_all_single(came, rows, list(received), list(sent))
        return came

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()

    def leave(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


ALONE = Ranks()
