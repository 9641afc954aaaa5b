"""EAGLE-3 as a drafter: fuse the target's features, catch up on committed text, grow a dynamic tree (arXiv 2503.01840).

The draft's cache holds one row for each position: row j pairs feature f_j with token t_{j+1} at position j. The text's rows always come
from true features. A tree's rows come from the draft's own outputs, and are discarded once the tree is grown. Knows the network and
growth; knows nothing of verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import TargetConfig
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import Level, grow
from eyas.decode.tree import Tree
from eyas.files.eagle3_files import check_fits, config_from_file, load_draft, save_draft
from eyas.kernels.attention import PassAttention
from eyas.kernels.captured import fits, fixed_pass
from eyas.model.cache import KVCache
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import EagleModule, TargetModel
from eyas.model.rows import Segment
from eyas.model.vocab import DraftVocab
from eyas.model.window import WindowedCache

CATCH_UP = 256  # rows of committed text read at once
HELD = 1024  # the most rows that wait to be read: while drafting does not pay, nobody needs them read


@dataclass
class PendingRows:
    """Committed text that the draft has not read yet."""

    tokens: list[int] = field(default_factory=list)  # t_{j+1} of these rows
    features: list[Tensor] = field(default_factory=list)  # f_j of these rows, in pieces as they came
    begun: bool = False  # whether `observe` was called: the very first token has no row


class Eagle3Drafter:
    """Grows trees with an EAGLE-3 draft; and with an EAGLE-1 draft, whose network has the same calls."""

    cache: KVCache  # the draft's; made by `reserve`

    def __init__(self, network: EagleModule, vocab: DraftVocab) -> None:
        self.network, self.vocab = network, vocab
        self.wants, self.attention = network.wants, network.blocks[0].self_attn
        self.group = self.attention.heads // self.attention.kv_heads  # query heads for each key head
        self.pending: dict[int, PendingRows] = {}  # by slot

    def reserve(self, sequences: int, capacity: int) -> None:
        shape = (capacity, self.attention.kv_heads, self.attention.head_dim, self.network.dtype, self.network.device)
        pool, layers, window = self.network.pool, len(self.network.blocks), self.network.window
        if hasattr(self, "cache"):
            self.cache.release()  # what it held may serve the next one
        if window is not None and capacity > window:
            self.cache = WindowedCache(window, layers, sequences, *shape)
        else:
            self.cache = pool.cache(layers, *shape) if pool and sequences == 1 else KVCache(layers, sequences, *shape)
        self.pending = {sequence: PendingRows() for sequence in range(sequences)}

    def forget(self, sequence: int) -> None:
        self.pending[sequence] = PendingRows()
        self.cache.clear(sequence)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        pending = self.pending[sequence]
        pending.tokens += tokens if pending.begun else tokens[1:]  # row j pairs f_j with t_{j+1}: t_0 has no row
        pending.begun = True
        assert features is not None, "what it wants it is given"
        pending.features.append(features)
        most = CATCH_UP if len(tokens) >= CATCH_UP else HELD  # a long prompt is read as it comes, part by part
        while len(pending.tokens) > most:
            self.catch_up_some([sequence])

    # ---- growth: step 1 reads g and the drawn token; step 2 and on read a, in place of the g that does not exist yet ----

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        trees = grow(requests, self.catch_up, self.read_level, self.network.logits_at, self.vocab)
        for request in requests:
            self.cache.cut(request.sequence, request.position)  # rows 0 .. P-1 hold the text; the tree's rows are dropped
        return trees

    def read_level(self, levels: list[Level]) -> Tensor:
        """The outputs a [F, H] of these nodes. Each row reads a node's token with its parent's a, and sees the text, its ancestors and
        itself; a node at depth d sits at position P - 1 + d."""
        tokens = [token for level in levels for token in level.tokens]
        positions = [level.request.position - 1 + depth for level in levels for depth in level.depths]
        stand_in = self.network.fed_back(torch.cat([level.parents for level in levels]))
        return self.read(tokens, stand_in, positions, [Segment(level.request.sequence, len(level.tokens), level.sight) for level in levels])

    # ---- passes ----

    def catch_up(self, sequences: Sequence[int]) -> Tensor:
        """Read all rows of committed text that wait, from true features; returns the a [S, H] of each sequence's last row."""
        while late := [sequence for sequence in sequences if len(self.pending[sequence].tokens) > CATCH_UP]:
            self.catch_up_some(late)
        return self.catch_up_some(sequences)

    def catch_up_some(self, sequences: Sequence[int]) -> Tensor:
        """Read up to CATCH_UP of the rows that wait, for each sequence, in one pass; returns the a [S, H] of the last row read of each."""
        counts = [min(len(self.pending[sequence].tokens), CATCH_UP) for sequence in sequences]
        tokens, features, positions = [], [], []
        for sequence, count in zip(sequences, counts, strict=True):
            pending = self.pending[sequence]
            tokens += pending.tokens[:count]
            held = torch.cat(pending.features)
            features.append(held[:count])
            pending.tokens, pending.features = pending.tokens[count:], [held[count:]]
            start = self.cache.lengths[sequence]
            positions += range(start, start + count)
        g = self.network.fuse(torch.cat(features).to(self.network.dtype))
        a = self.read(tokens, g, positions, [Segment(sequence, count) for sequence, count in zip(sequences, counts, strict=True)])
        return a[torch.tensor(counts).cumsum(0) - 1]

    def read(self, tokens: list[int], g: Tensor, positions: list[int], segments: list[Segment]) -> Tensor:
        """One pass of the draft: a [N, H] of these rows, which stay in the cache until `propose` cuts them."""
        rows = torch.tensor(tokens), torch.tensor(positions)
        if fits(self.cache, segments):
            (a,) = fixed_pass(partial(step, self.network), (), self.group, self.cache, *rows, segments[0], g)
            assert a is not None
        else:
            cache, placed = self.cache, (segments, rows[1], self.group)
            attention = cache.attention_at(*placed) if isinstance(cache, WindowedCache) else cache.attention(segments, self.group)
            tokens_N, positions_N = (part.to(g.device) for part in rows)
            (a,) = step(self.network, tokens_N, positions_N, attention, g)
        for segment in segments:
            self.cache.keep(segment.slot, range(segment.count))
        assert a is not None
        return a


def step(network: EagleModule, tokens: Tensor, positions: Tensor, attention: PassAttention, g: Tensor) -> tuple[Tensor]:
    return (network.step(tokens, g, positions, attention),)


# ---- what the engine and the trainer ask of a method's module ----

drafter, save = Eagle3Drafter, save_draft


def reads(config: dict[str, Any], directory: Path) -> bool:
    """Whether a directory with this config.json holds an EAGLE-3 draft."""
    return "draft_vocab_size" in config and "eyas" in config


def check(directory: Path, target: TargetConfig) -> None:
    """Refuse a draft for another target before the target's weights are read."""
    check_fits(config_from_file(directory), target)


def load(directory: Path, target: TargetModel) -> tuple[DraftNetwork, DraftVocab]:
    """The network and vocabulary of a saved draft. The target must not be prepared yet: its embedding is read."""
    embedding = target.embedding.detach()
    return load_draft(directory, embedding, embedding.dtype)
