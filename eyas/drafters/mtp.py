"""Multi-token prediction as a drafter (DeepSeek-V3, arXiv 2412.19437, 2.2): one more decoder layer for each token further ahead.

Module k norms and joins two inputs: the state of a position that module k - 1 made (for module 1 the target's last hidden state), and the
embedding of the token k positions after it. Through the target's own head it guesses the token k + 1 positions after. Like EAGLE it is fed
the drawn tokens and its own states, and in training each module sees what it will see in use. But every depth has a module of its own, so
parameters grow with depth, and no guess can lie deeper than there are modules.

Module d + 1 reads a node at depth d. Its rows for the last d positions of the text depend on the node's path, so they are read anew for
each node, after the rows that depend on the text alone. The network's tensors have DeepSeek's names. Knows the network, its caches and
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eyas.config import EyasError, TargetConfig
from eyas.decode.captured_modules import CapturedModules
from eyas.decode.drafter import TreeRequest
from eyas.decode.grow import Level, grow
from eyas.decode.tree import Tree
from eyas.decode.unread import ModuleRows, Unread
from eyas.files import draft_files
from eyas.kernels.attention import PassAttention
from eyas.kernels.layer import OneLayer
from eyas.kernels.linear import Dense
from eyas.model.cache import KVCache, new_cache
from eyas.model.protocols import TargetModel
from eyas.model.rows import Segment
from eyas.model.shared_weights import FrozenHead, SharedWeights
from eyas.model.transformer import Block, RMSNorm, Rotary, pack
from eyas.model.vocab import DraftVocab

SPARE = 64  # the most nodes of a level; each has its path's rows in a module's cache
CATCH_UP = 256  # rows of committed text read at once
NOT_OURS = ("embed_tokens.weight", "shared_head.head.weight")  # tensors of published files that are the target's own


class MtpModule(Block):
    """DeepSeek-V3's equations 21 to 23; its block is a Llama's."""

    def __init__(self, shape: TargetConfig) -> None:
        super().__init__(shape)
        self.enorm, self.hnorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps), RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(shape.hidden_size, shape.rms_norm_eps)})
        self.joined = Dense(self.eh_proj)


class MtpNetwork(SharedWeights, nn.Module):
    """The modules, one for each depth. `embedding` [V, H] and `head` are the target's."""

    def __init__(self, shape: TargetConfig, modules: int, embedding: Tensor, head: nn.Linear) -> None:
        super().__init__()
        self.shape, self.stack = shape, [MtpModule(shape) for _ in range(modules)]
        self.layers = nn.ModuleList(self.stack)
        self.rotary = Rotary(shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_position_embeddings)
        self.runs = [OneLayer(module, module.input_layernorm) for module in self.stack]
        self.share(embedding, head)

    @property
    def levels(self) -> int:
        return len(self.layers)

    def join(self, level: int, tokens_N: Tensor, h_NH: Tensor) -> Tensor:
        """The input [N, H] of module `level` (counted from 0), from states and the tokens that followed them."""
        module = self.stack[level]
        return module.joined(torch.cat([module.enorm(self.embed(tokens_N)), module.hnorm(h_NH.to(self.dtype))], -1))

    def step(self, level: int, tokens_N: Tensor, h_NH: Tensor, positions_N: Tensor, attention: PassAttention) -> Tensor:
        """What module `level` makes [N, H] of these."""
        return self.runs[level](self.join(level, tokens_N, h_NH), self.rotary, positions_N, attention)

    def normed(self, level: int, h_NH: Tensor) -> Tensor:
        return cast("RMSNorm", self.stack[level].shared_head["norm"])(h_NH.to(self.dtype))

    def logits_at(self, level: int, h_NH: Tensor) -> Tensor:
        """The logits [N, D] of the children of nodes at depth `level`, from states [N, H], or from the last of each [N, .., H]."""
        return self.head(self.normed(level, h_NH if h_NH.dim() == 2 else h_NH[:, -1]))

    def prepare(self, bits: int = 16) -> MtpNetwork:
        """Pack weights for inference."""
        pack(self.layers, bits)
        for run in self.runs:
            run.prepare()
        return self.packed([], bits)


