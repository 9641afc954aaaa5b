"""A draft between two layouts of files: its shape, its weights under the published names, its vocabulary as absolute ids.

In a `Draft` every fact is known. `Found` is what somebody else's files say: which target layers the draft reads, and which rotary base it
was trained with, may still be open. Knows what eyas's own directory holds; knows no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eyas.config import DraftConfig, EyasError, TargetConfig, check_taps, default_taps
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.eagle3_files import FACTS, checked_network, config_from_file, network_of, save_draft, vocab_of
from eyas.files.hf_config import has_own_blocks
from eyas.files.target import target_config, target_directory
from eyas.files.target_weights import target_tensors
from eyas.files.untrusted import Fields, tensors_of
from eyas.model.draft import DraftNetwork
from eyas.model.rows import Segment
from eyas.model.vocab import DraftVocab

FILES = ("config.json", "model.safetensors")  # a draft in eyas's own layout, and in most engines'
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # published names
PROBE_ROWS, PROBE_STEPS, PROBE_TOKENS = 12, 4, 64


@dataclass(frozen=True)
class Draft:
    """An EAGLE-3 draft as import and export hand it over: weights in memory, with every fact known that is needed to run it."""

    config: DraftConfig  # its shape, the layers it taps, and the settings it was trained with
    weights: dict[str, Tensor]  # by published name: fc, midlayer.*, norm, lm_head, and what else the config says (fc_norm.*, embed_tokens)
    vocab: DraftVocab  # the D target ids it can guess
    target_layers: int  # how many layers its target has
    facts: dict[str, Any] = field(default_factory=dict)  # about its target: the keys in FACTS of files/eagle3_files.py that are known

    def network(self, embedding: Tensor, dtype: torch.dtype = torch.float32) -> DraftNetwork:
        """The network with these weights, as `dtype`, over the target's embedding [V, H]. Raises `EyasError` where weights do not fit the
        config."""
        return network_of(self.config, self.weights, embedding, dtype, "the draft")


@dataclass(frozen=True)
class Found:
    """What the files of some layout say about a draft."""

    layout: str  # the layout's name, in words
    shape: dict[str, Any]  # DraftConfig's fields but for taps
    weights: dict[str, Tensor]
    vocab: DraftVocab
    layer_ids: tuple[int, ...] | None = None  # the layers it reads; None: the default triple
    counts: str = "inputs"  # what `layer_ids` count: "inputs" or "outputs" of layers
    head: str = "own"  # or "the target's", where the files hold none; or "the target's, tied", where they tie it to the embedding too
    target_layers: int = 0  # how many layers its target has, where the files say so; else 0
    facts: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # what had to be inferred, one line for each
    wrong: list[str] = field(default_factory=list)  # those of these lines where a config contradicts the tensors
    says_head_dim: bool = True
    doubts: dict[str, list[Any]] = field(default_factory=dict)  # fields whose value the files leave open -> the values they may have

    def taps(self, target_layers: int) -> tuple[int, ...]:
        """The numbers of the layers whose input it reads, in a target of this many layers."""
        if self.layer_ids is None:
            return check_taps(default_taps(target_layers), target_layers)
        return check_taps(tuple(number + (self.counts == "outputs") for number in self.layer_ids), target_layers)

    def untapped(self) -> DraftConfig:
        """Its config with all but the taps right, which may still be open."""
        return DraftConfig(**self.shape, taps=(0,))

    def resolved(self, target_layers: int, **changes: Any) -> Draft:
        """The draft, with `changes` for fields of its config (taps too) that the files leave open or get wrong. Raises `EyasError` for one
        whose head is the target's (formats/importing.py: `completed`)."""
        if self.head != "own":
            raise EyasError("it has no head of its own, so the target's counts; name the target with --target")
        taps = changes.pop("taps", None) or self.taps(target_layers)
        config = DraftConfig(**{**self.shape, **changes, "taps": taps})
        return Draft(config, self.weights, self.vocab, target_layers, self.facts)


