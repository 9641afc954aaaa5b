"""Each usual mistake, put into a good draft's files, is named by the doctor; the good draft is healthy.

On the embedded target with the bundled draft: mistakes that only measuring can tell need a draft that has learned something.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from eyas.commands.common import evidence_of
from eyas.diagnose.doctor import diagnose, variable_findings
from eyas.engine import BUNDLED
from eyas.files.disk import directory_hash
from eyas.files.eagle3_files import save_draft
from eyas.files.tensors import INDEX, read_tensors, save_tensors
from eyas.files.tokenizer import chat_template_hash
from eyas.formats.export import export
from eyas.formats.importing import resolve
from eyas.formats.layouts import find
from eyas.formats.portable import TargetFiles, own_draft
from eyas.measure.agreement import Taken
from eyas.train.batches import make_batch
from eyas.train.unroll import unroll

pytestmark = pytest.mark.real
TOKENS = 32  # of each answer
IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass
class Files:
    """A draft's files, open for mistakes."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mistake:
    name: str
    cause: str  # what the doctor must call it
    make: Callable[[Files], Any]
    layout: str = "sglang"  # or eyas: its own folder, with what training wrote down


def swap(files: Files, one: str, other: str) -> None:
    files.tensors[one], files.tensors[other] = files.tensors[other], files.tensors[one]


def reorder(files: Files, name: str, order: tuple[int, ...]) -> None:
    parts = files.tensors[name].chunk(len(order), 1)
    files.tensors[name] = torch.cat([parts[part] for part in order], 1)


def attention_columns(files: Files) -> None:
    for name in "qkv":
        reorder(files, f"midlayer.self_attn.{name}_proj.weight", (1, 0))


def ids_of(files: Files) -> torch.Tensor:
    return files.tensors["d2t"] + torch.arange(len(files.tensors["d2t"]))


def without_end(files: Files) -> None:
    """The end of the turn leaves the vocabulary, and a token that was not in it comes in."""
    ids = [token for token in ids_of(files).tolist() if token != 2]
    spare = next(token for token in range(100, 49152) if token not in set(ids))
    ids = torch.tensor(sorted([*ids, spare]))
    files.tensors["d2t"] = ids - torch.arange(len(ids))
    files.tensors["t2d"] = torch.zeros(49152, dtype=torch.bool).index_fill_(0, ids, True)


def lost_table(files: Files) -> None:
    files.tensors["d2t"].zero_()
    files.tensors.pop("t2d")


def overflown(files: Files) -> None:
    files.tensors["fc.weight"][3, 5] = float("inf")


def drop(*names: str) -> Callable[[Files], None]:
    def make(files: Files) -> None:
        for name in names:
            files.config.pop(name, None)
            files.tensors.pop(name, None)

    return make


MISTAKES = [
    Mistake("ids one too high", "layer ids", lambda files: (drop("eagle_config")(files), files.config.update({IDS: [3, 16, 28]}))),
    Mistake("ids one too low", "layer ids", lambda files: (drop("eagle_config")(files), files.config.update({IDS: [1, 14, 26]}))),
    Mistake(
        "outputs counted as inputs",
        "layer ids",
        lambda files: (drop(IDS)(files), files.config["eagle_config"].update({IDS: [2, 15, 27]})),
    ),
    Mistake("low and high features changed places", "order of features", lambda files: reorder(files, "fc.weight", (2, 1, 0))),
    Mistake("low and middle features changed places", "order of features", lambda files: reorder(files, "fc.weight", (1, 0, 2))),
    Mistake("feature before embedding", "order of halves", attention_columns),
    Mistake(
        "norms changed places",
        "norms swapped",
        lambda files: swap(files, "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"),
    ),
    Mistake("post-norm state fed back", "norm_output", lambda files: files.config.update(norm_output=True)),
    Mistake("normed residual", "norm_before_residual", lambda files: files.config.update(norm_before_residual=True)),
    Mistake(
        "ids for offsets, the mask lost", "vocabulary", lambda files: (files.tensors.update(d2t=ids_of(files)), files.tensors.pop("t2d"))
    ),
    Mistake("d2t lost", "vocabulary", lost_table),
    Mistake("mask of other tokens", "vocabulary", lambda files: files.tensors["t2d"].logical_not_()),
    Mistake("no end of turn", "end of turn", without_end),
    Mistake("two thetas", "rope theta", lambda files: files.config["rope_parameters"].update(rope_theta=10000.0)),
    Mistake(
        "theta changed everywhere",
        "rope theta",
        lambda files: (files.config.update(rope_theta=10000.0), files.config["rope_parameters"].update(rope_theta=10000.0)),
        "eyas",
    ),
    Mistake("positions too few", "position limit", lambda files: files.config.update(max_position_embeddings=2048)),
    Mistake("head tied to the embedding", "tied head", lambda files: files.config.update(tie_word_embeddings=True)),
    Mistake("forty layers claimed", "layer count", lambda files: files.config.update(num_hidden_layers=40)),
    Mistake("a plain Llama's architecture", "architecture", lambda files: files.config.update(architectures=["LlamaForCausalLM"])),
    Mistake("a tensor left out", "a part is missing", drop("midlayer.post_attention_layernorm.weight")),
    Mistake(
        "a tensor too many",
        "a tensor has no place",
        lambda files: files.tensors.update({"midlayer.self_attn.q_norm.weight": torch.ones(64)}),
    ),
    Mistake("a flag left to each engine's own default", "norm_before_residual", drop("norm_before_residual"), "speculators"),
    Mistake("float16 overflow", "not finite", overflown),
    Mistake("a tensor never filled", "zero weights", lambda files: files.tensors["midlayer.mlp.down_proj.weight"].zero_()),
    Mistake("weights of another training", "weights changed", lambda files: files.tensors["norm.weight"].mul_(1.01), "eyas"),
    Mistake(
        "trained on another template", "chat template", lambda files: files.config["eyas"].update(chat_template_sha256="0" * 64), "eyas"
    ),
    Mistake(
        *("asked under other variables", "chat template variables"),
        lambda files: files.config["eyas"].update(chat_template_kwargs={"enable_thinking": False}),
        "eyas",
    ),
    Mistake("trained for another target", "another target", lambda files: files.config["eyas"].update(target_sha256="0" * 64), "eyas"),
    Mistake("taps of words and ids apart", "layer ids", lambda files: files.config.update({IDS: [1, 14, 26]}), "eyas"),
]


