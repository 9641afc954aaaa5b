"""Committed text that a draft has not read yet, in rows: row j pairs the feature f_j with the token t_{j+1}.

Knows tokens and features; knows nothing of caches or networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Unread(NamedTuple):
    """Rows for somebody who reads them now; where they are the text's last, the last token is the root."""

    tokens: list[int]
    features: Tensor  # [rows, F]


@dataclass
class PendingRows:
    """Rows that wait."""

    tokens: list[int] = field(default_factory=list)  # t_{j+1} of these rows
    features: list[Tensor] = field(default_factory=list)  # f_j of these rows, in pieces as they came
    begun: bool = False  # whether `observe` was called: the very first token has no row

    def first(self, count: int) -> Unread:
        """The first `count` rows; they go on waiting."""
        if len(self.features) > 1:
            self.features = [torch.cat(self.features)]
        return Unread(self.tokens[:count], self.features[0][:count])

    def take(self, count: int) -> Unread:
        """The first `count` rows, which wait no longer."""
        taken, held = self.first(count), self.features[0]
        self.tokens, self.features = self.tokens[count:], [held[count:]] if len(held) > count else []
        return taken
