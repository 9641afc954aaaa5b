"""Builds a training run: holds examples out, begins a draft or takes an earlier one, and makes the trainer.

Knows every part of training; knows nothing of options, of the user's files or of terminals. A program of your own calls it so:

    trainer = build(Setup(load_target(directory, "fp32"), taps, examples, ShardStates(), TrainSettings(), out))
    trainer.run(Budget(minutes=10), lambda *_: None)
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

import eyas
from eyas.config import PRECISIONS, EyasError, TargetConfig, TrainSettings, TreeShape, check_taps, default_taps
from eyas.files.disk import directory_hash, read_json
from eyas.files.eagle3_files import check_fits, config_from_file, load_draft
from eyas.files.target import load_target, reading_hash, target_config
from eyas.files.tokenizer import chat_template_hash
from eyas.kernels.linear import capability
from eyas.methods import METHODS
from eyas.model.draft import DraftNetwork
from eyas.model.protocols import DraftModule, TargetModel
from eyas.model.vocab import DraftVocab
from eyas.train.acceptance import TreeTau
from eyas.train.conversations import Document, draft_vocabulary
from eyas.train.features import Example, KeptStates, StateSource, TargetStates, kept_states
from eyas.train.induction import begin_with_induction
from eyas.train.parallel import ALONE, Ranks
from eyas.train.split import SplitStates
from eyas.train.teacher import Teacher
from eyas.train.trainer import Run, Trainer

TREE, TREE_PROMPTS, TREE_TOKENS = "60x7x10", 6, 64  # for measurements with trees while training: their shape, prompts, tokens of an answer
TAKEN = 12  # bytes of a gradient and the optimiser's two averages, for each parameter


@dataclass(frozen=True)
class Studied:
    """What a run knows of its target on disk: its shape, its hash, and the layers whose inputs are kept."""

    directory: Path
    config: TargetConfig
    sha256: str  # of its weights
    read_sha256: str  # of its config and its tokenizer
    taps: tuple[int, ...]
    chat_template_kwargs: dict[str, Any] | None = None  # variables that its chat template is given, if any

    @classmethod
    def at(cls, directory: Path, taps: Sequence[int] | None = None, chat_template_kwargs: dict[str, Any] | None = None) -> Studied:
        """The target in a directory; `taps` None: the default ones."""
        config = target_config(directory)
        layers = config.num_hidden_layers
        chosen = usual_taps(layers) if taps is None else check_taps(taps, layers)
        return cls(directory, config, directory_hash(directory), reading_hash(directory), chosen, chat_template_kwargs or None)

    def facts(self) -> dict[str, Any]:
        """What training.json says of the target, and of the machine, versions and date of the run."""
        return {
            "target": self.directory.name,
            "target_sha256": self.sha256,
            "target_read_sha256": self.read_sha256,
            "chat_template_sha256": chat_template_hash(self.directory),
            "chat_template_kwargs": self.chat_template_kwargs,
            "taps_are_inputs_of_layers": list(self.taps),
            "date": date.today().isoformat(),
            "versions": {"eyas": eyas.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {capability()}",
        }


@dataclass(frozen=True)
class Setup:
    """What a run is built from. The target is not yet prepared."""

    target: TargetModel
    taps: tuple[int, ...]
    examples: list[Example]
    source: StateSource | None  # None: the target reads the examples beside the training
    settings: TrainSettings
    out: Path | None = None  # None: nothing is saved
    facts: dict[str, Any] = field(default_factory=dict)
    method: str = "eagle3"
    workers: int = 1
    ranks: Ranks = ALONE
    start: Path | None = None  # a draft whose weights it begins with
    held_out: list[Example] | None = None  # the examples that only measure; None: some of `examples` are taken
    split: bool = False  # whether the target's layers are split over `ranks`
    keep: bool = False  # whether the states that the target reads beside the training are kept, as far as memory goes
    say: Callable[[str], None] = lambda line: None


def build(setup: Setup) -> Trainer:
    """The trainer of a run, ready to `run` or `resume`."""
    target, settings = setup.target, setup.settings
    check_products(settings, target.device.type)
    kept, held_out = hold_out(setup.examples, settings) if setup.held_out is None else (setup.examples, setup.held_out)
    if setup.start is None:
        network, vocab = new_draft(target, setup.taps, kept, settings, setup.method)
    else:
        network, vocab = earlier_draft(setup.start, target, setup.taps, settings)
    network.to(target.device)
    tell(setup, kept, held_out, vocab)
    teacher = Teacher.of(target, vocab, torch.float32)
    source = setup.source or read_beside(setup, network)
    controls = settings.top_layer_only or settings.random_head  # without the low feature or the target's head nothing can be copied
    if settings.induction and setup.start is None and isinstance(network, DraftNetwork) and not controls:
        copy_from_the_beginning(setup, network, vocab, kept, source)
    run = Run(
        network=network,
        vocab=vocab,
        teacher=teacher,
        examples=kept,
        held_out=held_out,
        source=source,
        settings=settings,
        out=setup.out,
        facts=setup.facts,
        target_layers=target.config.num_hidden_layers,
        workers=setup.workers,
        ranks=setup.ranks,
        method=setup.method,
    )
    return Trainer(run)


def read_beside(setup: Setup, network: DraftModule) -> StateSource:
    """The states that the target, prepared for it, reads beside the training of this network."""
    source: TargetStates | KeptStates = TargetStates(setup.target.prepare(), setup.taps)
    if setup.keep:
        taken = TAKEN * sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        source = kept_states(source.target, setup.taps, setup.examples, setup.ranks.count if setup.split else 1, taken)
    return SplitStates(source, setup.ranks) if setup.split else source


def check_products(settings: TrainSettings, device: str) -> None:
    if settings.products == "bf16" and not device.startswith(("cpu", "cuda")):
        raise EyasError(f"products=bf16 trains on CPUs and on CUDA; on {device} leave it out")


def tell(setup: Setup, kept: list[Example], held_out: list[Example], vocab: DraftVocab) -> None:
    different = len({token for example in kept for token, number in zip(example.tokens, example.answers, strict=True) if number >= 0})
    if different < len(vocab) and setup.start is None:  # an earlier draft keeps its own vocabulary
        setup.say(f"the answers use {different} different tokens; the draft vocabulary of {len(vocab)} is filled up with unused ones")
    slots = sum(number >= 0 for example in kept for number in example.answers)
    told = f"{len(kept)} conversations, {slots} answer tokens; {len(held_out)} held out"
    setup.say(f"{told}; the draft vocabulary covers {coverage(held_out, vocab):.1%} of their answers")


def usual_taps(layers: int) -> tuple[int, ...]:
    """The default taps of a target with this many layers. Raises `EyasError` for a target of too few."""
    low, middle, high = default_taps(layers)
    if not 0 <= low < middle < high:
        raise EyasError(f"a target of {layers} layers is too shallow for the default taps; name others with `eyas train --taps L,M,H`")
    return low, middle, high


# ---- the draft that it begins with ----


def new_draft(
    target: TargetModel, taps: tuple[int, ...], kept: list[Example], settings: TrainSettings, method: str = "eagle3"
) -> tuple[DraftModule, DraftVocab]:
    """A new draft, whose vocabulary comes from these conversations' answers and whose weights come from the target."""
    documents, config = [Document(example.tokens, example.answers) for example in kept], target.config
    ids = draft_vocabulary(documents, settings.draft_vocab_size, config.vocab_size, always=config.eos_token_ids)
    vocab = DraftVocab(ids, config.vocab_size)
    return METHODS[method].training().new_network(target, taps, vocab, settings), vocab