@dataclass(frozen=True)
class TargetFiles:
    """A target's directory and shape; its weights are read only when asked for."""

    directory: Path
    config: TargetConfig
    name: str  # where an engine finds it: a hub name, or an absolute path

    @classmethod
    def of(cls, source: str | Path | None) -> TargetFiles:
        directory = target_directory(source)
        given = None if source is None or str(source) == "embedded" else Path(source).expanduser()
        local = directory if given is None or given.is_dir() else given  # an adapter's directory stands for the merged model
        return cls(directory, target_config(directory), str(local.resolve()) if local.exists() else str(source))

    def embedding(self) -> Tensor:
        """The target's embedding [V, H], as stored."""
        if has_own_blocks(self.directory):
            return target_tensors(self.directory)["model.embed_tokens.weight"]
        from eyas.files.target import load_target

        return load_target(self.directory).embedding.detach()

    def head(self) -> Tensor:
        """The target's head [V, H], as it makes logits. Raises `EyasError` for one with biases, which a draft's head has not."""
        if has_own_blocks(self.directory):
            return self.embedding() if self.config.tie_word_embeddings else target_tensors(self.directory)["lm_head.weight"]
        from eyas.files.target import load_target

        target = load_target(self.directory)
        if target.head_bias is not None:
            raise EyasError(f"the head of {self.name} has biases, which a draft's head has not: a draft without a head cannot take it over")
        return target.head_weight.detach() * target.logit_scale


def own_draft(directory: Path) -> Draft:
    """The EAGLE-3 draft in a directory that eyas wrote."""
    config, tensors = config_from_file(directory), tensors_of(directory)
    vocab = vocab_of(tensors, config, f"draft {directory}")
    checked_network(config, tensors, torch.zeros(1, config.hidden_size), f"draft {directory}")
    own = Fields.of(directory).object("eyas")
    facts = {name: own.raw[name] for name in FACTS if name in own.raw}
    return Draft(config, tensors, vocab, own.size("target_layers"), facts)


def write_own(directory: Path, draft: Draft, facts: Mapping[str, Any]) -> None:
    """Write a draft in eyas's own layout, into an existing directory."""
    save_draft(directory, draft.network(torch.zeros(1, draft.config.hidden_size)), draft.vocab, draft.target_layers, facts=facts)


MORE_LAYERS, OTHER_WIDTH, OWN_EMBEDDING, QK_NORM, BIASES, WINDOW, PARTIAL = range(7)  # what only some engines run


def unusual(draft: Draft, engine: str, runs: Collection[int] = ()) -> str | None:
    """Why `engine` cannot run this draft: it has other than three taps, or something beside the published shape that is not in `runs`.
    None: it can."""
    config = draft.config
    if len(config.taps) != 3:
        return f"{engine} runs three taps, this draft has {len(config.taps)}"
    width, wide = config.hidden_size, config.target_hidden_size
    reasons = (
        (MORE_LAYERS, config.draft_layers != 1, f"runs drafts of one layer, this one has {config.draft_layers}"),
        (OTHER_WIDTH, width != wide, f"runs drafts as wide as their target, this one is {width} wide and its target {wide}"),
        (
            OWN_EMBEDDING,
            config.own_embedding and width == wide,
            "gives a draft as wide as its target the target's embedding, and this one brings another",
        ),
        (QK_NORM, config.qk_norm, "knows no norms of queries and keys, this draft has them"),
        (WINDOW, config.sliding_window is not None, f"lets a draft see all of the text, this one sees {config.sliding_window} positions"),
        (PARTIAL, config.partial_rotary_factor != 1, "rotates whole heads, this draft's rotate in part"),
        (BIASES, config.attention_bias or config.mlp_bias, "knows no biases in a draft, this one has some"),
    )
    return next((f"{engine} {reason}" for name, there, reason in reasons if there and name not in runs), None)


@torch.no_grad()
def probe(draft: Draft) -> Tensor:
    """The draft's logits [rows, D], float32, for seeded features and tokens, and for a chain of steps on its own outputs after them.

    Two drafts with the same weights and settings give the same numbers. The embedding is seeded too, so no target is needed.
    """
    random = torch.Generator().manual_seed(0)
    config, tokens = draft.config, min(PROBE_TOKENS, draft.config.vocab_size)
    network = draft.network(torch.randn(tokens, config.hidden_size, generator=random))
    drafter = Eagle3Drafter(network, draft.vocab)
    drafter.reserve(1, PROBE_ROWS + PROBE_STEPS)
    features = 4 * torch.randn(PROBE_ROWS, len(config.taps) * config.target_hidden_size, generator=random)
    words = torch.randint(tokens, (PROBE_ROWS + PROBE_STEPS,), generator=random).tolist()
    a = drafter.read(words[:PROBE_ROWS], network.fuse(features), list(range(PROBE_ROWS)), [Segment(0, PROBE_ROWS)])
    logits = [network.logits(a)]
    for step in range(PROBE_STEPS):
        place = PROBE_ROWS + step
        a = drafter.read([words[place]], network.fed_back(a[-1:]), [place], [Segment(0, 1)])
        logits.append(network.logits(a))
    return torch.cat(logits)


def changed(draft: Draft, **changes: Any) -> Draft:
    """The draft with the same weights, and these fields of its config changed."""
    return replace(draft, config=replace(draft.config, **changes))
