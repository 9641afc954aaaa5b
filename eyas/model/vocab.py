"""The draft's vocabulary: the few target tokens that it can guess. Only this module knows that files store it as offsets (`d2t`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eyas.config import EyasError


class DraftVocab:
    """Ascending target ids, one for each draft id."""

    def __init__(self, target_ids: Sequence[int] | Tensor, vocab_size: int) -> None:
        self.ids = torch.as_tensor(target_ids, dtype=torch.int64)  # [D]
        self.vocab_size = vocab_size
        self._copies: dict[torch.device, Tensor] = {}
        self._columns: Tensor | None = None
        self._column_list: list[int] | None = None
        self._id_list: list[int] | None = None
        if len(self.ids) == 0 or not bool((self.ids[1:] > self.ids[:-1]).all()) or self.ids[0] < 0 or self.ids[-1] >= vocab_size:
            raise EyasError(
                f"a draft vocabulary must be ascending target ids below {vocab_size}; this one is not (is d2t an offset table?)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        return self.on(draft_ids.device)[draft_ids]

    def on(self, device: torch.device) -> Tensor:
        """`ids` on this device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.ids.to(device)
        return self._copies[device]

    def columns(self) -> Tensor:
        """The draft's id of each target token, int64 [V]; -1 where it has none."""
        if self._columns is None:
            self._columns = torch.full((self.vocab_size,), -1).index_copy_(0, self.ids, torch.arange(len(self.ids)))
        return self._columns

    def column_list(self) -> list[int]:
        """`columns` as a list, which is quicker to ask for single tokens."""
        if self._column_list is None:
            self._column_list = self.columns().tolist()
        return self._column_list

    def id_list(self) -> list[int]:
        """`ids` as a list."""
        if self._id_list is None:
            self._id_list = self.ids.tolist()
        return self._id_list

    def member(self) -> Tensor:
        """bool [V]; in files `t2d`."""
        return torch.zeros(self.vocab_size, dtype=torch.bool).index_fill_(0, self.ids, True)

    def as_tensors(self) -> dict[str, Tensor]:
        """`d2t` [D] (target id minus draft id) and `t2d` [V], as engines read them."""
        return {"d2t": self.ids - torch.arange(len(self.ids)), "t2d": self.member()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], vocab_size: int) -> DraftVocab:
        """Read `d2t` (and check it against `t2d`, where there is one)."""
        offsets = tensors["d2t"].to(torch.int64)
        vocab = cls(offsets + torch.arange(len(offsets)), vocab_size)
        if "t2d" in tensors and not torch.equal(tensors["t2d"].bool(), vocab.member()):
            raise EyasError("d2t and t2d of this draft name different tokens; the file is damaged or was converted wrongly")
        return vocab
