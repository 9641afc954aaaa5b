"""The types of any target and of any draft's network, as the rest of eyas uses them.

Knows calls and what they take; computes nothing. Members are read-only here, so that attributes and properties fit alike.

Axes: N rows, H model width, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from eyas.config import TargetConfig, TreeShape
from eyas.kernels.attention import Attend, PassAttention
from eyas.kernels.step import NativeStep
from eyas.model.cache import Cache, Pool
from eyas.model.rows import Rows
from eyas.model.target import Output
from eyas.model.transformer import MLP, Attention, Block, RMSNorm, Rotary

if TYPE_CHECKING:
    from typing_extensions import Self


class TargetModel(Protocol):
    """A target: `Target`, or `AdaptedTarget` for the families that transformers runs. Logits are
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
    def rows_stand_alone(self) -> bool: ...  # once prepared: whether a row's bits do not depend on the other rows of its pass
    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...  # last hidden states [N, H] -> logits [N, V]

    def prepare(self, bits: int = 16) -> TargetModel:
        """Pack weights for inference. A model that is prepared stays as it is."""
        ...

    def threads(self) -> AbstractContextManager[None]:
        """While a round or a prompt is computed: the cores belong to those threads that compute this target's passes."""
        ...

    def new_cache(self, slots: int, capacity: int) -> Cache:
        """Room for `slots` sequences of `capacity` rows each; passes of this target take no other cache."""
        ...

    def shallow(self, layers: int) -> TargetModel:
        """This target cut to its first `layers` layers. Raises `EyasError` where it cannot be cut so."""
        ...

    def __call__(self, rows: Rows, cache: Cache, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        """One pass; its rows become tentative cache rows. `taps`: numbers of the layers whose input is wanted, or LAST_HIDDEN. `logits_of`:
        the rows whose logits are wanted (None: all)."""
        ...


class DraftModule(Protocol):
    """What engine and trainer ask of any method's network, an `nn.Module`. What its drafter calls besides is up to the method."""

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
        """The logits [N, D] of the children of N nodes at depth `level`, from the network's outputs at these nodes."""
        ...

    def prepare(self, bits: int = 16) -> Self:
        """Pack weights for inference: 16 bits as they are, or rounded to 8."""
        ...

    # what every nn.Module has

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...


class StaticDraft(Protocol):
    """A draft whose tree has a shape fixed before anything is guessed."""

    def static_tree(self, nodes: int | None = None) -> TreeShape: ...


class DraftLayer(Protocol):
    """A decoder layer of a draft. How its attention's input is made differs from draft to draft."""

    @property
    def self_attn(self) -> Attention: ...
    @property
    def post_attention_layernorm(self) -> RMSNorm: ...
    @property
    def mlp(self) -> MLP: ...


class DecoderLayer(DraftLayer, Protocol):
    """A decoder layer that reads one input and adds to it, as a Llama's does."""

    def __call__(self, x_NH: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, /) -> Tensor: ...


class EagleModule(DraftModule, Protocol):
    """A network that guesses on from its own output: EAGLE-1's and EAGLE-3's. g is what it reads in a feature's place."""

    @property
    def blocks(self) -> Sequence[DraftLayer]: ...  # the first reads what `join` gives, each other one its predecessor's output
    @property
    def rotary(self) -> Rotary: ...
    @property
    def pool(self) -> Pool | None: ...  # once prepared on CUDA, where steps are captured
    @property
    def window(self) -> int | None: ...  # how many positions a row sees, itself included; None: all
    @property
    def one_call(self) -> NativeStep | None: ...  # a whole step, head included, where the kernel can run it

    def fuse(self, features: Tensor, /) -> Tensor:
        """g [N, H] from the target's features [N, taps * H]."""
        ...

    def join(self, tokens_N: Tensor, g_NH: Tensor, /) -> tuple[Tensor, Tensor]:
        """The input of the first layer's attention, from tokens and g; and the residual [N, H] that its output is added to."""
        ...

    def step(self, tokens_N: Tensor, g_NH: Tensor, positions_N: Tensor, attention: PassAttention, /) -> Tensor:
        """a [N, H], the network's output for g and the tokens that followed."""
        ...

    def fed_back(self, a_NH: Tensor, /) -> Tensor:
        """What the next step reads in place of g, from a [N, H]."""
        ...
