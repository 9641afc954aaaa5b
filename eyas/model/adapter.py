"""Any Hugging Face causal language model as a target: its own forward over flat rows, with attention over our cache.

All rows of a pass go through the model as one batch of size 1, each with its own position. The model's mask function (causal, sliding
window, chunks) is evaluated on the *positions* of rows, and a tree's mask is added to it. This is slower than `model/target.py`, which is
ours from the embedding to the head. It is right for every family whose attention goes through transformers' two interfaces, the attention
function and the mask that layers are handed: loading ends with a comparison against the model's own forward. `files/adaptable.py` refuses
beforehand what cannot work. Knows these two interfaces; knows no model family, no trees and no sampling.

Axes: N rows, H model width, q/k heads, d head width, n rows of one segment, t keys, V vocabulary.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eyas.config import LAST_HIDDEN, EyasError, TargetConfig
from eyas.kernels.linear import Dense
from eyas.model.cache import Cache
from eyas.model.mask import ancestor_mask, behind_prefix, causal_mask
from eyas.model.rows import Rows, Segment, chain_rows
from eyas.model.target import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "eyas"  # the name of our attention among transformers' implementations
# Arguments of an attention function that change nothing here: the mask function holds the window, and nothing is packed or returned.
IGNORED = {"sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "return_dict", "past_key_values"}
IGNORED |= {"output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings"}


# ---- attention over the cache ----


class Distribution(NamedTuple):
    """How a layer makes shares of its scores."""

    scaling: float
    softcap: float | None = None  # scores are capped (Gemma 2)
    sinks_q: Tensor | None = None  # [q] the score of a sink that takes probability and is no key (GPT-OSS)


class LayeredCache(Cache):
    """A cache whose layers each have their own number and width of heads, and which holds the position of every row. A layer's tensors are
    made when it first writes."""

    def __init__(self, layers: int, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys: list[Tensor | None] = [None] * layers  # [slots, kv heads, capacity, d]
        self.values: list[Tensor | None] = [None] * layers
        self.positions = torch.zeros(slots, capacity, dtype=torch.int64, device=device)
        self.lengths = [0] * slots
        self.capacity, self.dtype, self.device = capacity, dtype, device

    def reading(self, rows: Rows, taps: Sequence[int]) -> Pass:
        """A pass over this cache, for transformers to run."""
        return LayeredPass(rows, self, taps)

    def place(self, slot: int, positions_n: Tensor) -> Tensor:
        """Note the positions of n tentative rows; returns the positions [length + n] of all rows that the slot then holds."""
        start = self.lengths[slot]
        end = start + len(positions_n)
        assert end <= self.capacity, f"slot {slot} holds {self.capacity} rows, {end} wanted"
        self.positions[slot, start:end] = positions_n
        return self.positions[slot, :end]

    def write(self, layer: int, slot: int, k_nhd: Tensor, v_nhd: Tensor) -> tuple[Tensor, Tensor]:
        start = self.lengths[slot]
        end, held = start + k_nhd.shape[0], []
        for slabs, rows_nhd in ((self.keys, k_nhd), (self.values, v_nhd)):
            slab = slabs[layer]
            if slab is None:
                slab = slabs[layer] = self.slab(rows_nhd.shape[1], rows_nhd.shape[2])
            slab[slot, :, start:end] = rows_nhd.transpose(0, 1)
            held.append(slab[slot, :, :end])
        return held[0], held[1]

    def slab(self, heads: int, width: int) -> Tensor:
        with torch.inference_mode(False):  # made inside a pass, it may be written to outside one
            return torch.zeros(self.slots, heads, self.capacity, width, dtype=self.dtype, device=self.device)

    def keep(self, slot: int, rows: Sequence[int]) -> None:
        start, count = self.lengths[slot], len(rows)
        if list(rows) != list(range(count)):
            source = torch.tensor(rows, device=self.device) + start
            self.positions[slot, start : start + count] = self.positions[slot, source]
            for slab in (*self.keys, *self.values):
                if slab is not None:
                    slab[slot, :, start : start + count] = slab[slot].index_select(1, source)
        self.lengths[slot] = start + count

    def copy_prefix(self, other: LayeredCache, source: int, slot: int, length: int) -> None:
        self.positions[slot, :length] = other.positions[source, :length]
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            for layer, slab in enumerate(others):
                if slab is not None:
                    held = own[layer]
                    if held is None:
                        held = own[layer] = self.slab(slab.shape[1], slab.shape[3])
                    held[slot, :, :length] = slab[source, :, :length]
        self.lengths[slot] = length


class Pass(ABC):
    """One pass while transformers runs it: which rows belong to which sequence, their positions, and the features that are tapped. What a
    cache holds of the keys, and where, its own passes know."""

    def __init__(self, rows: Rows, taps: Sequence[int]) -> None:
        self.taps = set(taps)
        self.features: list[Tensor] = []  # [N, H] each
        self.read: set[int] = set()  # layers that have attended
        # one number more than there are segments: the last one is where the last segment ends
        starts = itertools.accumulate((segment.count for segment in rows.segments), initial=0)
        self.parts = [(segment, slice(start, start + segment.count)) for start, segment in zip(starts, rows.segments, strict=False)]
        self.q_positions = [rows.positions[part] for _, part in self.parts]

    def sight(self, allowed: Callable[..., Tensor]) -> Sight:
        """Which rows see which, where transformers' mask function (batch, head, query's index, key's index -> bool) allows it and the
        tree's mask does. Raises `EyasError` for a model whose rows see later ones."""
        zero = torch.zeros((), dtype=torch.int64, device=self.q_positions[0].device)
        if bool(allowed(zero, zero, zero, zero + 1)):
            raise EyasError("this model's rows see later ones, as an encoder's do; choose a causal model")
        return Sight(self, self.masks(lambda q_n, k_t: allowed(zero, zero, q_n[:, None], k_t[None])))

    @abstractmethod
    def masks(self, allowed: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
        """For each segment what its rows see, as `attend` will read it. `allowed`: which of these positions [n] may see which [t], by
        transformers' rule, bool [n, t]."""

    def attend_once(self, layer: int, *given: Any) -> Tensor:
        """`attend`. Raises `EyasError` for a layer that has attended in this pass."""
        if layer in self.read:
            raise EyasError("this model runs one layer several times a pass, and eyas keeps one set of keys for each; choose another")
        self.read.add(layer)
        return self.attend(layer, *given)

    @abstractmethod
    def attend(self, layer: int, q_qNd: Tensor, k_kNd: Tensor, v_kNd: Tensor, masks: list[Any], how: Distribution) -> Tensor:
        """The attention [N, q, d] of one layer: each segment's rows over the rows of its slot, the segment's own included."""


class LayeredPass(Pass):
    """A pass over a `LayeredCache`. A segment's mask is bool [n, t] over its slot's rows, or None where its rows see all of them."""

    def __init__(self, rows: Rows, cache: LayeredCache, taps: Sequence[int]) -> None:
        super().__init__(rows, taps)
        self.cache = cache
        self.k_positions = [cache.place(segment.slot, rows.positions[part]) for segment, part in self.parts]

    def masks(self, allowed: Callable[[Tensor, Tensor], Tensor]) -> list[Any]:
        masks: list[Tensor | None] = []
        for (segment, _), q_n, k_t in zip(self.parts, self.q_positions, self.k_positions, strict=True):
            among = causal_mask(segment.count) if segment.mask is None else segment.mask
            seen_nt = behind_prefix(among.cpu(), len(k_t) - among.shape[1]).to(self.cache.device) & allowed(q_n, k_t)
            masks.append(None if bool(seen_nt.all()) else seen_nt)
        return masks

    def attend(self, layer: int, q_qNd: Tensor, k_kNd: Tensor, v_kNd: Tensor, masks: list[Any], how: Distribution) -> Tensor:
        out = q_qNd.new_empty(q_qNd.shape[1], q_qNd.shape[0], v_kNd.shape[2])
        for (segment, part), seen_nt in zip(self.parts, masks, strict=True):
            keys, values = self.cache.write(layer, segment.slot, k_kNd[:, part].transpose(0, 1), v_kNd[:, part].transpose(0, 1))
            out[part] = masked_attention(q_qNd[:, part], keys, values, seen_nt, how).transpose(0, 1)
        return out


class Sight:
    """What layers are handed as their mask. They pass it on as it is, and `attention` reads it."""

    def __init__(self, of: Pass, masks: list[Any]) -> None:
        self.of, self.masks = of, masks

    def __getitem__(self, parts: tuple[slice, ...]) -> Sight:
        """Layers may slice their mask; only the whole of it can be had (and Gemma 4 asks for no less)."""
        assert all(part in (slice(None), slice(0, None)) for part in parts), "eyas's mask cannot be cut"
        return self


RUNNING: ContextVar[Pass | None] = ContextVar("the pass that transformers is running", default=None)


def masked_attention(q_qnd: Tensor, k_ktd: Tensor, v_ktd: Tensor, seen_nt: Tensor | None, how: Distribution) -> Tensor:
    """Attention of n rows over t keys, [q, n, d]."""
    heads, n, _ = q_qnd.shape
    if how.softcap is None and how.sinks_q is None:
        q, k, v = by_group(q_qnd, k_ktd, v_ktd)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_nt, scale=how.scaling).reshape(heads, n, -1)
    scores, v = scores_of(q_qnd, k_ktd, v_ktd, seen_nt, how)
    if how.sinks_q is not None:
        scores = torch.cat([scores, how.sinks_q.to(scores.dtype).view(*scores.shape[:2], 1, 1).expand(-1, -1, n, 1)], -1)
    return (scores.softmax(-1)[..., : k_ktd.shape[1]].to(v.dtype) @ v).reshape(heads, n, -1)


