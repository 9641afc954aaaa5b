"""Every setting of eyas, once: the shapes of target and draft, how to sample, how large a tree may be, how to train.

Plain frozen dataclasses; knows no tensors and imports nothing heavy, so `eyas --help` can read the defaults.
"""

# Values come from files that anybody may have written: their types are checked at run time, whatever annotations promise.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypedDict


class EyasError(ValueError):
    """An error a user can mend: the message is one line that says what is wrong and what to do."""


def cache_dir() -> Path:
    """Where long-lived files go (converted targets, self-written data, timings): `$EYAS_CACHE`, else the user's cache directory."""
    root = os.environ.get("EYAS_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eyas")
    return Path(root)


LAST_HIDDEN = (-1,)  # `wants` of a drafter that reads the target's last hidden state, after the final norm, and no layer's input


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """The numbers of the layers whose *input* is the low, middle and high feature (SafeAILab's choice). A target of few layers has no three
    different ones: `check_taps` says so."""
    return (2, num_layers // 2, num_layers - 3)


@dataclass(frozen=True)
class TargetConfig:
    """Shape of a Llama-like target; field names are those of Hugging Face configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False  # bias of q, k, v
    attention_out_bias: bool = False  # bias of o
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    sliding_window: int | None = None  # how many positions a row sees, itself included; None: all


@dataclass(frozen=True)
class DraftConfig:
    """The shape of an EAGLE-3 draft, and the settings that its weights were trained with. Raises `EyasError` for impossible values."""

    vocab_size: int  # the target's
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_hidden_size: int
    taps: tuple[int, ...]  # target layers whose input is read, ascending
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    fc_norm: bool = False  # EAGLE-3.1: one RMSNorm for each tapped feature, before fc
    norm_output: bool = False  # EAGLE-3.1: the post-norm state is fed back instead of the pre-norm one
    norm_before_fc: bool = False  # one RMSNorm over all features, before fc (heads made by others)
    norm_before_residual: bool = False  # the residual is the normed feature (heads made by others; speculators' own default)
    draft_layers: int = 1  # decoder layers; those behind the first are ordinary ones
    attention_bias: ClassVar[bool] = False  # its layers have no biases and no norms of queries and keys
    attention_out_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every size before anything is built from it: sizes come from files that anybody may have written."""
        for name in (
            "vocab_size",
            "draft_vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "target_hidden_size",
            "max_position_embeddings",
        ):
            check_number(name, getattr(self, name), 1, LARGEST_SIZE, whole=True)
        check_number("draft_layers", self.draft_layers, 1, 64, whole=True)
        check_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        check_number("rope_theta", self.rope_theta, 1, 1e12)
        for name in ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"):
            if not isinstance(getattr(self, name), bool):
                raise EyasError(f"{name} must be true or false, not {short(getattr(self, name))}")
        if not self.taps or not all(isinstance(tap, int) and 0 <= tap < 10000 for tap in self.taps):
            raise EyasError(f"taps must be layer numbers, not {short(self.taps)}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            wrong = f"{self.num_attention_heads} heads over {self.num_key_value_heads} key-value heads of width {self.head_dim}"
            raise EyasError(f"{wrong} do not go together: heads come in equal groups, and a head's width is even")
        if self.draft_vocab_size > self.vocab_size:
            raise EyasError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, dict):
            raise EyasError(f"rope_scaling must be an object or null, not {short(self.rope_scaling)}")


def rope_kind(scaling: Mapping[str, Any]) -> Any:
    """The kind of a scaled rotary embedding, under either of its keys; None where it is not scaled."""
    kind = scaling.get("rope_type", scaling.get("type"))
    return None if kind == "default" else kind


LARGEST_SIZE = 1 << 24  # the largest width or vocabulary that is believed


def check_number(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    kind = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise EyasError(f"{name} must be a {'whole ' * whole}number from {least:g} to {most:g}, not {short(value)}")


def short(value: Any) -> str:
    """A value as text for a message of one line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the target's logits: temperature, then the filters top-k, top-p and min-p, in transformers' order.

    Raises `EyasError` for a value out of its range.
    """

    temperature: float = 0.0  # 0 or more; 0: greedy, the likeliest token and no filter
    top_k: int = 0  # 0 or more: keep the top_k likeliest tokens; 0: off
    top_p: float = 1.0  # above 0, at most 1: keep the likeliest tokens that together have this probability; 1: off
    min_p: float = 0.0  # 0 to 1: keep tokens at least this share as likely as the likeliest; 0: off

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EyasError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise EyasError(f"top-k must be 0 (off) or a positive count, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise EyasError(f"top-p must be above 0 and at most 1 (1 is off), not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise EyasError(f"min-p must be between 0 (off) and 1, not {self.min_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class TreeShape:
    """How large a tree may grow: `NODESxDEPTHxTOPK`, counted as SafeAILab counts.

    `chain:K` guesses K tokens, one below the other. `static:3.2.0.1` fixes the shape before anything is guessed: it lists how many
    children each node has, breadth first from the root (zeros at the end left out). A shape of 1 node is the empty tree: plain decoding.
    `60x7x10/NAME` grows with the growth that a plugin registered as NAME (decode/grow.py).
    """

    nodes: int  # nodes that the target reads at most, the root included
    depth: int  # times the draft is expanded after the first; a node lies `depth` + 1 below the root at most
    top_k: int  # children of a node at most; in a tree that scores shape, nodes expanded in a level at most too
    counts: tuple[int, ...] = ()  # of a static tree: each node's number of children, breadth first; () for every other shape
    growth: str = ""  # the name of a registered growth, used instead of EAGLE-2's; "": none

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Read `60x7x10`, `60x7x10/NAME`, `chain:3` or `static:3.2.0.1`. Raises `EyasError` for any other text, for a tree of no nodes, no
        children or an empty chain, and as `static` does."""
        chain = re.fullmatch(r"chain:(\d+)", text.strip())
        full = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/(\w+))?", text.strip())
        static = re.fullmatch(r"static:(\d+(?:\.\d+)*)", text.strip())
        if chain and int(chain[1]) > 0:
            return cls.chain(int(chain[1]))
        if full and int(full[1]) > 0 and int(full[3]) > 0:
            return cls(int(full[1]), int(full[2]), int(full[3]), growth=full[4] or "")
        if static and int(static[1].split(".")[0]) > 0:
            return cls.static([int(count) for count in static[1].split(".")])
        known = "NODESxDEPTHxTOPK (60x7x10), chain:K (chain:3), static:CHILDREN (static:3.2.0.1) or auto"
        raise EyasError(f"tree shape {text!r} is not understood; write {known}")

    @classmethod
    def chain(cls, tokens: int) -> TreeShape:
        """The shape of a chain of this many guessed tokens (at least 1)."""
        return cls(tokens + 1, tokens - 1, 1)

    @classmethod
    def static(cls, counts: Sequence[int]) -> TreeShape:
        """The static shape with these numbers of children, one for each node, breadth first from the root. Zeros at the end may be left
        out. Raises `EyasError` where it counts children of nodes that the tree does not have."""
        depths = depths_of(counts)
        text = ".".join(map(str, counts))
        if any(counts[len(depths) :]):
            raise EyasError(f"static tree {text} names more nodes than it has: {len(counts)} counts, {len(depths)} nodes")
        counts = counts[: max((place + 1 for place, count in enumerate(counts) if count), default=0)]
        return cls(len(depths), depths[-1] - 1, max(counts), tuple(counts)) if counts else PLAIN

    @property
    def fixed(self) -> tuple[int, ...]:
        """Each node's number of children, breadth first, where the shape is settled before anything is guessed (a static tree, a chain);
        () where scores decide."""
        return self.counts or ((1,) * self.levels if self.top_k == 1 and not self.growth else ())

    @property
    def levels(self) -> int:
        """The depth of the deepest node the shape allows; the root's children have depth 1."""
        return 0 if self.nodes == 1 else min(self.depth + 1, self.nodes - 1)

    def cut(self, levels: int) -> TreeShape:
        """This shape, cut to at most `levels` levels."""
        if levels >= self.levels:
            return self
        if levels <= 0:
            return PLAIN
        if self.counts:
            return TreeShape.static([count for count, depth in zip(self.counts, depths_of(self.counts), strict=False) if depth < levels])
        return replace(self, depth=levels - 1)

    def __str__(self) -> str:
        if self.counts:
            return "static:" + ".".join(map(str, self.counts))
        if self.growth:
            return f"{self.nodes}x{self.depth}x{self.top_k}/{self.growth}"
        return f"chain:{self.nodes - 1}" if self.top_k == 1 and self.nodes == self.depth + 2 else f"{self.nodes}x{self.depth}x{self.top_k}"


def depths_of(counts: Sequence[int]) -> list[int]:
    """The depth of each node of a static tree, breadth first."""
    depths = [0]
    for place, count in enumerate(counts):
        if place == len(depths):
            break
        depths += [depths[place] + 1] * count
    return depths


PLAIN = TreeShape(1, 0, 1)
GREEDY = Sampling()
VERIFIERS = ("walk", "accept-reject", "without-replacement", "traversal", "block", "typical-lossy")  # the first is the default
LOSSY = ("typical-lossy",)  # the verifiers that change the text's distribution
PRECISIONS = ("bf16", "fp32", "int8", "q4")  # the first is the default


@dataclass(frozen=True)
class Request:
    """The settings of one call. One object, so that command line, Python and benchmarks cannot drift apart."""

    method: str | None = None  # a name in METHODS; None: the first that the draft serves (EAGLE-3: with look-up in its tree), else plain
    tree: str | TreeShape = "auto"  # a `TreeShape`, or its text; "auto": a planner sizes each tree, or the draft brings its static one
    sampling: Sampling = GREEDY
    seed: int | None = None  # what the text is drawn with; None: a fresh seed, which the result tells
    max_new_tokens: int = 256  # tokens of the answer at most, at least 1; the target's context may end it before
    stop: tuple[str, ...] = ()  # strings that end the text; it is cut where the first of them begins and does not hold it
    raw: bool = False  # the prompt is text to go on with, not a user's turn
    verifier: str = VERIFIERS[0]  # a name in VERIFIERS; "walk" is the default, those in LOSSY change the text's distribution
    batch: int | None = None  # prompts of a list decoded at a time at most; None: all


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # system, user or assistant, or any other role that the chat template knows
    content: str


class Settings(TypedDict, total=False):
    """The settings that a call takes by keyword: `Request`'s fields, and `Sampling`'s."""

    method: str | None
    tree: str | TreeShape
    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    stop: str | Sequence[str]
    raw: bool
    verifier: str
    batch: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class TrainSettings:
    """How a draft is trained; each default is the one that measured best here (docs/architecture.md says how)."""

    unroll_steps: int = 7
    step_keep: float = (
        0.5  # share of anchors that go on from a step to the next: deep steps on fewer anchors, 2.8 times the anchors a second
    )
    loss: str = "soft"  # the paper's cross-entropy; lk-alpha and lk-lambda are about acceptance itself (train/losses.py)
    loss_from: float = 0.0  # share of the budget before which `loss` is the cross-entropy whatever it says
    sampled_columns: int = 1024  # tokens a loss draws beside those likely in its batch; 0: all count, 1.4 times slower, same tau
    step_decay: float = (
        0.55  # weight of step i is step_decay ** i; deep steps have few anchors, and 0.8 (SafeAILab's) made them mostly noise
    )
    draft_vocab_size: int = 8192
    tokens_per_batch: int = 640  # three minutes from scratch reached simulated tau 1.09 with 2048, 1.25 with 640
    learning_rate: float = 2e-3  # at 640 tokens: 1.26 with 2e-3, 1.23 with 1e-3
    final_learning_rate: float = 3e-5
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 1024  # tokens of a document; longer ones are cut at a token
    held_out: float = 0.02  # share of documents that are not trained on, only measured with
    seed: int = 0
    measure_steps: int = 500  # between measurements of held-out acceptance, by which the best weights are chosen
    tree_every: int = 4  # every so many measurements tau is measured in real rounds with trees too; 0: never
    patience: int = 5  # measurements in a row clearly under the best (over-fitting, not noise) that end the training; 0: none
    checkpoint_minutes: float = 5.0
    autocast: bool = False  # products in bfloat16 over float32 weights: on CUDA, and on CPUs that multiply it fast
    top_layer_only: bool = False  # for the ablation: low and middle features are left out, in training and in use
    random_head: bool = False  # for a control: the draft's head begins at random instead of with the target's
    token_left_out: bool = False  # for the ablation: an EAGLE-1 draft never sees which token was drawn
    fc_norm: bool = False
    norm_output: bool = False
    draft_layers: int = 1  # decoder layers of an EAGLE-3 draft; engines run drafts of one layer


DISK_SHARE = 0.5  # share of the free disk that self-written data may take where no --disk is given
SELF_PLAY_TOKENS = 400_000  # answer tokens the target writes where no number is given
TRAIN_MINUTES = 60.0  # minutes of training where no budget is given


def check_taps(taps: Sequence[int], layers: int) -> tuple[int, ...]:
    """Different layers of the target in ascending order, or one line that says what is wrong."""
    if not taps or sorted(set(taps)) != list(taps) or not (taps[0] >= 0 and taps[-1] < layers):
        raise EyasError(f"taps must be different layers in ascending order between 0 and {layers - 1}, not {tuple(taps)}")
    return tuple(taps)
