"""EAGLE-3 as a drafter: fuse the target's features, catch up on committed text, grow a dynamic tree (arXiv 2503.01840).

The draft's cache holds one row for each position: row j pairs feature f_j with token t_{j+1} at position j. The text's rows always come
from true features. A tree's rows come from the draft's own outputs, and are discarded once the tree is grown. Knows the network and
growth; knows nothing of verification.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import TargetConfig
from eyas.decode.captured_growth import CapturedGrowth
from eyas.decode.drafter import TreeRequest
from eyas.decode.fixed import grows_fixed
from eyas.decode.grow import Level, grow
from eyas.decode.score import kernel_ranks, ranking_of
from eyas.decode.tree import Tree
from eyas.decode.unread import PendingRows, Unread
from eyas.files.eagle3_files import check_fits, config_from_file, load_draft, save_draft
from eyas.kernels.attention import NativeAttention, PassAttention
from eyas.kernels.captured import fits, fixed_pass
from eyas.kernels.step import Ranked
from eyas.model.cache import KVCache, new_cache
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import EagleModule, TargetModel
from eyas.model.rows import Segment
from eyas.model.vocab import DraftVocab
from eyas.model.window import WindowedCache

CATCH_UP = 256  # rows of committed text read at once
HELD = 1024  # the most rows that wait to be read: while drafting does not pay, nobody needs them read


class Eagle3Drafter:
    """Grows trees with an EAGLE-3 draft; and with an EAGLE-1 draft, whose network has the same calls."""

    cache: KVCache  # the draft's; made by `reserve`

    def __init__(self, network: EagleModule, vocab: DraftVocab) -> None:
        self.network, self.vocab = network, vocab
        self.wants, self.attention = network.wants, network.blocks[0].self_attn
        self.group = self.attention.heads // self.attention.kv_heads  # query heads for each key head
        self.captured = CapturedGrowth(network, vocab, self.group)
        self.pending: dict[int, PendingRows] = {}  # by slot
        self.asked: dict[int, TreeRequest] = {}  # by slot, what trees are grown for
        self.ready: tuple[Tensor, Ranked] | None = None  # the outputs that were read last, and what came with them

    def reserve(self, sequences: int, capacity: int) -> None:
        shape = (capacity, self.attention.kv_heads, self.attention.head_dim, self.network.dtype, self.network.device)
        pool, layers, window = self.network.pool, len(self.network.blocks), self.network.window
        if hasattr(self, "cache"):
            self.cache.release()  # what it held may serve the next one
        if window is not None and capacity > window:
            self.cache = WindowedCache(window, layers, sequences, *shape)
        else:
            self.cache = new_cache(pool, layers, sequences, *shape)
        self.pending = {sequence: PendingRows() for sequence in range(sequences)}

    def forget(self, sequence: int) -> None:
        self.pending[sequence] = PendingRows()
        self.cache.clear(sequence)

    def share(self, source: int, sequence: int, tokens: Sequence[int]) -> int:
        rows = min(len(tokens) - 1, self.cache.lengths[source])
        if source == sequence:
            self.cache.cut(sequence, rows)
        else:
            self.cache.copy_prefix(self.cache, source, sequence, rows)
        self.pending[sequence] = PendingRows(begun=True)
        return rows

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
        self.asked = {request.sequence: request for request in requests}
        a_1H = None
        if len(requests) == 1 and self.cache.slabs.pooled and grows_fixed(requests[0], len(self.vocab)):
            a_1H = self.catch_up([requests[0].sequence])
            if (tree := self.captured.grow(requests[0], a_1H, self.cache)) is not None:
                return [tree]
        trees = grow(requests, self.catch_up if a_1H is None else lambda _: a_1H, self.read_level, self.logits, self.vocab)
        for request in requests:
            self.cache.cut(request.sequence, request.position)  # rows 0 .. P-1 hold the text; the tree's rows are dropped
        return trees

    def read_level(self, levels: list[Level]) -> Tensor:
        """The outputs a [F, H] of these nodes. Each row reads a node's token with its parent's a, and sees the text, its ancestors and
        itself; a node at depth d sits at position P - 1 + d."""
        tokens = [token for level in levels for token in level.tokens]
        positions = [level.request.position - 1 + depth for level in levels for depth in level.depths]
        segments = [Segment(level.request.sequence, len(level.tokens), level.sight) for level in levels]
        outputs, rows = levels[0].outputs, [row for level in levels for row in level.rows]
        if any(level.outputs is not outputs for level in levels):
            outputs, rows = torch.cat([level.parents for level in levels]), range(len(tokens))
        return self.guess(tokens, (self.network.fed_back(outputs), rows), positions, segments, levels[0].depths[0], range(len(tokens)))

    def logits(self, level: int, a: Tensor) -> Tensor | Ranked:
        """What follows nodes at depth `level`: where a step was one call, it came with their outputs."""
        ready, self.ready = self.ready, None
        return ready[1] if ready and ready[0] is a else self.network.logits_at(level, a)

    # ---- passes ----

    def catch_up(self, sequences: Sequence[int]) -> Tensor:
        """Read all rows of committed text that wait, from true features; returns the a [S, H] of each sequence's last row."""
        while late := [sequence for sequence in sequences if len(self.pending[sequence].tokens) > CATCH_UP]:
            self.catch_up_some(late)
        tokens, g, positions, segments = self.late_rows(sequences, CATCH_UP)
        ends = [end - 1 for end in itertools.accumulate(segment.count for segment in segments)]
        return self.guess(tokens, (g, range(len(tokens))), positions, segments, 0, ends)

    def catch_up_some(self, sequences: Sequence[int]) -> None:
        """Read up to CATCH_UP of the rows that wait, for each sequence, in one pass."""
        self.read(*self.late_rows(sequences, CATCH_UP))

    def unread(self, sequence: int, most: int) -> Unread:
        """The last rows that wait, for a caller that reads them and then says `was_read`; what is more than `most` is read here."""
        while (more := len(self.pending[sequence].tokens) - most) > 0:
            self.read(*self.late_rows([sequence], min(CATCH_UP, more)))
        return self.pending[sequence].first(most)

    def was_read(self, sequence: int, count: int) -> None:
        """The first `count` of the rows that waited stand in the cache now."""
        self.pending[sequence].take(count)
        self.cache.keep(sequence, range(count))

    def late_rows(self, sequences: Sequence[int], most: int) -> tuple[list[int], Tensor, list[int], list[Segment]]:
        """Tokens, g, positions and segments of up to `most` of the rows that wait, for each sequence; they wait no longer."""
        counts = [min(len(self.pending[sequence].tokens), most) for sequence in sequences]
        tokens, features, positions = [], [], []
        for sequence, count in zip(sequences, counts, strict=True):
            taken = self.pending[sequence].take(count)
            tokens += taken.tokens
            features.append(taken.features)
            start = self.cache.lengths[sequence]
            positions += range(start, start + count)
        whole = features[0] if len(features) == 1 else torch.cat(features)
        g = self.network.fuse(whole.to(self.network.dtype))
        return tokens, g, positions, [Segment(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]

    def guess(
        self,
        tokens: list[int],
        g: tuple[Tensor, Sequence[int]],
        positions: list[int],
        segments: list[Segment],
        depth: int,
        asked: Sequence[int],
    ) -> Tensor:
        """One pass as `read` has it, from these rows of g: a [R, H] of the rows `asked`, of nodes at this depth, which are all or one of
        each segment. Where the kernel can, what follows them comes with it, for `logits` to hand on."""
        one_call, (source, rows), every = self.network.one_call, g, len(asked) == len(tokens)
        whole = one_call is not None and not isinstance(self.cache, WindowedCache)
        attention = self.cache.attention(segments, self.group) if whole else None
        if one_call is None or not isinstance(attention, NativeAttention):
            a = self.read(tokens, source[list(rows)], positions, segments)
            return a if every else a[list(asked)]
        requests = [self.asked[segment.slot] for segment in segments]
        rankings, best = [], max([request.shape.top_k for request in requests if kernel_ranks(request)], default=1)
        for request, segment in zip(requests, segments, strict=True):
            rankings += [ranking_of(request, depth, self.vocab)] * (segment.count if every else 1)
        a, ranked = one_call(tokens, positions, (source.float().contiguous(), rows), attention, asked, rankings, best)
        for segment in segments:
            self.cache.keep(segment.slot, range(segment.count))
        a = a if every else a[list(asked)]
        self.ready = a, ranked
        return a

    def read(self, tokens: list[int], g: Tensor, positions: list[int], segments: list[Segment]) -> Tensor:
        """One pass of the draft: a [N, H] of these rows, which stay in the cache until `propose` cuts them."""
        rows = torch.tensor(tokens), torch.tensor(positions)
        cache, run = self.cache, partial(step, self.network)
        found = fixed_pass(run, (), self.group, cache, *rows, segments[0], g) if fits(cache, segments) else None
        if found is None:
            windowed = isinstance(cache, WindowedCache)
            attention = cache.attention_at(segments, rows[1], self.group) if windowed else cache.attention(segments, self.group)
            tokens_N, positions_N = (part.to(g.device) for part in rows)
            found = run(tokens_N, positions_N, attention, g)
        (a,) = found
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
