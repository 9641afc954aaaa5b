"""What the rest of eyas asks of a target and of a draft's network, whoever computes it: types alone.

Knows calls and what they take; computes nothing. Members are read-only here, so that attributes and properties fit alike.

Axes: N rows, H model width, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from eyas.config import TargetConfig, TreeShape
from eyas.kernels.attention import Attend, PassAttention
from eyas.model.cache import Cache, Pool
from eyas.model.rows import Rows
from eyas.model.target import Output
from eyas.model.transformer import MLP, Attention, Block, RMSNorm, Rotary

if TYPE_CHECKING:
    from typing_extensions import Self


class TargetModel(Protocol):
    """`Target`, and `AdaptedTarget` for the families that transformers runs. Logits are
    softcap * tanh(scale * (hidden @ head_weight.T + head_bias) / softcap), without the softcap where it is None."""

    @property
    def config(self) -> TargetConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def embedding(self) -> Tensor: ...  # [V, H]
    @property
    def head_weight(self) -> Tensor: ...  # [V, H]; gone once prepared
    @property
    def head_bias(self) -> Tensor | None: ...  # [V]
    @property
    def logit_scale(self) -> float: ...
    @property
    def logit_softcap(self) -> float | None: ...
    @property
    def blocks(self) -> list[Block] | None: ...  # None: its layers are not our blocks
    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...  # last hidden states [N, H] -> logits [N, V]

    def prepare(self, bits: int = 16) -> TargetModel:
        """Pack weights for inference. Call once, after loading."""
        ...

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """Room for `slots` sequences of `capacity` rows each; passes of this target take no other cache."""
        ...

    def shallow(self, layers: int) -> TargetModel:
        """The same model cut to its first layers."""
        ...

    def __call__(self, rows: Rows, cache: Cache, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        """One pass; its rows become tentative cache rows. `taps`: layers whose input is wanted, or LAST_HIDDEN. `logits_of`: rows to
        score (all)."""
        ...


class DraftModule(Protocol):
    """What engine and trainer ask of any method's network, an `nn.Module`; what its drafter asks besides is between the two."""

    @property
    def wants(self) -> tuple[int, ...]: ...  # target layers whose input it reads, or LAST_HIDDEN
    @property
    def levels(self) -> int | None: ...  # how deep it can guess; None: as deep as is asked for
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def embedding(self) -> list[Tensor]: ...  # the target's [V, H]; in a list, since it is not the network's own

    def logits_at(self, level: int, a_NH: Tensor, /) -> Tensor:
        """[N, D] of what lies one deeper than nodes at depth `level`, from what the network made of those."""
        ...

    def prepare(self, bits: int = 16) -> Self:
        """Pack weights for inference, as 8-bit ones where asked for."""
        ...

    # what every nn.Module has

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...


class StaticDraft(Protocol):
    """A draft whose tree is of a shape of its own, fixed before anything is guessed."""

    def static_tree(self, nodes: int | None = None) -> TreeShape: ...


class DraftLayer(Protocol):
    """A decoder layer of a draft: what stands before its attention is its own."""

    @property
    def self_attn(self) -> Attention: ...
    @property
    def post_attention_layernorm(self) -> RMSNorm: ...
    @property
    def mlp(self) -> MLP: ...


class DecoderLayer(DraftLayer, Protocol):
    """One that reads what it adds to, as a Llama's does."""

    def __call__(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, /) -> Tensor: ...


class EagleModule(DraftModule, Protocol):
    """A network that guesses on from its own output: EAGLE-1's and EAGLE-3's. g: what it reads in a feature's place."""

    @property
    def blocks(self) -> Sequence[DraftLayer]: ...  # the first reads what `join` gives, each other what the one before made
    @property
    def rotary(self) -> Rotary: ...
    @property
    def pool(self) -> Pool | None: ...  # once prepared on CUDA, where steps are captured

    def fuse(self, features: Tensor, /) -> Tensor:
        """g [N, H] of the target's features."""
        ...

    def join(self, tokens_N: Tensor, g_NH: Tensor, /) -> tuple[Tensor, Tensor]:
        """What attention reads of tokens and features, and what it is added to."""
        ...

    def step(self, tokens_N: Tensor, g_NH: Tensor, positions_N: Tensor, attention: PassAttention, /) -> Tensor:
        """a [N, H]: what it makes of g and the tokens that followed."""
        ...

    def fed_back(self, a_NH: Tensor, /) -> Tensor:
        """What stands in for g at the next step."""
        ...
