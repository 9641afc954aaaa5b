"""Every setting of eyas, once: the shapes of target and draft, how to sample, how to train.

Plain frozen dataclasses; knows no tensors and imports nothing heavy, so `eyas --help` can read the defaults.
"""

# Values come from files that anybody may have written: their types are checked at run time, whatever annotations promise.
# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from eyas.checks import LARGEST_SIZE, EyasError, check_number, check_variables, checked_bias, is_number
from eyas.checks import short as short
from eyas.tree_shape import PLAIN as PLAIN
from eyas.tree_shape import TreeShape
from eyas.tree_shape import depths_of as depths_of


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
    own_embedding: bool = False  # it brings an embedding [vocab_size, hidden_size] of its own, and does not read the target's
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3's layer)
    attention_bias: bool = False  # biases of q, k, v and o
    mlp_bias: bool = False  # biases of gate, up and down
    sliding_window: int | None = None  # how many positions a row sees in each layer, itself included; None: all
    partial_rotary_factor: float = 1.0  # share of a head's width that is rotated, its first entries

    @property
    def attention_out_bias(self) -> bool:
        return self.attention_bias

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

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
        if self.sliding_window is not None:
            check_number("sliding_window", self.sliding_window, 1, LARGEST_SIZE, whole=True)
        check_number("partial_rotary_factor", self.partial_rotary_factor, 0, 1)
        check_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        check_number("rope_theta", self.rope_theta, 1, 1e12)
        for name in (
            "fc_norm",
            "norm_output",
            "norm_before_fc",
            "norm_before_residual",
            "own_embedding",
            "qk_norm",
            "attention_bias",
            "mlp_bias",
        ):
            if not isinstance(getattr(self, name), bool):
                raise EyasError(f"{name} must be true or false, not {short(getattr(self, name))}")
        if not self.taps or not all(isinstance(tap, int) and 0 <= tap < 10000 for tap in self.taps):
            raise EyasError(f"taps must be layer numbers, not {short(self.taps)}")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            wrong = f"{self.num_attention_heads} heads over {self.num_key_value_heads} key-value heads of width {self.head_dim}"
            raise EyasError(f"{wrong} do not go together: heads come in equal groups, and a head's width is even")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            told = f"partial_rotary_factor {self.partial_rotary_factor:g} of heads {self.head_dim} wide"
            raise EyasError(f"{told} rotates {self.rotary_dim} entries, which must be an even number")
        if self.draft_vocab_size > self.vocab_size:
            raise EyasError(f"draft_vocab_size {self.draft_vocab_size} is larger than vocab_size {self.vocab_size}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, dict):
            raise EyasError(f"rope_scaling must be an object or null, not {short(self.rope_scaling)}")


def rope_kind(scaling: Mapping[str, Any]) -> Any:
    """The kind of a scaled rotary embedding, under either of its keys; None where it is not scaled."""
    kind = scaling.get("rope_type", scaling.get("type"))
    return None if kind == "default" else kind


LEAST_TEMPERATURE = 1e-10  # logits divided by less leave the range of floating point


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the target's logits: bias and penalties, then temperature, then the filters top-k, top-p and min-p, in
    transformers' order.

    Raises `EyasError` for a value out of its range.
    """

    temperature: float = 0.0  # 0 or more; 0: greedy, the likeliest token and no filter
    top_k: int = 0  # 0 or more: keep the top_k likeliest tokens; 0: off
    top_p: float = 1.0  # above 0, at most 1: keep the likeliest tokens that together have this probability; 1: off
    min_p: float = 0.0  # 0 to 1: keep tokens at least this share as likely as the likeliest; 0: off
    repetition_penalty: float = 1.0  # above 0: a logit of a token in prompt or answer is divided by it, a negative one multiplied; 1: off
    presence_penalty: float = 0.0  # -2 to 2: taken off the logit of a token that is in the answer; 0: off
    frequency_penalty: float = 0.0  # -2 to 2: taken off it once for each time that the token is in the answer; 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, -100 to 100 to add to its logit); a mapping is taken too

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            if not is_number(getattr(self, name)):
                raise EyasError(f"{name.replace('_', '-')} must be a number, not {short(getattr(self, name))}")
        if not is_number(self.top_k, whole=True):
            raise EyasError(f"top-k must be 0 (off) or a whole number above it, not {short(self.top_k)}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EyasError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise EyasError(f"temperature {self.temperature:g} is too small to divide by: 0 is greedy, else at least {LEAST_TEMPERATURE:g}")
        if self.top_k < 0:
            raise EyasError(f"top-k must be 0 (off) or a positive count, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise EyasError(f"top-p must be above 0 and at most 1 (1 is off), not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise EyasError(f"min-p must be between 0 (off) and 1, not {self.min_p}")
        if self.logit_bias != ():
            object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        if self.adjusted:
            self.check_adjustments()

    def check_adjustments(self) -> None:
        check_number("repetition-penalty", self.repetition_penalty, 1e-6, 1e6)
        check_number("presence-penalty", self.presence_penalty, -2, 2)
        check_number("frequency-penalty", self.frequency_penalty, -2, 2)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusted(self) -> bool:
        """Whether logits are changed, by a bias or a penalty, before a token is drawn from them."""
        return bool(self.logit_bias) or (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


GREEDY = Sampling()
VERIFIERS = ("walk", "accept-reject", "without-replacement", "traversal", "block", "typical-lossy")  # the first is the default
MOST_LOGPROBS = 1000  # likeliest tokens told for each token at most
LOSSY = ("typical-lossy",)  # the verifiers that change the text's distribution
PRECISIONS = ("bf16", "fp32", "int8", "q4")  # the first is the default


@dataclass(frozen=True)
class Request:
    """The settings of one call. One object, so that command line, Python and benchmarks cannot drift apart."""

    method: str | None = None  # a name in METHODS; None: the first that the draft serves, else plain
    copy: bool | None = None  # what followed the same tokens before joins the draft's guesses; None: yes, where a draft guesses
    tree: str | TreeShape = "auto"  # a `TreeShape`, or its text; "auto": a planner sizes each tree, or the draft brings its static one
    sampling: Sampling = GREEDY
    seed: int | None = None  # what the text is drawn with; None: a fresh seed, which the result tells
    max_new_tokens: int = 256  # tokens of the answer at most, at least 1; the target's context may end it before
    min_new_tokens: int = 0  # tokens before which neither an end-of-turn id, a stop token nor a stop string ends the answer
    stop: tuple[str, ...] = ()  # strings that end the text; it is cut where the first of them begins and does not hold it
    stop_token_ids: tuple[int, ...] = ()  # ids that end the answer, beside the target's own
    ignore_eos: bool = False  # the target's own end-of-turn ids do not end the answer
    logprobs: int | None = None  # the log probability of each token, and of so many likeliest, go into the result; None: none
    raw: bool = False  # the prompt is text to go on with, not a user's turn
    tools: Sequence[Mapping[str, Any]] | None = None  # functions on offer, as chat APIs take them; the chat template shows them
    chat_template_kwargs: Mapping[str, Any] | None = None  # variables of the chat template, such as {"enable_thinking": False}
    verifier: str = VERIFIERS[0]  # a name in VERIFIERS; "walk" is the default, those in LOSSY change the text's distribution
    batch: int | None = None  # texts decoded at a time at most; None: all
    defaulted: tuple[tuple[str, Any], ...] = ()  # of these settings, those that the target's generation_config.json gave

    def __post_init__(self) -> None:
        """Raise `EyasError` for a value of a wrong kind; what depends on a target or a draft is checked when it is used."""
        self.check_kinds()
        check_number("min-new-tokens", self.min_new_tokens, 0, LARGEST_SIZE, whole=True)
        for token in self.stop_token_ids:
            check_number("a stop token id", token, 0, LARGEST_SIZE, whole=True)
        if self.chat_template_kwargs is not None:
            check_variables(self.chat_template_kwargs)
        if self.logprobs is not None:
            check_number("logprobs", self.logprobs, 0, MOST_LOGPROBS, whole=True)

    def check_kinds(self) -> None:
        for name, kinds in KINDS.items():
            if not isinstance(getattr(self, name), kinds):
                raise EyasError(f"{name} must be {HOW[name]}, not {short(getattr(self, name))}")
        for name in ("raw", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise EyasError(f"{name} must be True or False, not {short(getattr(self, name))}")
        for name in ("seed", "max_new_tokens", "batch"):
            value = getattr(self, name)
            if not is_number(value, whole=True) and (value is not None or name == "max_new_tokens"):
                raise EyasError(f"{name.replace('_', '-')} must be a whole number, not {short(value)}")
            object.__setattr__(self, name, None if value is None else int(value))  # numpy's overflow where noise is made
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise EyasError(f"stop must be a string or several, none of them empty, not {short(self.stop)}")


KINDS: dict[str, tuple[type, ...]] = {
    "method": (str, type(None)),
    "copy": (bool, type(None)),
    "tree": (str, TreeShape),
    "sampling": (Sampling,),
    "verifier": (str,),
}
HOW = {
    "method": "a method's name",
    "copy": "True, False or None",
    "tree": "a shape or its text, as '60x7x10'",
    "sampling": "a Sampling",
    "verifier": "a verifier's name",
}


class Turn(TypedDict):
    """What every turn of a conversation has."""

    role: str  # system, user, assistant or tool, or any other role that the chat template knows
    content: str | Sequence[Mapping[str, Any]] | None  # text, or parts like {"type": "text", "text": ..}; None beside tool calls


class Message(Turn, total=False):
    """One turn of a conversation, as chat APIs take it: a `role`, its `content`, and what else there is."""

    name: str
    tool_calls: Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name": .., "arguments": ..}}, arguments as JSON or object
    tool_call_id: str  # of a tool's turn: the call that it answers
    reasoning_content: str  # what was thought before the answer


class Settings(TypedDict, total=False):
    """The settings that a call takes by keyword: `Request`'s fields, and `Sampling`'s."""

    method: str | None
    copy: bool | None
    tree: str | TreeShape
    sampling: Sampling
    seed: int | None
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    generation_config: str  # "auto": what is not said here is as generation_config.json says; "none": as `Request` says
    raw: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    verifier: str
    batch: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...]


PRODUCTS = ("auto", "fp32", "bf16")  # of training; "auto": bf16 on CUDA, on a CPU whichever a measured second finds quicker


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
    products: str = "auto"  # a name in PRODUCTS: what matrices are multiplied in, over float32 weights
    top_layer_only: bool = False  # for the ablation: low and middle features are left out, in training and in use
    random_head: bool = False  # for a control: the draft's head begins at random instead of with the target's
    induction: bool = True  # a new EAGLE-3 draft begins with an attention head that copies, where it can (train/induction.py)
    token_left_out: bool = False  # for the ablation: an EAGLE-1 draft never sees which token was drawn
    fc_norm: bool = False
    norm_output: bool = False
    draft_layers: int = 1  # decoder layers of an EAGLE-3 draft; vLLM and SGLang run drafts of several, others of one

    def __post_init__(self) -> None:
        """Raise `EyasError` for a value that no training could use."""
        if self.products not in PRODUCTS:
            raise EyasError(f"products must be one of {', '.join(PRODUCTS)}, not {short(self.products)}")
        for name, (least, most) in RANGES.items():
            default = type(self).__dataclass_fields__[name].default
            values = getattr(self, name) if isinstance(default, tuple) else [getattr(self, name)]
            for value in values:
                check_number(name, value, least, most, whole=isinstance(default, int))


RANGES: dict[str, tuple[float, float]] = {  # of settings of training: the least and the most that each may be
    "unroll_steps": (1, 64),
    "step_keep": (0, 1),
    "loss_from": (0, 1),
    "sampled_columns": (0, LARGEST_SIZE),
    "step_decay": (0, 10),
    "draft_vocab_size": (1, LARGEST_SIZE),
    "tokens_per_batch": (1, 1 << 18),  # each has logits of the draft vocabulary at every step
    "learning_rate": (1e-12, 1),
    "final_learning_rate": (0, 1),
    "warmup_steps": (0, 1 << 30),
    "betas": (0, 0.999999),
    "weight_decay": (0, 10),
    "clip": (1e-6, 1e12),
    "max_length": (8, 1 << 18),
    "held_out": (0, 0.9),
    "measure_steps": (1, 1 << 30),
    "tree_every": (0, 1 << 30),
    "patience": (0, 1 << 30),
    "checkpoint_minutes": (0, 1e6),
    "draft_layers": (1, 64),
}

DISK_SHARE = 0.5  # share of the free disk that self-written data may take where no --disk is given
SELF_PLAY_TOKENS = 400_000  # answer tokens the target writes where no number is given
TRAIN_MINUTES = 60.0  # minutes of training where no budget is given


def check_taps(taps: Sequence[int], layers: int) -> tuple[int, ...]:
    """Different layers of the target in ascending order, or one line that says what is wrong."""
    if not taps or sorted(set(taps)) != list(taps) or not (taps[0] >= 0 and taps[-1] < layers):
        raise EyasError(f"taps must be different layers in ascending order between 0 and {layers - 1}, not {tuple(taps)}")
    return tuple(taps)