def masked_state(q_qnd: Tensor, k_ktd: Tensor, v_ktd: Tensor, seen_nt: Tensor, how: Distribution) -> tuple[Tensor, Tensor]:
    """What `masked_attention` over some of the keys leaves, in float32 or wider: its output [q, n, d], and the log-sum-exps [q, n] of its
    scores; 0 and -inf for a row that sees none. A sink is no key, so it is not in it."""
    heads, n, _ = q_qnd.shape
    scores, v = scores_of(q_qnd, k_ktd, v_ktd, seen_nt, how)
    lse = scores.logsumexp(-1)
    shares = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (shares @ v.to(shares.dtype)).reshape(heads, n, -1), lse.reshape(heads, n)


def by_group(q_qnd: Tensor, k_ktd: Tensor, v_ktd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [key heads, heads of a group, n, d], keys and values [key heads, heads of a group, t, d]: a group shares one key head."""
    q = q_qnd.reshape(k_ktd.shape[0], -1, *q_qnd.shape[1:])
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k_ktd, v_ktd))
    return q, k, v


def scores_of(q_qnd: Tensor, k_ktd: Tensor, v_ktd: Tensor, seen_nt: Tensor | None, how: Distribution) -> tuple[Tensor, Tensor]:
    """Scores [key heads, heads of a group, n, t] in float32 or wider, -inf where a row does not see a key; and the values beside them."""
    q, k, v = by_group(q_qnd, k_ktd, v_ktd)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * how.scaling
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    return scores if seen_nt is None else scores.masked_fill(~seen_nt, float("-inf")), v


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function, heads [1, heads, N, d] -> [1, N, heads, d]; its signature is theirs."""
    if not isinstance(attention_mask, Sight):
        raise EyasError("this model's layers make a mask of their own, so no tree mask can be handed in; choose another")
    if unknown := sorted(name for name, given in others.items() if given is not None and name not in IGNORED):
        raise EyasError(f"this model's attention takes {', '.join(unknown)}, which eyas does not compute; choose another")
    how = Distribution(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    layer = module.layer_idx
    assert isinstance(layer, int), "transformers numbers the layers that attend"
    return attention_mask.of.attend_once(layer, query[0], key[0], value[0], attention_mask.masks, how)[None], None


def mask(mask_function: Callable[..., Tensor], **others: Any) -> Sight:
    """transformers' mask interface: returns the pass's `Sight` instead of a tensor."""
    running = RUNNING.get()
    assert running is not None, "eyas's attention works inside AdaptedTarget.forward only"
    return running.sight(mask_function)


# ---- the target ----


class AdaptedTarget(nn.Module):
    """A Hugging Face causal language model as a `TargetModel`."""

    def __init__(self, network: PreTrainedModel, config: TargetConfig) -> None:
        """`network` was loaded with attention implementation `NAME`; `config` is its `adapted_config`."""
        super().__init__()
        self.config, self.network = config, network
        theirs = network.config.get_text_config()
        parts = network.children() if theirs is network.config else [network.get_decoder()]  # beside an image's layers are the text's
        trunk = next((part for part in parts if decoder_layers(part, config.num_hidden_layers)), None)
        layers = None if trunk is None else decoder_layers(trunk, config.num_hidden_layers)
        lm_head = network.get_output_embeddings()
        table, width = self.embedding, config.hidden_size
        if trunk is None or layers is None or not isinstance(lm_head, nn.Linear):
            raise EyasError("this model is not a stack of decoder layers with a linear head on top; choose another")
        if not table.shape == lm_head.weight.shape == (config.vocab_size, width):
            shapes = f"{tuple(table.shape)} and {tuple(lm_head.weight.shape)}"
            raise EyasError(f"its embedding and head are {shapes}, not {(config.vocab_size, width)}, so no draft can share them")
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(tap(index), with_kwargs=True)
        self.trunk, self.lm_head, self.product = trunk, lm_head, Dense(lm_head)
        self.logit_scale = float(getattr(theirs, "logit_scale", None) or 1.0) / float(getattr(theirs, "logits_scaling", None) or 1.0)
        self.logit_softcap: float | None = getattr(theirs, "final_logit_softcapping", None)

    def drop_what_reads_no_text(self) -> None:
        """Forget the parts that read images or sound, which a text never runs."""
        if self.network.config.get_text_config() is self.network.config:
            return
        kept = {id(part) for part in (self.trunk, self.lm_head, self.network.get_input_embeddings())}
        for parent in (self.network, self.network.base_model):
            for name, child in list(parent.named_children()):
                if not kept & {id(part) for part in child.modules()}:
                    setattr(parent, name, None)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """[V, H], as stored. A family that scales its embeddings (Gemma) does so after looking them up."""
        table = self.network.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        return table

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; gone once prepared."""
        return self.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V] where the head has one (Phi-2)."""
        return self.lm_head.bias

    @property
    def blocks(self) -> None:
        """None: its layers are transformers', not ours."""
        return None

    @property
    def rows_stand_alone(self) -> bool:
        """False: transformers' products and norms sum in an order that depends on the number of rows."""
        return False

    def prepare(self, bits: int = 16) -> AdaptedTarget:
        """Pack the head; logits are float32 from here on, whatever the weights are. A model that is prepared stays as it is. `bits` must
        be 16, since the layers stay as transformers made them."""
        if self.product.kind != "loose":
            return self
        assert bits == 16, "a target of transformers' has no weights of fewer bits"
        self.product.pack(torch.float64 if self.dtype == torch.float64 else torch.float32)
        if self.lm_head.weight is not self.embedding:
            self.lm_head.register_parameter("weight", None)
        return self.eval().requires_grad_(False)

    def threads(self) -> AbstractContextManager[None]:
        return nullcontext()  # PyTorch's own compute it

    def new_cache(self, slots: int, capacity: int) -> LayeredCache:
        """Room for `slots` sequences of `capacity` rows each."""
        return LayeredCache(self.config.num_hidden_layers, slots, capacity, self.dtype, self.device)

    def head(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states."""
        logits_NV = self.product(hidden_NH)
        if self.logit_scale != 1.0:
            logits_NV = logits_NV * self.logit_scale
        return logits_NV if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits_NV / self.logit_softcap)

    def forward(self, rows: Rows, cache: LayeredCache, taps: Sequence[int] = (), logits_of: Tensor | slice | None = None) -> Output:
        """One pass; its rows become tentative cache rows. `taps`: numbers of the layers whose input is wanted, or LAST_HIDDEN. `logits_of`:
        the rows whose logits are wanted (None: all)."""
        rows = rows.on(self.device)
        running = cache.reading(rows, taps)
        outer = RUNNING.set(running)
        try:
            out = self.trunk(
                input_ids=rows.tokens[None],
                position_ids=rows.positions[None],
                attention_mask=torch.ones_like(rows.tokens)[None],  # without it transformers would guess sequences from positions
                use_cache=False,
                return_dict=True,
            )
        finally:
            RUNNING.reset(outer)
        hidden_NH = out.last_hidden_state[0]
        logits_MV = self.head(hidden_NH if logits_of is None else hidden_NH[logits_of])
        features = torch.cat(running.features, -1) if running.features else hidden_NH if taps == LAST_HIDDEN else None
        return Output(logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)), features, hidden_NH)

    def shallow(self, layers: int) -> AdaptedTarget:
        kind = self.network.config.model_type
        raise EyasError(f"a {kind!r} target cannot be cut to its first layers; name a smaller model with --draft-model")


def decoder_layers(trunk: nn.Module, count: int) -> nn.ModuleList | None:
    """The outermost list of `count` modules in a model: its decoder layers. None: there is no such list."""
    return next((part for part in trunk.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)


def tap(index: int) -> Callable[..., None]:
    """A hook that keeps the input of layer `index` where the pass under way taps it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = RUNNING.get()
        if running is not None and index in running.taps:
            x_1NH = args[0] if args else kwargs["hidden_states"]
            if x_1NH.dim() != 3:
                raise EyasError("this model's layers pass on several streams side by side, not one that a draft can read; choose another")
            running.features.append(x_1NH[0].clone())  # some layers add to their input in place

    return hook


# ---- loading ----


@torch.no_grad()
def compare(target: AdaptedTarget) -> None:
    """Raise `EyasError` unless a few rows, read as a text and then as a tree, have the logits and features of transformers' own forward.

    So a family that nobody has tried is tried here. A model whose layers mix rows in another way than by attention, or that scales its
    logits, would otherwise run and be wrong.
    """
    network, layers, vocab = target.network, target.config.num_hidden_layers, target.config.vocab_size
    # text 0 1 2 3, then the tree: 4 with children 5, 7, 9, which have 6, 8, 10
    tokens = [(11 + 7919 * i) % vocab for i in range(11)]
    chains = [[0, 1, 2, 3, 4, child, child + 1] for child in (5, 7, 9)]
    cache, every = target.new_cache(1, len(tokens)), range(layers)
    read = [target(chain_rows(0, tokens[:4], 0), cache, every)]
    cache.keep(0, range(4))
    tree = [Segment(0, 7, ancestor_mask([-1, 0, 1, 0, 3, 0, 5]))]
    positions = torch.tensor([4, 5, 6, 5, 6, 5, 6])
    read.append(target(Rows(torch.tensor(tokens[4:]), positions, tree), cache, every))
    ids = torch.tensor([[tokens[i] for i in chain] for chain in chains], device=target.device)
    network.set_attn_implementation("eager")
    try:
        own = network(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
    finally:
        network.set_attn_implementation(NAME)
    states = torch.cat(own.hidden_states[:layers], -1)
    for what, ours, theirs in (
        ("logits", torch.cat([out.logits for out in read]), own.logits),
        ("features", torch.cat([out.tapped for out in read]), states),
    ):
        where = {row: (i, place) for i, chain in enumerate(chains) for place, row in enumerate(chain)}
        wanted = torch.stack([theirs[where[row]] for row in range(len(tokens))])
        error = relative_error(ours, wanted)
        if not error <= (0.1 if target.dtype.itemsize == 2 else 1e-3):
            raise EyasError(f"its {what} differ from transformers' own by {error:.2g}; something in it is neither attention nor row-wise")


def relative_error(ours_NX: Tensor, theirs_NX: Tensor) -> float:
    """The second largest relative error of a row, with each row's mean subtracted. The largest does not count: a near tie among experts may
    turn one row, a wrong mask turns several."""
    ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (ours_NX, theirs_NX))
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)).sort().values[-2])
