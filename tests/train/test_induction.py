"""A draft begins with an induction head: untrained, it copies what followed the drawn token; nothing else of it changes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from eyas.config import TrainSettings
from eyas.files.eagle3_files import config_from_file, load_draft, save_draft
from eyas.files.target import load_target
from eyas.model.draft import DraftNetwork
from eyas.model.vocab import DraftVocab
from eyas.train.batches import make_batch
from eyas.train.build import Setup, build
from eyas.train.eagle3 import new_network
from eyas.train.features import Example, TargetStates
from eyas.train.induction import begin_with_induction
from eyas.train.unroll import unroll
from tests.tiny import save_tiny_draft, save_tiny_target, tiny_draft, tiny_target

TAPS = (1, 2, 4)
V = 53
WIDE = {"hidden_size": 64, "head_dim": 32}  # two groups of two query heads
SHAPES = {
    "grouped": WIDE,
    "one group": WIDE | {"num_key_value_heads": 1},
    "a group each": WIDE | {"num_key_value_heads": 4},
    "narrow heads": {"hidden_size": 64, "head_dim": 16},
    "tied": WIDE | {"tie_word_embeddings": True},
}
SETTINGS = {"plain": {}, "normed features": {"fc_norm": True}, "two layers, normed output": {"draft_layers": 2, "norm_output": True}}


def repeating(count: int, length: int, seed: int) -> list[Example]:
    """Texts of different random tokens, written twice; the second time counts."""
    draw = torch.Generator().manual_seed(seed)
    texts = [torch.randperm(V, generator=draw)[:length].tolist() for _ in range(count)]
    return [Example(text + text, [-1] * length + [0] * length) for text in texts]


def begun(ids=range(V), taps=TAPS, asked: dict | None = None, **shape) -> tuple[DraftNetwork, DraftVocab, TargetStates]:
    """A new draft without the head, and where it reads its states."""
    vocab = DraftVocab(ids, V)
    settings = TrainSettings(draft_vocab_size=len(vocab), **asked or {})
    network = new_network(tiny_target(prepare=False, **shape), taps, vocab, settings).double()
    return network, vocab, TargetStates(tiny_target(**shape), taps)


def copied_first(network: DraftNetwork, vocab: DraftVocab, source: TargetStates) -> float:
    """How often, of texts that repeat, the token that followed before is ranked first."""
    batch, _ = make_batch(repeating(8, 20, seed=1), source, network)
    with torch.no_grad():
        step = next(unroll(network, batch, 1))
        return float((vocab.to_target(network.logits(step.a).argmax(-1)) == batch.tokens[step.anchors + 2]).double().mean())


def snapshot(network: DraftNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_untrained_draft_copies(shape):
    network, vocab, source = begun(**shape)
    before = copied_first(network, vocab, source)
    assert begin_with_induction(network, vocab, repeating(40, 25, seed=2), source) is None
    assert before < 0.05 and copied_first(network, vocab, source) > 0.1


@pytest.mark.parametrize("asked", SETTINGS.values(), ids=SETTINGS)
def test_it_copies_under_every_setting_of_the_network(asked):
    network, vocab, source = begun(asked=asked, **WIDE)
    assert begin_with_induction(network, vocab, repeating(40, 25, seed=2), source) is None
    assert copied_first(network, vocab, source) > 0.2


def test_tokens_of_the_draft_vocabulary_are_copied_and_no_others():
    network, vocab, source = begun(ids=range(1, V, 2), **WIDE)
    assert begin_with_induction(network, vocab, repeating(40, 25, seed=2), source) is None
    assert 0.1 < copied_first(network, vocab, source) < 0.6  # half of the tokens are in it


def test_one_group_and_the_low_columns_change_and_nothing_else():
    network, vocab, source = begun(**WIDE)
    before = snapshot(network)
    assert begin_with_induction(network, vocab, repeating(40, 25, seed=2), source) is None
    after, changed = snapshot(network), {}
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            changed[name] = (value != after[name]).nonzero()
    own = {f"midlayer.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert changed.keys() == own | {"fc.weight"} and all(value.isfinite().all() for value in after.values())
    assert changed["fc.weight"][:, 1].max() < WIDE["hidden_size"], "the other features' columns stay"
    groups = {int(row) // 32 for name in ("k", "v") for row in changed[f"midlayer.self_attn.{name}_proj.weight"][:, 0]}
    heads = {int(row) // 64 for row in changed["midlayer.self_attn.q_proj.weight"][:, 0]}
    outputs = {int(column) // 64 for column in changed["midlayer.self_attn.o_proj.weight"][:, 1]}
    assert groups == heads == outputs and len(groups) == 1


def test_its_values_and_its_output_are_as_large_as_each_other_as_they_were():
    """Steps of training have one size for all weights: of two factors the much smaller one would be gone at once."""
    network, vocab, source = begun(**WIDE)
    before = network.midlayer.self_attn.v_proj.weight.clone()
    assert begin_with_induction(network, vocab, repeating(40, 25, seed=2), source) is None
    value, output = (getattr(network.midlayer.self_attn, f"{name}_proj").weight for name in "vo")
    row = int((value != before).nonzero()[0, 0]) // 32 * 32
    sizes = value[row : row + 32].norm(), output[:, 2 * row : 2 * row + 64].norm()
    assert 0.1 < sizes[0] / sizes[1] < 10


def test_the_same_text_and_seed_give_the_same_head():
    (one, vocab, source), (other, _, _) = begun(**WIDE), begun(**WIDE)
    for network in (one, other):
        begin_with_induction(network, vocab, repeating(40, 25, seed=2), source, seed=3)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_its_file_is_any_drafts_file(tmp_path):
    """Same names, shapes and config: what reads the one reads the other, and reads what was set."""
    network, vocab, source = begun(**WIDE)
    folders = [tmp_path / "without", tmp_path / "with"]
    for folder in folders:
        folder.mkdir()
        save_draft(folder, network, vocab, 5)
        begin_with_induction(network, vocab, repeating(40, 25, seed=2), source)
    configs = [re.sub(r'_sha256": "\w+"', "", (folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]
    embedding = tiny_target(**WIDE).embedding.detach()
    (without, _), (held, kept) = (load_draft(folder, embedding, torch.float64) for folder in folders)
    assert {name: value.shape for name, value in without.state_dict().items()} == {n: v.shape for n, v in held.state_dict().items()}
    assert copied_first(without, kept, source) < 0.05 and copied_first(held, kept, source) > 0.2


class Nothing:
    """States that know no token."""

    def __init__(self, source: TargetStates) -> None:
        self.source = source

    def states(self, examples):
        states = self.source.states(examples)
        return states._replace(features=torch.randn(states.features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


REFUSED = {
    "no low feature": ({"taps": (4,)}, repeating(40, 25, seed=2), "one feature alone"),
    "too little text": ({}, [Example([1, 2, 3], [0, 0, 0])], "too few different tokens"),
    "one token": ({}, [Example([7] * 60, [0] * 60)] * 9, "too few different tokens"),
    "a tiny vocabulary": ({"ids": range(3)}, repeating(40, 25, seed=2), "too few different tokens"),
    "features of nothing": ({}, repeating(40, 25, seed=2), "does not tell its token"),
}


@pytest.mark.parametrize(("changes", "text", "why"), REFUSED.values(), ids=REFUSED)
def test_where_it_cannot_be_set_it_says_why_and_changes_nothing(changes, text, why):
    network, vocab, source = begun(**changes, **WIDE)
    before = snapshot(network)
    told = begin_with_induction(network, vocab, text, Nothing(source) if "tell" in why else source)
    assert told is not None and why in told and "\n" not in told
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_layer_that_norms_its_queries_is_left_alone():
    target = tiny_target(**WIDE)
    network, vocab = tiny_draft(target, qk_norm=True)
    before = snapshot(network)
    told = begin_with_induction(network, vocab, repeating(40, 25, seed=2), TargetStates(target, TAPS))
    assert told is not None and "norms its queries" in told
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def first_guesses(settings: TrainSettings, taps=TAPS) -> tuple[float, list[str]]:
    """How often an untrained draft copies, and what the run said."""
    said: list[str] = []
    target = tiny_target(prepare=False, dtype=torch.float32, **WIDE)
    trainer = build(Setup(target, taps, repeating(41, 25, seed=2), None, settings, say=said.append))
    return copied_first(trainer.network, trainer.vocab, trainer.source), said


def test_a_run_begins_with_it_unless_it_is_left_out_or_cannot_be():
    settings = TrainSettings(draft_vocab_size=V, max_length=64, tree_every=0)
    copied, said = first_guesses(settings)
    assert copied > 0.2 and not any("induction" in line for line in said)
    copied, said = first_guesses(settings, taps=(4,))
    assert copied < 0.05 and [line for line in said if line.startswith("training begins without an induction head: ")]
    for control in ("induction", "top_layer_only", "random_head"):  # the last two take away what it needs
        copied, said = first_guesses(replace(settings, **{control: control != "induction"}))
        assert copied < 0.05 and not any("induction" in line for line in said), control


def test_an_earlier_draft_keeps_its_weights(tmp_path):
    target = save_tiny_target(tmp_path / "target")
    draft = save_tiny_draft(tmp_path / "draft", target)
    loaded = load_target(target, "fp32")
    settings = TrainSettings(draft_vocab_size=200, max_length=64, tree_every=0)
    trainer = build(Setup(loaded, config_from_file(draft).taps, repeating(41, 25, seed=2), None, settings, start=draft))
    begun = load_draft(draft, load_target(target, "fp32").embedding.detach(), torch.float32)[0]
    for name, value in begun.state_dict().items():
        assert torch.equal(trainer.network.state_dict()[name], value), name