def copy_from_the_beginning(setup: Setup, network: DraftNetwork, vocab: DraftVocab, kept: list[Example], source: StateSource) -> None:
    """Set the induction head; where that cannot be done, training goes on without, and it is said why."""
    why = begin_with_induction(network, vocab, kept, source, setup.settings.seed)
    if why is not None:
        setup.say(f"training begins without an induction head: {why}")
    setup.ranks.share(list(network.parameters()))


def earlier_draft(directory: Path, target: TargetModel, taps: tuple[int, ...], settings: TrainSettings) -> tuple[DraftNetwork, DraftVocab]:
    """The weights of a draft to train further, with its own vocabulary; its shape must be what the settings ask for."""
    check_earlier(directory, target.config, taps, settings)
    return load_draft(directory, target.embedding.detach(), torch.float32)


def check_earlier(directory: Path, target: TargetConfig, taps: tuple[int, ...], settings: TrainSettings) -> None:
    """Raise `EyasError`, from the draft's config alone, where its shape is not what the settings ask for."""
    config = config_from_file(directory)
    check_fits(config, target)
    pairs = (
        ("taps", config.taps, taps),
        ("draft vocabulary", config.draft_vocab_size, settings.draft_vocab_size),
        ("fc_norm", config.fc_norm, settings.fc_norm),
        ("norm_output", config.norm_output, settings.norm_output),
        ("draft_layers", config.draft_layers, settings.draft_layers),
    )
    told = [f"{name} {there} there, {here} here" for name, there, here in pairs if there != here]
    if told:
        raise EyasError(f"{directory} is of another shape ({'; '.join(told)}); ask for the same")


def earlier_facts(start: Path | None) -> dict[str, Any]:
    """What training.json says of the draft that a run begins with: its lineage is part of what it was trained on."""
    if start is None:
        return {}
    path = start / "training.json"
    return {"from": {name: value for name, value in read_json(path).items() if name != "curve"} if path.exists() else {}}


# ---- what is measured ----


def hold_out(examples: list[Example], settings: TrainSettings) -> tuple[list[Example], list[Example]]:
    """A seeded split; at least one document measures and one trains, and no conversation does both. Tau is defined on the target's greedy
    answers: where there are such, they measure."""
    order = random.Random(settings.seed).sample(examples, len(examples))
    order.sort(key=lambda example: not example.greedy)  # stable: the greedy ones first, each kind in its drawn order
    count = min(max(1, round(len(order) * settings.held_out)), 64)
    measured = {example.conversation for example in order[:count]} - {None}
    kept = [example for example in order[count:] if example.conversation not in measured]
    if not kept:
        raise EyasError("one conversation is too little to train on and measure with; give at least two")
    return kept, order[:count]


def coverage(examples: list[Example], vocab: DraftVocab) -> float:
    member = vocab.member()
    tokens = [token for example in examples for token, number in zip(example.tokens, example.answers, strict=True) if number >= 0]
    return float(member[torch.tensor(tokens)].float().mean())


def with_trees(trainer: Trainer, directory: Path, device: str = "cpu") -> Trainer:
    """Let a trainer measure, now and then, tau of real rounds with trees on its first held-out prompts."""
    prompts = [prompt for example in trainer.held_out[:TREE_PROMPTS] if (prompt := example.tokens[: max(example.answers.index(0), 8)])]
    target = load_target(directory, PRECISIONS[0], device).prepare()
    trainer.tree_tau = TreeTau(target, trainer.vocab, prompts, TreeShape.parse(TREE), TREE_TOKENS, trainer.method)
    return trainer
