"""The target: reads flat rows of any number of sequences and yields logits and features.

One sequence, ragged trees of many sequences, a part of a prompt and self-written data are the same call. Knows rows, slots and layers;
knows nothing of drafts, trees or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import LAST_HIDDEN, EyasError, TargetConfig
from eyas.kernels.attention import NativeAttention, PassAttention
from eyas.kernels.captured import fits, fixed_pass
from eyas.kernels.layer import NativeLayer, NativeLayers
from eyas.kernels.linear import Dense
from eyas.kernels.native import threads
from eyas.model.cache import KVCache, Pool, new_cache, pool_on
from eyas.model.rows import Rows
from eyas.model.transformer import Block, RMSNorm, Rotary, pack
from eyas.model.window import WindowedCache


class Output(NamedTuple):
    logits: Tensor  # [M, V] float32 (float64 in a float64 model), for the M rows asked for
    features: Tensor | None  # [N, taps * H] inputs of the tapped layers (the residual stream), in layer order; for LAST_HIDDEN `hidden`
    hidden: Tensor  # [N, H] last hidden state after the final norm

    @property
    def tapped(self) -> Tensor:
        """The features; call it only where some were asked for."""
        assert self.features is not None
        return self.features


class Trunk(nn.Module):
    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        table_VH = torch.empty(config.vocab_size, config.hidden_size)  # a new table would be filled at random, which imports a compiler
        self.embed_tokens = nn.Embedding.from_pretrained(table_VH, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Target(nn.Module):
    """A Llama-shaped causal language model with Hugging Face's parameter names.

    `AdaptedTarget` (model/adapter.py) takes its part for other families. What both share is `TargetModel` in model/protocols.py.
    """

    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.head = Dense(self.lm_head)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.native: NativeLayers | None = None  # once prepared, where the kernel can run whole layers
        self.cuts: dict[int, Target] = {}  # what `shallow` made, by number of layers
        self.layers_stay = False  # whether `prepare` leaves the layers as they are: their weights are not all in this process
        self.pool: Pool | None = None  # once prepared on CUDA, where passes are captured

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def embedding(self) -> Tensor:
        """[V, H]"""
        return self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; gone once prepared, unless it is the embedding too."""
        return self.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V]; Llama-shaped models have none."""
        return None

    @property
    def blocks(self) -> list[Block]:
        """The layers; their loose weights are gone once prepared."""
        return cast("list[Block]", list(self.model.layers))

    @property
    def rows_stand_alone(self) -> bool:
        """Once prepared: whether the native kernel computes every product and all attention, row by row."""
        return self.native is not None and self.head.kind == "native"

    def prepare(self, bits: int = 16) -> Target:
        """Pack weights for inference; logits are float32 from here on. `bits`: 16, or 8 or 4 for weights of so few bits (the head has at
        least 8). A model that is prepared stays as it is."""
        if self.head.kind != "loose":
            return self
        if not self.layers_stay:
            pack(self.model, bits)
        if not self.layers_stay and all(NativeLayer.fits(block.self_attn, block.mlp) for block in self.blocks):
            norms = ("input_layernorm", "post_attention_layernorm")
            layers = [NativeLayer(block.self_attn, block.mlp, *(getattr(block, norm) for norm in norms)) for block in self.blocks]
            self.native = NativeLayers(layers, self.model.norm)
        self.head.pack(torch.float64 if self.dtype == torch.float64 else torch.float32, max(bits, 8))
        if not self.config.tie_word_embeddings:
            self.lm_head.register_parameter("weight", None)
        self.pool, self.cuts = pool_on(self.device), {}
        return self.eval().requires_grad_(False)

    def threads(self) -> AbstractContextManager[None]:
        return threads.lead() if self.native else nullcontext()

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Room for `slots` sequences of `capacity` rows each."""
        config, kind = self.config, (self.dtype, self.device)
        shape = (config.num_hidden_layers, slots, capacity, config.num_key_value_heads, config.head_dim)
        if config.sliding_window is not None and capacity > config.sliding_window:
            return WindowedCache(config.sliding_window, *shape, *kind)
        return new_cache(self.pool, *shape, *kind)

    def forward(self, rows: Rows, cache: KVCache, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        """One pass; its rows become tentative cache rows. `taps`: numbers of the layers whose input is wanted, or LAST_HIDDEN. `logits_of`:
        the rows whose logits are wanted (None: all)."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        if logits_of is None and fits(cache, rows.segments):
            run = partial(self.read, taps=taps, logits_of=None)
            found = fixed_pass(run, (*taps,), group, cache, rows.tokens, rows.positions, rows.segments[0])
            if found is not None:
                logits, features, hidden = found
                assert logits is not None and hidden is not None  # of what `read` gives only the features may be none
                return Output(logits, features, hidden)
        windowed = isinstance(cache, WindowedCache)
        attention = cache.attention_at(rows.segments, rows.positions, group) if windowed else cache.attention(rows.segments, group)
        rows = rows.on(self.device)
        return self.read(rows.tokens, rows.positions, attention, taps, logits_of)

    def read(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attention: PassAttention,
        taps: Sequence[int],
        logits_of: Tensor | slice | None,
    ) -> Output:
        """The pass itself, once its attention says which rows see which."""
        hidden_NH, features = self.states(tokens_N, positions_N, attention, taps)
        return self.output(hidden_NH, features, taps, logits_of)

    def states(self, tokens_N: Tensor, positions_N: Tensor, attention: PassAttention, taps: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The last hidden states [N, H] after the final norm, in float32 where the kernel computes them, and the inputs of the tapped
        layers [N, taps * H] (none for LAST_HIDDEN)."""
        x_NH = F.embedding(tokens_N, self.model.embed_tokens.weight)
        inner = () if taps == LAST_HIDDEN else taps
        if self.native and isinstance(attention, NativeAttention):
            return self.native_layers(self.native, x_NH, positions_N, attention, inner)
        return self.plain_layers(x_NH, positions_N, attention, inner)

    def output(self, hidden_NH: Tensor, features: Tensor | None, taps: Sequence[int], logits_of: Tensor | slice | None) -> Output:
        """What a pass gives, of its `states`."""
        logits_MV = self.head(hidden_NH if logits_of is None else hidden_NH[logits_of])
        wide = torch.float64 if logits_MV.dtype == torch.float64 else torch.float32
        hidden_NH = hidden_NH.to(self.dtype)
        return Output(logits_MV.to(wide), hidden_NH if taps == LAST_HIDDEN else features, hidden_NH)

    def plain_layers(
        self, x_NH: Tensor, positions_N: Tensor, attention: PassAttention, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states [N, H] after the final norm, and the inputs of the tapped layers [N, taps * H], computed by PyTorch."""
        rotation, features = self.rotary(positions_N, x_NH.dtype), []
        for index, block in enumerate(self.model.layers):
            if index in taps:
                features.append(x_NH)
            x_NH = block(x_NH, rotation, attention.layer(index))
        return self.model.norm(x_NH), torch.cat(features, -1) if features else None

    def native_layers(
        self, layers: NativeLayers, x_NH: Tensor, positions_N: Tensor, attention: NativeAttention, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """What `plain_layers` computes, in float32: all layers as one call of the kernel."""
        wide_NH = x_NH.to(torch.float32, copy=True)
        features = layers(wide_NH, self.rotary(positions_N, torch.float32), attention, taps=taps)
        return layers.normed(wide_NH), features.to(x_NH.dtype) if taps else None

    def shallow(self, layers: int) -> Target:
        """This target cut to its first `layers` layers, with which it shares weights: the cheapest draft model there is. Raises `EyasError`
        for a number of layers that is too large or not above 0."""
        if layers in self.cuts:
            return self.cuts[layers]
        if not 0 < layers < self.config.num_hidden_layers:
            most = self.config.num_hidden_layers - 1
            raise EyasError(f"the target has {most + 1} layers; a shallow draft needs 1 to {most}, not {layers}")
        cut = Target.__new__(Target)
        nn.Module.__init__(cut)
        cut.config = TargetConfig(**{**vars(self.config), "num_hidden_layers": layers})
        cut.model = Trunk.__new__(Trunk)
        nn.Module.__init__(cut.model)
        cut.model.embed_tokens, cut.model.norm = self.model.embed_tokens, self.model.norm
        cut.model.layers = self.model.layers[:layers]
        cut.lm_head, cut.head, cut.rotary = self.lm_head, self.head, self.rotary
        cut.native = NativeLayers(self.native.layers[:layers], self.model.norm) if self.native else None
        cut.pool, cut.cuts = Pool() if self.pool else None, {}
        self.cuts[layers] = cut
        return cut