@pytest.fixture(scope="module")
def good(embedded, tmp_path_factory) -> dict[str, Path]:
    """The bundled draft as SGLang reads it and as eyas writes it today, with all it writes down."""
    root, target = tmp_path_factory.mktemp("good"), TargetFiles.of(None)
    draft = own_draft(BUNDLED)
    for layout in ("sglang", "speculators"):
        export(draft, BUNDLED, layout, root / layout, target, None, force=False)
    facts = {
        "target": "SmolLM2",
        "target_sha256": directory_hash(target.directory),
        "chat_template_sha256": chat_template_hash(target.directory),
    }
    (root / "eyas").mkdir()
    save_draft(root / "eyas", draft.network(torch.zeros(1, 576)), draft.vocab, draft.target_layers, facts=facts)
    for folder in root.iterdir():
        shutil.copy(BUNDLED / "training.json", folder / "training.json")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def evidence(embedded):
    return evidence_of(TargetFiles.of(None), TOKENS)


@pytest.mark.parametrize("layout", ["sglang", "speculators", "eyas"])
def test_a_good_draft_is_healthy(layout, good, evidence):
    found = diagnose(good[layout], TargetFiles.of(None), *evidence)
    assert found.healthy, found.findings
    assert found.as_is.tau > 1.5 and len(found.measured) > 10


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_each_mistake_is_named(mistake, good, evidence, tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(good[mistake.layout], folder)
    files = Files(json.loads((folder / "config.json").read_text()), read_tensors(folder))
    mistake.make(files)
    assert not (folder / INDEX).exists()
    save_tensors(folder, files.tensors)
    (folder / "config.json").write_text(json.dumps(files.config))
    found = diagnose(folder, TargetFiles.of(None), *evidence)
    causes = [finding.cause for finding in found.findings]
    assert mistake.cause in causes, (causes, found.measured)
    others = set(causes) - {mistake.cause, "config against tensors", "weights changed"}
    assert not others, f"and nothing else is: {found.findings}"


@pytest.mark.parametrize("trained", [None, {}, {"enable_thinking": False}])
@pytest.mark.parametrize("asked", [None, {}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_variables_of_the_template_are_compared(tmp_path, trained, asked):
    (tmp_path / "config.json").write_text(json.dumps({"eyas": {"chat_template_kwargs": trained}}))
    found = list(variable_findings(tmp_path, asked))
    assert len(found) == ((trained or {}) != (asked or {}))
    assert all("--chat-template-kwargs" in finding.do for finding in found)
    (tmp_path / "config.json").write_text(json.dumps({"eyas": {"method": "eagle3"}}))
    assert not list(variable_findings(tmp_path, asked)), "nothing was noted, so nothing is compared"


def test_a_draft_trained_with_the_feature_of_the_token_before_is_named(good, evidence, tmp_path):
    told, embedding = evidence
    draft = own_draft(good["eyas"])
    network = draft.network(embedding)
    learned = [weight.requires_grad_() for name, weight in network.named_parameters() if "embed" not in name]
    batch, states = make_batch(told.examples, Taken(told, draft.config.taps, late=1), network)
    optimiser = torch.optim.Adam(learned, lr=1e-3)
    number = torch.full((draft.config.vocab_size,), -1).index_copy_(0, draft.vocab.ids, torch.arange(len(draft.vocab)))
    for _ in range(12):
        loss = torch.zeros(())
        for step in unroll(network, batch, 3):
            wanted = number[states.target_argmax[step.teacher_rows]]
            loss = loss + cross_entropy(network.logits(step.a), wanted, ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    save_draft(tmp_path, network, draft.vocab, draft.target_layers)
    found = diagnose(tmp_path, TargetFiles.of(None), *evidence)
    assert "feature late" in [finding.cause for finding in found.findings], (found.findings, found.measured)


def test_an_import_decides_by_measuring_what_layer_ids_mean(good, evidence, tmp_path):
    """Trap 28: the same numbers name other layers in another project's files."""
    folder = tmp_path / "draft"
    shutil.copytree(good["sglang"], folder)
    config = json.loads((folder / "config.json").read_text())
    ids = config.pop(IDS)
    config["eagle_config"][IDS] = ids  # inputs, where outputs belong
    (folder / "config.json").write_text(json.dumps(config))
    found = find(folder)
    assert (found.counts, found.taps(30)) == ("outputs", (3, 16, 28))
    draft, told = resolve(found, 30, *evidence)
    line = next(line for line in told if line.startswith("layer ids: "))
    assert draft.config.taps == (2, 15, 27) and "they name inputs" in line and "standard errors apart" in line