class MtpDrafter:
    cache: KVCache  # of all modules, a layer each; made by `reserve`

    def __init__(self, network: MtpNetwork, vocab: DraftVocab) -> None:
        self.network, self.vocab, self.wants = network, vocab, network.wants
        self.attention = network.stack[0].self_attn
        self.group = self.attention.heads // self.attention.kv_heads  # query heads for each key head
        self.captured = CapturedModules(network, vocab, self.group)
        self.texts: dict[int, ModuleRows] = {}  # by slot

    def reserve(self, sequences: int, capacity: int) -> None:
        network, room = self.network, capacity + SPARE * self.network.levels
        if hasattr(self, "cache"):
            self.cache.release()  # what it held may serve the next one
        shape = (room, self.attention.kv_heads, self.attention.head_dim, network.dtype, network.device)
        self.cache = new_cache(network.pool, network.levels, sequences, *shape)
        self.caches = [KVCache.over(self.cache.slabs.layer(level), self.cache.capacity) for level in range(network.levels)]
        for sequence in range(sequences):
            self.forget(sequence)

    def forget(self, sequence: int) -> None:
        self.texts[sequence] = ModuleRows(self.caches, sequence, self.captured.again)

    def observe(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        self.texts[sequence].observe(tokens, cast("Tensor", features))

    def propose(self, requests: Sequence[TreeRequest]) -> list[Tree]:
        most = self.network.levels  # and module k reads nothing before k tokens are there
        requests = [replace(request, shape=request.shape.cut(min(most, request.position))) for request in requests]
        return grow(requests, self.roots, self.read_level, self.network.logits_at, self.vocab)

    def roots(self, sequences: Sequence[int]) -> Tensor:
        """What module 1 made of the last position of each sequence, [S, 1, H]."""
        self.catch_up(sequences)
        return torch.stack([self.texts[sequence].last(0) for sequence in sequences])

    def catch_up(self, sequences: Sequence[int]) -> None:
        """Let each module read the positions whose tokens and states are known by now. What it makes of them waits for the next module."""
        for level in range(self.network.levels):
            while parts := [part for part in (self.texts[sequence].take(level, CATCH_UP) for sequence in sequences) if part[0]]:
                tokens, states, segments, positions = zip(*parts, strict=True)
                made = self.read(level, list(chain(*tokens)), torch.cat(states), list(chain(*positions)), list(segments))
                for segment, rows in zip(segments, made.split([segment.count for segment in segments]), strict=True):
                    self.texts[segment.slot].made(level, rows)

    def unread(self, sequence: int, most: int) -> Unread:
        text = self.texts[sequence]
        if text.position - text.begun > most:
            self.catch_up([sequence])
        return text.unread

    def was_read(self, sequence: int, count: int) -> None:
        self.texts[sequence].was_read()

    def read_level(self, levels: list[Level]) -> Tensor:
        """What module d + 1 made of each node's path, [F, d + 1, H]: first the last position of the text that it could read, then the nodes
        of the path."""
        depth = levels[0].depths[0]
        tokens, states, positions, segments, first = [], [], [], [], []
        for level in levels:
            count, start = len(level.nodes), level.request.position - depth
            tokens += [token for node in level.nodes for token in level.growth.path(node)]
            states.append(level.parents.flatten(0, 1))
            positions += list(range(start, start + depth)) * count
            alone = torch.block_diag(*[torch.ones(depth, depth)] * count).tril().bool()
            segments.append(Segment(level.request.sequence, depth * count, alone))
            first.append(self.texts[level.request.sequence].last(depth).expand(count, 1, -1))
        made = self.read(depth, tokens, torch.cat(states), positions, segments)
        return torch.cat([torch.cat(first).to(made.dtype), made.view(-1, depth, made.shape[-1])], 1)

    def read(self, level: int, tokens: list[int], states: Tensor, positions: list[int], segments: list[Segment]) -> Tensor:
        tokens_N, positions_N = (torch.tensor(each, device=self.network.device) for each in (tokens, positions))
        return self.network.step(level, tokens_N, states, positions_N, self.caches[level].attention(segments, self.group))


drafter = MtpDrafter


# ---- files: modules are the layers behind the target's own ----


def reads(config: dict[str, Any], directory: Path) -> bool:
    return bool(config.get("num_nextn_predict_layers"))


check = draft_files.check_sizes


def config_of(network: MtpNetwork, target_layers: int) -> dict[str, Any]:
    return {**draft_files.shape_keys(network.shape), "num_hidden_layers": target_layers, "num_nextn_predict_layers": network.levels}


def named(name: str, target_layers: int) -> str:
    _, number, rest = name.split(".", 2)
    return f"model.layers.{target_layers + int(number)}.{rest}"


save = draft_files.saver("mtp", config_of, named)


def load(directory: Path, target: TargetModel) -> tuple[MtpNetwork, DraftVocab]:
    fields, found, vocab = draft_files.read(directory, target.config)
    layers, modules = fields.size("num_hidden_layers"), fields.size("num_nextn_predict_layers")
    if not 1 <= modules <= 16:
        raise EyasError(f"{fields.where}: {modules} modules are not what a multi-token draft has (1 to 16)")
    names = {f"model.layers.{layers + number}.": f"layers.{number}." for number in range(modules)}
    ours = [(name, before) for name in found for before in names if name.startswith(before) and not name.endswith(NOT_OURS)]
    tensors = {names[before] + name[len(before) :]: found[name] for name, before in ours}
    if any("kv_a_proj" in name or "experts" in name for name in tensors):
        raise EyasError(f"{directory}: its modules have latent attention or experts; only those with a Llama's layer are computed here")
    embedding = target.embedding.detach()
    with torch.device("meta"):
        network = MtpNetwork(draft_files.shape_of(fields, target.config), modules, embedding, FrozenHead.of(target, vocab))
    return draft_files.filled(network, tensors, embedding, directory, fields), vocab
